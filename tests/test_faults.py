"""What machines do to a run: it ends in one line, and nothing that was good is lost."""

import copy
import fcntl
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt_lightning import GPTModule, TextDataModule
from gpt_lightning.checkpoint import read_checkpoint
from gpt_lightning.cli import main
from gpt_lightning.lightning_cli import fault
from gpt_lightning.training.checkpointing import AtomicCheckpointIO, BestAndLast

RUN = Path("lightning_logs/version_0")
LAST, BEST = RUN / "checkpoints/last.ckpt", RUN / "checkpoints/best.ckpt"
ON = ("fit", "--ckpt_path=last", "--trainer.accelerator=cpu")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, locks and limits of Unix")


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def ends(capsys):
    """`ends(*argv)`: the command's exit code, and what it says on stdout and stderr."""

    def run(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(map(str, argv)))
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return run


def one_line(code: int, err: str) -> str:
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# --- numbers that are not finite ------------------------------------------------------------------


class Spoil(Callback):
    """Makes one weight NaN after the step `at`, and keeps the weights that each step began with."""

    def __init__(self, at: int):
        self.at, self.before = at, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.at:
            with torch.no_grad():
                next(module.net.parameters())[0] = math.nan
        self.before.append(copy.deepcopy(module.state_dict()))


def small_run(folder: Path, *callbacks: Callback, **settings):
    (folder / "text.txt").write_text("a rose is a rose is a rose;\n" * 40)
    data = TextDataModule(str(folder / "text.txt"), block_size=8, batch_size=4)
    module = GPTModule(data.vocab_size, 8, n_layer=1, n_head=2, n_embd=16)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        limit_val_batches=0,
        **{"max_steps": 40, "gradient_clip_val": 1.0, **quiet, **settings},
    )
    return trainer, module, data


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(clip, tmp_path):
    spoil, keeper = Spoil(17), BestAndLast(every_n_train_steps=5)
    trainer, module, data = small_run(tmp_path, spoil, keeper, gradient_clip_val=clip)
    with pytest.raises(
        ValueError, match=r"step 18 has a loss of nan .* learning rate of 0\.0"
    ) as e:
        trainer.fit(module, data)
    assert "--model.learning_rate" in str(e.value) and "\n" not in str(e.value)
    assert trainer.global_step == 17  # not taken
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), spoil.before[-1][name].nan_to_num(7)), name
    saved = read_checkpoint(keeper.last_path)
    assert saved["global_step"] == 15 and keeper.safe == (keeper.last_path, 15)
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_nothing_is_saved_of_a_step_that_is_not_finite(tmp_path):
    """As on a GPU, which is not asked at every step."""
    keeper = BestAndLast(every_n_train_steps=5)
    trainer, module, data = small_run(tmp_path, keeper, max_steps=5)
    trainer.fit(module, data)
    before = keeper.last_path.read_bytes()
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf)):
        module.next_loss, module.grad_norm = torch.tensor(loss), torch.tensor(norm)
        with pytest.raises(ValueError, match="step 5 has a loss of"):
            keeper._save(trainer, keeper.last_path)
    assert keeper.last_path.read_bytes() == before
    # fp16's scaler passes over such gradients by itself
    trainer.precision_plugin.scaler = object()
    module.refuse_not_finite(5)
    module.next_loss = torch.tensor(math.inf)
    with pytest.raises(ValueError, match="loss of inf"):
        module.refuse_not_finite(5)


def test_the_command_names_the_last_good_checkpoint(here, ends):
    flags = ("--trainer.max_steps=60", "--checkpoint.every_n_train_steps=1", "--model.min_lr=1e30",
             "--model.learning_rate=1e30", "--model.muon_learning_rate=1e30")  # fmt: skip
    code, _, err = ends(*ON, *flags)
    line = one_line(code, err)
    step = read_checkpoint(LAST)["global_step"]
    assert re.search(r"step \d has a loss of .* at a learning rate of 1e\+30", line)
    assert line.endswith(
        f". Step {step} is safe; go on with: python -m gpt_lightning fit --ckpt_path={LAST}\n"
    )
    assert all(t.isfinite().all() for t in read_checkpoint(LAST)["state_dict"].values())


# --- disks ----------------------------------------------------------------------------------------


