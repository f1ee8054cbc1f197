"""Which settings a command ends up with: flags over configs over the checkpoint's."""

import dataclasses

import pytest
import yaml

from gpt_lightning.errors import UserError, with_flags
from gpt_lightning.model import CONFIGS
from gpt_lightning.settings import (
    build_parser,
    flag_names,
    parse,
    restore,
)
from gpt_lightning.training.optim import OptimizerConfig


@pytest.fixture(scope="module")
def parser():
    return build_parser("fit")


def given(parser, *argv, **more):
    settings = parse(parser, list(argv), **more)
    return {section: value for section, value in settings.items() if value != {}}


def test_only_what_is_given_is_in_the_settings(parser):
    assert given(parser) == {}
    flags = ["--model.n_layer=4", "--trainer.val_check_interval=250", "--data.stride=null"]
    assert given(parser, *flags) == {  # the same as the defaults, and given all the same
        "model": {"n_layer": 4},
        "trainer": {"val_check_interval": 250},
        "data": {"stride": None},
    }


def test_flags_win_over_configs_and_these_over_the_checkpoint(parser, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("model: {n_layer: 2, n_head: 2, init_std: null}\ntrainer: {max_steps: 5}\n")
    base = {"model": {"n_layer": 1, "n_embd": 8, "n_head": 1}, "seed_everything": 7}
    found = given(parser, f"--config={config}", "--model.n_layer=3", base=base)
    assert found == {
        "seed_everything": 7,
        "model": {"n_layer": 3, "n_head": 2, "n_embd": 8, "init_std": None},
        "trainer": {"max_steps": 5},
    }


def test_callbacks_of_flags_are_added_to_those_of_the_checkpoint(parser):
    path = "lightning.pytorch.callbacks"
    base = {"trainer": {"callbacks": [{"class_path": f"{path}.EarlyStopping",
                                        "init_args": {"monitor": "loss/val"}}]}}  # fmt: skip
    flags = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename={step}"]
    found = given(parser, *flags, base=base)["trainer"]["callbacks"]
    assert [callback["class_path"] for callback in found] == [
        f"{path}.EarlyStopping", f"{path}.ModelCheckpoint"]  # fmt: skip


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--data.blok_size=4", "unknown flag --data.blok_size; did you mean --data.block_size?"),
        ("--trainer.max_step=4", "did you mean --trainer.max_steps?"),  # no abbreviations
        ("--modle.n_layer=4", "did you mean --model.n_layer?"),
        ("--ckpt=last", "unknown flag --ckpt"),
        ("--model.n_layer=four", "model.n_layer"),
        ("--model.n_layer=four", "four"),
        ("--model.name=gtp", "gtp"),
        ("--seed_everything=-1", "--seed_everything=-1 must be 0 or more"),
        ("--trainer=5", "trainer"),
        ("stray", "stray"),
    ],
)
def test_a_flag_that_does_not_exist_or_has_a_wrong_type_is_named(parser, flag, message):
    with pytest.raises(UserError) as error:
        parse(parser, ["--trainer.max_steps=3", flag])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("trainer:\n  max_step: 3\n", "max_step"),
        ("modle:\n  n_layer: 3\n", "modle"),
        ("trainer:\n  max_steps: 3\n bad: [1\n", "line 3"),
        ("model:\n  bias: [4]\n", "model.bias"),
        ("- 1\n- 2\n", "mine.yaml"),
    ],
)
def test_a_mistake_in_a_config_names_the_file_or_the_setting(parser, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        parse(parser, ["--config", str(tmp_path / "mine.yaml")])
    assert message in str(error.value)


def test_every_field_of_the_configs_is_a_documented_flag(parser):
    text = " ".join(parser.format_help().split())
    for config in (*CONFIGS.values(), OptimizerConfig):
        for field in dataclasses.fields(config):
            if field.name not in ("vocab_size", "block_size"):
                flag = f"--model.{field.name} "
                assert flag in text
                after = text.split(flag)[-1]
                assert "(type:" in after and len(after.split("(type:")[0]) > 20, flag


@pytest.mark.parametrize(
    "message, shown",
    [
        ("n_embd=3 is odd", "--model.n_embd=3 is odd"),
        ("block_size=9 is too large: block_size=4 and batch_size=2 fit",
         "--data.block_size=9 is too large: --data.block_size=4 and --data.batch_size=2 fit"),
        ("overfit_batches=-1 must be positive", "--data.overfit_batches=-1 must be positive"),
        ("--trainer.max_steps=4, a/n_layer=3.txt", "--trainer.max_steps=4, a/n_layer=3.txt"),
        ("prompt: the character 'x'; use unknown=drop",
         "--sample.prompt: the character 'x'; use --data.unknown=drop"),
        ("ckpt_path=a.ckpt: no such file", "--ckpt_path=a.ckpt: no such file"),
        ("the disk is full", "the disk is full"),
    ],
)  # fmt: skip
def test_messages_show_settings_as_flags(parser, message, shown):
    assert with_flags(message, flag_names(parser)) == shown


ENTRY = {
    "model": {"name": "lecture", "n_layer": 1, "vocab_size": 9, "block_size": 16},
    "corpus": {"name": "a.txt", "sha256": "0" * 64, "split": "tail", "val_fraction": 0.2},
    "tokenizer": {"kind": "char", "vocabulary": "abc"},
    "settings": {
        "data": {"corpus": "a.txt", "block_size": 16},
        "model": {"name": "lecture", "optimizer": "muon"},
        "trainer": {},
    },
}


def test_another_text_is_validated_with_the_vocabulary_of_the_checkpoint(parser):
    argv = ["validate", "--data.corpus=b.txt"]
    found = restore(parser, argv, parse(parser, argv[1:]), {"gpt_lightning": ENTRY})
    assert found["data"] == {"corpus": "b.txt", "block_size": 16, "vocabulary": "abc"}


def test_resuming_with_another_optimizer_is_refused(parser):
    checkpoint = {"gpt_lightning": ENTRY}
    argv = ["fit", "--model.optimizer=adamw"]
    with pytest.raises(UserError, match="--model.optimizer=adamw cannot continue"):
        restore(parser, argv, parse(parser, argv[1:]), checkpoint)


def test_settings_survive_yaml(parser):
    flags = ["--trainer.max_time=00:00:10:00", "--trainer.logger=CSVLogger",
             "--trainer.logger.save_dir=a.b", "--data.corpus=no", "--sample.prompt=3"]  # fmt: skip
    found = parse(parser, flags)
    assert parse(parser, [], base=yaml.safe_load(yaml.safe_dump(found))) == found


def test_settings_are_plain_types_throughout(parser):
    def types(value):
        parts = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        )
        return {type(value)}.union(*map(types, parts))

    flags = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename={step}",
             "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x",
             "--trainer.gradient_clip_val=null", "--trainer.limit_val_batches=0.5"]  # fmt: skip
    found = parse(parser, flags)
    assert types(found) <= {dict, list, str, int, float, type(None)}
    assert found["trainer"]["gradient_clip_val"] is None


def test_callbacks_added_on_resume_keep_those_of_the_checkpoint(parser):
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "loss/val"}}  # fmt: skip
    settings = {
        **ENTRY["settings"],
        "trainer": {"callbacks": [stopping], "max_steps": 9},
    }
    checkpoint = {"gpt_lightning": {**ENTRY, "settings": settings}}
    for flag, count in (("callbacks+", 2), ("callbacks", 1)):
        argv = ["fit", f"--trainer.{flag}=ModelCheckpoint"]
        found = restore(parser, argv, parse(parser, argv[1:]), checkpoint)
        assert len(found["trainer"]["callbacks"]) == count
        assert found["trainer"]["max_steps"] == 9


def test_a_length_given_on_resume_replaces_the_stored_one(parser):
    settings = {**ENTRY["settings"], "trainer": {"max_steps": 9}}
    checkpoint = {"gpt_lightning": {**ENTRY, "settings": settings}}
    for given, stored in (("max_epochs", "max_steps"), ("max_steps", "max_epochs")):
        settings["trainer"] = {stored: 9}
        argv = ["fit", f"--trainer.{given}=30"]
        found = restore(parser, argv, parse(parser, argv[1:]), checkpoint)
        assert found["trainer"] == {given: 30}
