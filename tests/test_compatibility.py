"""Checkpoints compared with the run at hand, and which of their settings are trusted."""

import json

import pytest
from conftest import description

from gpt_lightning.compatibility import (
    check_compatible,
    check_corpus,
    flags_to_repeat,
    trusted_settings,
)
from gpt_lightning.errors import UserError


def test_what_does_not_change_the_weights_may_differ():
    check_compatible(description(), description(dropout=0.2), "a.ckpt")
    theirs, other = (description()["corpus"] for _ in range(2))
    other |= {"sha256": "1" * 64, "name": "another text", "split": "blocks"}
    check_corpus(theirs, other, "a.ckpt", fitting=False)
    with pytest.raises(UserError, match="has changed since its training"):  # its folder was moved
        check_corpus(theirs, other, "a.ckpt", fitting=False, named=())


@pytest.mark.parametrize(
    "ours, corpus, message",
    [
        ({"n_embd": 8}, {}, "n_embd=8 does not fit ckpt_path=a.ckpt, whose model has n_embd=4"),
        ({"name": "lecture", "n_embd": 8}, {}, "name=lecture does not fit"),
        ({}, {"sha256": "1" * 64}, "ckpt_path=a.ckpt: corpus=a text has changed"),
        ({}, {"sha256": "1" * 64, "name": "b"}, "ckpt_path=a.ckpt: corpus=b is not its corpus"),
        (
            {},
            {"val_name": "v", "val_sha256": "1" * 64},
            "ckpt_path=a.ckpt: val_corpus=v is not its val_corpus",
        ),
        ({}, {"split": "blocks"}, "split=blocks: .* with split=tail"),
        ({}, {"val_fraction": 0.2}, "val_fraction=0.2: .* with val_fraction=0.1"),
        ({"vocabulary": "\nac"}, {}, "ckpt_path=a.ckpt has another vocabulary"),
    ],
)
def test_a_run_that_does_not_fit_the_checkpoint_is_refused(ours, corpus, message):
    ours = description(**ours)
    ours["corpus"] |= corpus
    with pytest.raises(UserError, match=f"^{message}"):
        check_compatible(description(), ours, "a.ckpt")
        check_corpus(description()["corpus"], ours["corpus"], "a.ckpt", fitting=True)


# settings

CALLBACKS = "lightning.pytorch.callbacks"
ABORT = {"class_path": f"{CALLBACKS}.LambdaCallback", "init_args": {"on_fit_start": "os.abort"}}


def test_the_settings_of_a_checkpoint_are_restored():
    saving = {"class_path": f"{CALLBACKS}.ModelCheckpoint",
              "init_args": {"filename": "{step}-{val/loss:.2f}", "dirpath": "json.v2"}}  # fmt: skip
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger",
              "init_args": {"save_dir": "os/a.b", "version": "1.b"}}  # fmt: skip
    trainer = {"max_steps": 5, "precision": "bf16-mixed", "max_time": "00:00:01:00",
               "callbacks": [saving], "logger": logger, "gradient_clip_val": 0.5}  # fmt: skip
    stored = {"seed_everything": 7, "data": {"corpus": "a.txt"}, "model": {"n_layer": 2},
              "trainer": trainer, "sample": {"prompt": "os.abort"}, "checkpoint": {}}  # fmt: skip
    assert trusted_settings(stored, set()) == stored
    more = stored | {"trainer": {**trainer, "default_root_dir": "/elsewhere"}, "other": 1}
    assert trusted_settings(more, set()) == stored


@pytest.mark.parametrize(
    "key, value",
    [
        ("callbacks", [{"class_path": "mine.Callback"}]),
        ("callbacks", [ABORT]),
        ("callbacks", "os.abort"),
        ("callbacks", "{class_path: torch.nn.Linear}"),  # read as YAML
        ("callbacks", '[{"class_path": "t\\x6frch\\x2enn.Linear"}]'),
        ("callbacks", "'\"os.abort\"'"),  # YAML in YAML
        ("callbacks", "a_file"),  # read as a file of YAML
        ("logger", {"class_path": "lightning.pytorch.cli.os.Abort"}),
        ("logger", {"class_path": "lightning.pytorch.seed_everything"}),
        ("profiler", {"dict_kwargs": {"os.abort": 1}}),
    ],
)
def test_settings_that_name_code_are_not_taken_from_a_checkpoint(tmp_path, monkeypatch, key, value):
    (tmp_path / "a_file").write_text("class_path: torch.nn.Linear")
    monkeypatch.chdir(tmp_path)
    stored = {"trainer": {key: value, "max_steps": 5}}
    with pytest.raises(UserError, match=rf"name code, .* give them again: '?--trainer.{key}\+?="):
        trusted_settings(stored, {"max_steps"})
    assert trusted_settings(stored, {key})["trainer"] == {"max_steps": 5}


def test_the_flags_that_a_resume_repeats():
    mine = {"class_path": "mine.Beep", "init_args": {"times": 3}}
    trainer = {"logger": {"class_path": "mine.Log"}, "callbacks": [{"class_path": "m.A"}, mine],
               "profiler": "simple"}  # fmt: skip
    flags = ["--trainer.logger=mine.Log", "--trainer.callbacks+=m.A"]
    assert flags_to_repeat({"trainer": trainer})[:2] == flags
    name, _, text = flags_to_repeat({"trainer": trainer})[2].partition("=")
    assert name == "--trainer.callbacks+" and json.loads(text) == mine
