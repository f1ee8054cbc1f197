"""Which settings a command ends up with: flags over configs over the checkpoint's."""

import dataclasses

import pytest
import yaml

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.errors import UserError, with_flags
from gpt_lightning.model import CONFIGS
from gpt_lightning.settings import build_parser, choose_length, flag_names, parse, restore
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
    config.write_text("model: {n_layer: 2, n_head: 2, init_std: null}\n")
    base = {"model": {"n_layer": 1, "n_embd": 8, "n_head": 1}, "seed_everything": 7}
    found = given(parser, f"--config={config}", "--model.n_layer=3", base=base)
    model = {"n_layer": 3, "n_head": 2, "n_embd": 8, "init_std": None}
    assert found == {"seed_everything": 7, "model": model}


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--data.blok_size=4", "unknown flag --data.blok_size; did you mean --data.block_size?"),
        ("--modle.n_layer=4", "did you mean --model.n_layer?"),
        ("--ckpt=last", "unknown flag --ckpt"),
        ("--seed=3", "unknown flag --seed; did you mean --seed_everything?"),
        ("--seeds=3", "unknown flag --seeds; `climb` trains with several seeds"),
        ("--model.n_layer=four", "model.n_layer"),
        ("--model.name=gtp", "gtp"),
        ("--seed_everything=-1", "seed_everything"),
        ("--trainer=5", "trainer"),
    ],
)
def test_a_flag_that_does_not_exist_or_has_a_wrong_type_is_named(parser, flag, message):
    with pytest.raises(UserError) as error:
        parse(parser, ["--trainer.max_steps=3", flag])
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["trainer: {max_step: 3}", "modle: {n_layer: 3}"])
def test_a_mistake_in_a_config_is_named(parser, tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match="max_step|modle"):
        parse(parser, ["--config", str(tmp_path / "mine.yaml")])


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
        ("block_size=9, batch_size=2", "--data.block_size=9, --data.batch_size=2"),
        ("overfit_batches=-1 must be positive", "--data.overfit_batches=-1 must be positive"),
        ("--trainer.max_steps=4, a/n_layer=3.txt", "--trainer.max_steps=4, a/n_layer=3.txt"),
        ("prompt: the character 'x'", "--sample.prompt: the character 'x'"),
    ],
)
def test_messages_show_settings_as_flags(parser, message, shown):
    assert with_flags(message, flag_names(parser)) == shown


# the settings of a checkpoint

