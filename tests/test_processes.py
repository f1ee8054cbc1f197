"""A killed process ends the whole run, which resumes with any number of processes."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from kills import CHECKPOINTS, FIT, checkpoint, finish, series, start

pytestmark = [
    pytest.mark.slow,  # it starts several real runs
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc"),
]

TWO = [*FIT, "--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=6",
       "--model.dropout=0", "--trainer.max_steps=100000", "--model.lr_decay_steps=100000",
       "--trainer.log_every_n_steps=5"]  # fmt: skip


def processes_of(group: int) -> list[int]:
    """The processes of a process group, without those that have ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.parent.name, stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(rest[2]) == group and rest[0] != "Z":
            found.append(int(pid))
    return found


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_process_ends_the_run_and_one_process_continues_it(tmp_path):
    process = start(tmp_path, *TWO)
    wait_until((tmp_path / CHECKPOINTS / "last.ckpt").exists, 120)
    (other,) = set(processes_of(process.pid)) - {process.pid}
    os.kill(other, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    wait_until(lambda: not processes_of(process.pid), 30)
    step = checkpoint(tmp_path)["global_step"]
    finish(
        tmp_path,
        "fit",
        "--ckpt_path=last",
        f"--trainer.max_steps={step + 30}",
        "--trainer.devices=1",
        "--data.batch_size=12",  # the same windows as two processes with half of it each
    )
    losses = dict(series(tmp_path)["loss/train"])
    assert [s for s in losses if s > step] == list(range(step + 5, step + 31, 5))
    assert checkpoint(tmp_path)["global_step"] == step + 30