def limited(bytes_a_file: int):
    """In a child before it starts: no file may grow beyond this, as if the disk was full there."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))


def command(*argv, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gpt_lightning", *map(str, argv)],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        **settings,
    )


def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_old_checkpoint(here):
    before = {path: path.read_bytes() for path in (LAST, BEST)}
    size = min(map(len, before.values()))
    run = command(*ON, "--trainer.max_steps=8", preexec_fn=limited(size // 2))
    line = one_line(run.returncode, run.stderr)
    assert "best.ckpt could not be written (File too large). Step 4 is safe; go on with: " in line
    assert {path: path.read_bytes() for path in (LAST, BEST)} == before
    assert sorted(p.name for p in LAST.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    again = command(*shlex.split(line.partition("python -m gpt_lightning ")[2]),
                    "--trainer.max_steps=8")  # fmt: skip
    assert again.returncode == 0 and read_checkpoint(LAST)["global_step"] == 8


def test_a_save_into_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/last.ckpt could not be written \(File exists\)"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


# --- damaged files --------------------------------------------------------------------------------


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    path.write_bytes(raw)


def test_a_damaged_last_is_stepped_over_to_the_newest_whole_one(here, ends):
    assert ends(*ON, "--trainer.max_steps=6")[0] == 0
    older = LAST.with_name("older.ckpt")
    BEST.replace(older)
    assert ends(*ON, "--trainer.max_steps=9")[0] == 0
    BEST.write_bytes(older.read_bytes()[:5000])
    damage(LAST)
    torn = LAST.read_bytes()
    code, out, err = ends(*ON, "--trainer.max_steps=12")
    assert code == 0 and "12 (" in out
    step = read_checkpoint(older)["global_step"]
    assert err.count("\n") == 1
    assert f"{LAST} cannot be read: torn" in err and f"taking {older} (step {step})" in err
    assert read_checkpoint(LAST)["global_step"] == 12
    assert LAST.with_name("last-unreadable.ckpt").read_bytes() == torn  # not ours to throw away


def test_a_damaged_best_is_stepped_over_by_whoever_reads_it(here, ends):
    text = ends("generate", f"--ckpt_path={LAST}", "--max_new_tokens=20")[1]
    damage(BEST)
    for argv in (["validate", "--trainer.accelerator=cpu"], ["generate", "--max_new_tokens=20"]):
        code, out, err = ends(*argv)
        assert code == 0 and f"{BEST} cannot be read: torn" in err and f"taking {LAST}" in err
    assert out == text


def test_a_damaged_file_asked_for_by_name_is_refused_and_the_whole_one_named(here, ends):
    damage(LAST)
    for argv in (["fit", "--trainer.accelerator=cpu"], ["generate"]):
        code, _, err = ends(*argv, f"--ckpt_path={LAST}")
        assert f"{BEST} is whole (step " in one_line(code, err)


def test_where_all_are_damaged_that_is_said(here, ends):
    damage(LAST)
    damage(BEST)
    for argv in (ON, ["generate"]):
        code, _, err = ends(*argv)
        assert "cannot be read: torn" in one_line(code, err)


# --- two runs -------------------------------------------------------------------------------------


def test_a_run_that_another_process_is_training_is_left_alone(here, ends):
    before = {path: path.is_file() and path.read_bytes() for path in here.rglob("*")}
    other = os.open(LAST.parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    code, _, err = ends(*ON, "--trainer.max_steps=8")
    assert "another process is training in lightning_logs/version_0" in one_line(code, err)
    assert {path: path.is_file() and path.read_bytes() for path in here.rglob("*")} == before
    os.close(other)
    assert ends(*ON, "--trainer.max_steps=8")[0] == 0


def test_workers_do_not_hold_the_run_of_a_process_that_is_gone(tmp_path):
    keeper = BestAndLast()
    keeper.claim(tmp_path)
    ready, started = os.pipe()
    worker = os.fork()
    if not worker:
        os.write(started, b"!")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        with pytest.raises(ValueError, match="another process is training"):
            BestAndLast().claim(tmp_path)
        keeper.teardown(None, None, "fit")  # the process's end closes it too
        after = BestAndLast()
        after.claim(tmp_path)
        after.teardown(None, None, "fit")
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_two_new_runs_at_once_have_folders_of_their_own(here, ends, monkeypatch):
    real, first = TensorBoardLogger._get_next_version, iter([0])  # what the other one took just now
    monkeypatch.setattr(
        TensorBoardLogger, "_get_next_version", lambda self: next(first, None) or real(self)
    )
    before = {path: path.is_file() and path.read_bytes() for path in RUN.rglob("*")}
    code, out, _ = ends("fit", *TINY)
    assert code == 0 and "./lightning_logs/version_1 on cpu" in out
    assert {path: path.is_file() and path.read_bytes() for path in RUN.rglob("*")} == before


# --- time that is used up -------------------------------------------------------------------------


def test_max_time_saves_and_prints_the_command_that_goes_on_exactly(here, ends):
    flags = [*TINY, "--model.dropout=0.1", "--model.schedule=cosine"]
    code, out, _ = ends("fit", *flags, "--trainer.max_steps=100000", "--model.lr_decay_steps=600",
                        "--trainer.max_time=00:00:00:01")  # fmt: skip
    assert code == 0
    step = int(re.search(r"^steps +([\d,]+)", out, re.MULTILINE)[1].replace(",", ""))
    on = re.search(r"^go on with +python -m gpt_lightning (.+)$", out, re.MULTILINE)[1]
    assert 0 < step < 100000 and "lightning_logs/version_1/" in on
    assert ends(*shlex.split(on), f"--trainer.max_steps={step + 30}")[0] == 0
    assert (
        ends("fit", *flags, f"--trainer.max_steps={step + 30}", "--model.lr_decay_steps=600")[0]
        == 0
    )
    paths = [Path(f"lightning_logs/version_{n}/checkpoints/last.ckpt") for n in (1, 2)]
    one, two = (read_checkpoint(path) for path in paths)
    assert one["global_step"] == two["global_step"] == step + 30
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name


def test_memory_that_runs_out_is_told_with_what_takes_less():
    with pytest.raises(RuntimeError) as refused:  # torch's own words, whatever they are here
        torch.empty(1 << 50)
    for error in (refused.value, MemoryError()):
        line = fault(error, 1)
        assert line.startswith("out of memory: a smaller --data.batch_size") and "\n" not in line
    assert fault(RuntimeError("a mistake of ours"), 1) is None
