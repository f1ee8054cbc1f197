"""Full disks, damaged files, two runs in one folder, time that is up: nothing good is lost."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from conftest import TINY

from gpt_lightning.checkpoint import read_checkpoint
from gpt_lightning.cli import main

RUN = Path("lightning_logs/version_0")
LAST, BEST = RUN / "checkpoints/last.ckpt", RUN / "checkpoints/best.ckpt"
RESUME = ("fit", "--ckpt_path=last", "--trainer.accelerator=cpu")


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def ends(capsys):
    """`ends(*argv)`: the command's exit code, and its stdout and stderr."""

    def run(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(map(str, argv)))
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


def one_line(code: int, err: str) -> str:
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    path.write_bytes(raw)


def files(folder: Path) -> dict[Path, bytes]:
    """Every file but locks."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in found}


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(here, ends):
    flags = ("--trainer.max_steps=60", "--checkpoint.every_n_train_steps=1", "--model.min_lr=1e30",
             "--model.learning_rate=1e30", "--model.muon_learning_rate=1e30")  # fmt: skip
    code, out, err = ends(*RESUME, *flags)
    saved = read_checkpoint(LAST)
    assert re.search(r"step \d has a loss of .* at a learning rate of 1e\+30", one_line(code, err))
    assert f"Step {saved['global_step']} is saved.\nResume with: " in out
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of Unix")
def test_a_full_disk_ends_the_run_and_leaves_the_old_checkpoint(here):
    import resource

    before = files(LAST.parent)
    limit = min(map(len, before.values())) // 2  # bytes that a file may have, as on a full disk
    run = subprocess.run(
        [sys.executable, "-m", "gpt_lightning", *RESUME, "--trainer.max_steps=8"],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    line = one_line(run.returncode, run.stderr)
    assert "best.ckpt could not be written" in line and "File too large" in line
    assert "Step 4 is saved.\nResume with: python -m gpt_lightning fit --ckpt_path=" in run.stdout
    assert files(LAST.parent) == before


def test_a_damaged_last_is_replaced_by_the_newest_intact_checkpoint(here, ends):
    damage(LAST)
    code, _, err = ends(*RESUME, "--trainer.max_steps=9")
    assert code == 0 and err.count("\n") == 1
    assert f"{LAST}: damaged" in err and f"using {BEST} (step 4)" in err
    assert read_checkpoint(LAST)["global_step"] == 9


def test_a_damaged_best_is_replaced_for_validate_and_generate_too(here, ends):
    damage(BEST)
    for argv in (["validate", "--trainer.accelerator=cpu"], ["generate", "--max_new_tokens=20"]):
        code, _, err = ends(*argv)
        assert code == 0 and f"{BEST}: damaged" in err and f"using {LAST}" in err


def test_a_run_that_another_process_trains_is_left_alone(here, ends):
    before = files(here)
    with filelock.FileLock(LAST.with_name(".lock")):
        code, _, err = ends(*RESUME, "--trainer.max_steps=8")
    assert f"another process trains in {RUN}" in one_line(code, err)
    assert files(here) == before


def test_max_time_prints_the_command_that_resumes_exactly(here, ends):
    flags = [*TINY, "--model.dropout=0.1", "--model.schedule=cosine", "--model.lr_decay_steps=600"]
    code, out, _ = ends("fit", *flags, "--trainer.max_steps=100000",
                        "--trainer.max_time=00:00:00:01")  # fmt: skip
    assert code == 0
    step = int(re.search(r"^steps +([\d,]+)", out, re.MULTILINE)[1].replace(",", ""))
    again = re.search(r"^resume +python -m gpt_lightning (.+)$", out, re.MULTILINE)[1]
    assert 0 < step < 100000 and "version_1" in again
    longer = f"--trainer.max_steps={step + 30}"
    assert ends(*shlex.split(again), longer)[0] == 0
    assert ends("fit", *flags, longer)[0] == 0
    paths = [Path(f"lightning_logs/version_{n}/checkpoints/last.ckpt") for n in (1, 2)]
    one, two = (read_checkpoint(path) for path in paths)
    assert one["global_step"] == two["global_step"] == step + 30
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