STOPPING = {"class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "loss/val"}}  # fmt: skip


@pytest.fixture
def restored(parser):
    """`restored(command, *flags, trainer={...})`: the settings with these in the checkpoint."""

    def run(command, *flags, trainer=None):
        stored = {
            "data": {"corpus": "a.txt", "block_size": 16},
            "model": {"name": "lecture", "optimizer": "muon"},
            "trainer": trainer or {},
        }
        tokenizer = {"kind": "char", "vocabulary": "abc"}
        checkpoint = {"gpt_lightning": {"tokenizer": tokenizer, "settings": stored}}
        return restore(parser, [command, *flags], parse(parser, list(flags)), checkpoint)

    return run


def test_another_text_is_validated_with_the_vocabulary_of_the_checkpoint(restored):
    found = restored("validate", "--data.corpus=b.txt")
    assert found["data"] == {"corpus": "b.txt", "block_size": 16, "vocabulary": "abc"}


@pytest.mark.parametrize("flag, count", [("callbacks+", 2), ("callbacks", 1)])
def test_callbacks_are_added_to_those_of_the_checkpoint_or_replace_them(restored, flag, count):
    trainer = {"callbacks": [STOPPING], "max_steps": 9}
    found = restored("fit", f"--trainer.{flag}=ModelCheckpoint", trainer=trainer)["trainer"]
    assert len(found["callbacks"]) == count and found["max_steps"] == 9


MINE = {"class_path": "mine.Beep"}


def test_a_class_of_the_users_own_is_asked_for_again(restored):
    trainer = {"callbacks": [STOPPING, MINE], "logger": {"class_path": "mine.Log"}}
    with pytest.raises(UserError, match=r"again: --trainer.callbacks\+=mine.Beep --trainer.logger"):
        restored("fit", trainer=trainer)
    found = restored("fit", "--trainer.callbacks=null", "--trainer.logger=csv", trainer=trainer)
    assert found["trainer"] == {"callbacks": None, "logger": "csv"}
    # training alone needs them
    assert restored("validate", trainer={**trainer, "max_steps": 9})["trainer"] == {"max_steps": 9}
    # one that is given again replaces the stored one
    flags = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=loss/train")
    (found,) = restored("fit", *flags, trainer={"callbacks": [STOPPING]})["trainer"]["callbacks"]
    assert found["init_args"] == {"monitor": "loss/train"}


def test_short_names_of_loggers(parser, monkeypatch):
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger"}
    monkeypatch.setattr("gpt_lightning.settings.find_spec", lambda name: None)
    for name in ("wandb", "WandbLogger"):
        with pytest.raises(UserError, match=f"--trainer.logger={name} .* pip install wandb"):
            parse(parser, [f"--trainer.logger={name}"])
    monkeypatch.setattr("gpt_lightning.settings.find_spec", lambda name: name)
    flags = ["--trainer.logger=wandb", "--trainer.logger.project=mine"]
    assert parse(parser, flags)["trainer"]["logger"] == {**wandb, "init_args": {"project": "mine"}}
    found = parse(parser, ["--trainer.logger=[csv, wandb]"])
    assert found["trainer"]["logger"] == ["csv", wandb]


def test_a_length_given_on_resume_replaces_the_stored_one(restored):
    found = restored("fit", "--trainer.max_epochs=30", trainer={"max_steps": 9})
    assert found["trainer"] == {"max_epochs": 30}
    found = restored("fit", "--trainer.max_steps=30", trainer={"max_epochs": 9})
    assert found["trainer"] == {"max_steps": 30}


def test_settings_are_plain_types_and_survive_yaml(parser):
    flags = ["--trainer.max_time=00:00:10:00", "--trainer.logger=CSVLogger",
             "--trainer.logger.save_dir=a.b", "--data.corpus=no", "--sample.prompt=3",
             "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename={step}",
             "--trainer.gradient_clip_val=null", "--trainer.limit_val_batches=0.5"]  # fmt: skip
    found = parse(parser, flags)
    assert found["trainer"]["gradient_clip_val"] is None
    assert parse(parser, [], base=yaml.safe_load(yaml.safe_dump(found))) == found


# automatic choices


@pytest.mark.parametrize(
    "chars, data, trainer, steps",
    [
        (500, {}, {}, 40),  # 450 to train on, 32 a step: 42 steps in three epochs
        (800, {}, {}, 64),  # 67
        (800, {}, {"accumulate_grad_batches": 2}, 40),
        (800, {"batch_size": 2}, {}, 132),  # 135
        (800, {}, {"max_steps": 7}, 7),
        (800, {}, {"max_epochs": 1}, None),
        (800, {"overfit_batches": 1}, {}, 1000),
        (400_000, {}, {}, 1000),
    ],
)
def test_default_length_is_three_epochs_of_a_short_text(tmp_path, chars, data, trainer, steps):
    (tmp_path / "a.txt").write_text(("to be or not to be\n" * (chars // 19 + 1))[:chars])
    module = TextDataModule(str(tmp_path / "a.txt"), **{"block_size": 8, "batch_size": 4, **data})
    module.setup("fit")
    choose_length(trainer, module, world_size=1)
    assert trainer.get("max_steps") == steps


@pytest.mark.parametrize(
    "given, every_n_epoch",
    [({"val_check_interval": 250}, None), ({"val_check_interval": 0.5}, 1),
     ({"check_val_every_n_epoch": 2}, 2), ({"val_check_interval": "00:00:10:00"}, 1)],
)  # fmt: skip
def test_a_validation_interval_that_is_given_is_never_replaced(tmp_path, given, every_n_epoch):
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 50)
    module = TextDataModule(str(tmp_path / "a.txt"), block_size=8, batch_size=4)
    module.setup("fit")
    trainer = dict(given)
    choose_length(trainer, module, world_size=1)
    assert trainer.get("val_check_interval") == given.get("val_check_interval")
    assert trainer["check_val_every_n_epoch"] == every_n_epoch
