"""What a run says about itself: while it runs, at its end, and in TensorBoard."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning import GPTConfig, GPTModule, TextDataModule
from gpt_lightning.training import callbacks
from gpt_lightning.training.callbacks import RunProgressBar, TrainingMetrics
from gpt_lightning.training.report import files_read, outcome


@pytest.mark.parametrize(
    ("losses", "rows"),
    [
        ([1.0, 0.8, 0.7, 0.8], {"overfitted": "lowest at step 750, +0.10 since"}),
        ([1.0, 0.8, 0.75, 0.7], {"still falling": "0.0500 nats since step 750"}),
        ([1.0, 0.8, 0.704, 0.7], {}),
        ([0.7], {}),
        ([], {}),
    ],
)
def test_the_outcome_of_a_run_follows_from_its_validation_losses(losses, rows):
    metrics = TrainingMetrics()
    metrics.val_losses = {250 * (i + 1): loss for i, loss in enumerate(losses)}
    trainer = SimpleNamespace(
        global_step=1000, estimated_stepping_batches=1000, callbacks=[metrics]
    )
    assert outcome(trainer, None) == rows


def test_a_run_that_ends_early_says_why(here, capsys):
    stop = ["callbacks+=EarlyStopping", "callbacks.monitor=loss/val", "callbacks.patience=2",
            "callbacks.min_delta=100", "val_check_interval=4", "max_steps=400"]  # fmt: skip
    assert run("fit", *TINY, *(f"--trainer.{flag}" for flag in stop)) == 0
    row = re.search(r"^stopped early +(.+)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert row.startswith("step 12 of 400: ") and "loss/val did not improve" in row


def test_a_limited_validation_says_so_and_a_resumed_run_counts_its_own_characters(here, capsys):
    assert run("fit", *TINY, "--trainer.limit_val_batches=1") == 0
    out = capsys.readouterr().out
    assert re.search(r"^step 4  train .* bits\)  \(on 1 of \d+ batches\)$", out, re.M)
    assert re.search(r"^final val loss .*\(on 1 of \d+ batches\)$", out, re.M)
    assert re.search(r"^characters seen  128 \(\S+ epochs\)$", out, re.M)  # 4 steps of 4 x 8
    more = ["--data.batch_size=2", "--trainer.max_steps=6", "--trainer.limit_val_batches=1.0"]
    assert run("fit", "--ckpt_path=last", *more) == 0
    out = capsys.readouterr().out
    assert "batches)" not in out
    assert re.search(r"^characters seen  32 \(\S+ epochs\) since then$", out, re.M)
    assert run("validate", "--trainer.limit_val_batches=0.5") == 0
    assert "batches)" in capsys.readouterr().out


def test_commands_name_the_checkpoint_that_they_take(here, capsys):
    printed = {}
    for command in ("validate", "test", "generate"):
        assert run(command, *(["--max_new_tokens=3"] if command == "generate" else [])) == 0
        printed[command] = capsys.readouterr()
    path = "lightning_logs/version_0/checkpoints/best.ckpt"
    assert printed["generate"].err == f"checkpoint {path}, step 4\n"
    for command, part in (("validate", "val"), ("test", "test")):
        assert path in printed[command].out
        assert re.search(rf"^step 4  {part} \d.\d+ nats \(", printed[command].out, re.MULTILINE)


def test_a_lack_of_memory_is_told_as_one(here, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPTModule, "losses", fail)
    assert run("fit", *TINY) == 2
    assert "out of memory" in (error := capsys.readouterr().err) and "--data.batch_size=4" in error


def fit(folder, *given: Callback, **settings) -> None:
    path = folder / "text.txt"
    path.write_text("0123456789" * 200)
    data = TextDataModule(str(path), block_size=8, batch_size=4)
    trainer = Trainer(
        accelerator="cpu", max_steps=3, callbacks=list(given), enable_checkpointing=False,
        enable_model_summary=False, log_every_n_steps=1, **settings
    )  # fmt: skip
    trainer.fit(GPTModule(GPTConfig(n_layer=1, n_head=2, n_embd=16)), data)


@pytest.mark.parametrize("terminal", [False, True])
def test_redirected_output_shows_progress(terminal, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    fit(tmp_path, RunProgressBar(), logger=False)
    line = r"^step (\d)  (?:train \d\.\d{4}  )?[\d,]+ characters/s  \d:\d\d:\d\d left$"
    shown = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert shown == ([] if terminal else ["1", "2", "3"])


def test_tensorboard_has_the_settings_from_the_first_step(tmp_path):
    class Read(Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer.logger.experiment.flush()
            events = EventAccumulator(trainer.logger.log_dir).Reload()
            self.settings = str(events.summary_metadata["_hparams_/session_start_info"])

    read = Read()
    fit(tmp_path, read, logger=TensorBoardLogger(tmp_path), enable_progress_bar=False)
    assert "model/n_embd" in read.settings and "data/block_size" in read.settings
    assert "_instantiator" not in read.settings


def test_a_run_that_becomes_slow_for_a_minute_says_so_once():
    metrics = TrainingMetrics()
    speeds = [(0, 90), (10, 90), (20, 29), (60, 31), (70, 29), (119, 29), (121, 29), (300, 29)]
    speeds += [(310, 90), (320, 20), (371, 20)]
    assert [now for now, speed in speeds if metrics.is_slow(speed, now)] == [121, 371]


def test_a_resumed_run_compares_with_the_losses_from_before(here, capsys):
    longer = ["--trainer.max_steps=40", "--trainer.val_check_interval=40"]
    flags = ["--ckpt_path=last", "--model.learning_rate=0.05", "--trainer.accelerator=cpu"]
    assert run("fit", *flags, *longer) == 0
    assert re.search(r"still falling +\d\.\d+ nats since step 4\n", capsys.readouterr().out)


def test_lightnings_own_tips_are_silent_in_a_plain_trainer(tmp_path):
    script = (
        "from lightning.pytorch import Trainer; import gpt_lightning.training.module; Trainer()"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0 and "GPU available" in run.stderr and "Tip:" not in run.stderr


def test_the_summary_counts_what_was_read_and_names_what_was_not(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n' * 9)
    (tmp_path / "photo").write_bytes(b"\0")
    for settings, said in (
        (dict(field="text", separator="|"), "18 documents separated by '|' in 1 file, 71 char"),
        ({}, "rows are read as plain text: --data.field=NAME"),
    ):
        data = TextDataModule(str(tmp_path), block_size=2, batch_size=1, **settings)
        data.setup("fit")
        assert said in files_read(data) and "; left out: photo (binary)" in files_read(data)


def test_what_a_validation_text_lacks_and_repeats_is_told(here, capsys):
    text = Path("text.txt").read_text()
    Path("other.txt").write_text(text[:500] + "9876")
    flags = ("--data.val_corpus=other.txt", "--data.unknown=drop", "--trainer.max_steps=2")
    assert run("fit", *TINY, *flags) == 0
    out = capsys.readouterr().out
    assert "       4 of 504 characters of " in out and "other.txt are not in the vocabulary" in out
    assert re.search(r"note   \d+% of the validation text repeats", out)
