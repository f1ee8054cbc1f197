"""Several processes: one that dies takes the others with it, and the run goes on with fewer."""

import os
import shutil
import signal
import sys
import time

import pytest
from kills import CHECKPOINTS, FIT, checkpoint, finish, left_behind, series, start

pytestmark = [
    pytest.mark.slow,  # each starts several real runs
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc"),
]

TWO = [*FIT, "--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=6",
       "--model.dropout=0", "--trainer.max_steps=100000", "--model.lr_decay_steps=100000",
       "--trainer.log_every_n_steps=5"]  # fmt: skip


def kill_one(folder, rank: int) -> tuple[int, str, float]:
    """Exit code of the main process, what was said, and how long the other one lived on."""
    process = start(folder, *TWO)
    last, deadline = folder / CHECKPOINTS / "last.ckpt", time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    (other,) = set(left_behind(process.pid, 0)) - {process.pid}
    os.kill(process.pid if rank == 0 else other, signal.SIGKILL)
    killed = time.monotonic()
    code = process.wait(timeout=60)
    assert left_behind(process.pid, 30) == []
    return code, (folder / "log.txt").read_text(), time.monotonic() - killed


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_is_killed_the_other_ends_with_a_line_that_says_how_to_go_on(
    rank, tmp_path
):
    code, said, seconds = kill_one(tmp_path, rank)
    step, path = checkpoint(tmp_path)["global_step"], CHECKPOINTS / "last.ckpt"
    assert code == (-signal.SIGKILL if rank == 0 else 2)
    assert said.splitlines()[-1] == (
        f"error: another process of this run has ended. Step {step} is safe; go on with: "
        f"python -m gpt_lightning fit --ckpt_path={path}"
    )
    assert "Traceback" not in said and seconds < 30
    if rank == 0:
        return
    # with one process and twice the batch it goes on as with two: the same windows
    one = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-one"))
    on = ["fit", f"--ckpt_path={path}", f"--trainer.max_steps={step + 30}"]
    finish(tmp_path, *on)
    finish(one, *on, "--trainer.devices=1", "--data.batch_size=12")
    curves = [series(folder) for folder in (tmp_path, one)]
    for tag, least in (("train/loss", 6), ("val/loss", 1)):
        ours, theirs = ([p for p in curve[tag] if p[0] > step] for curve in curves)
        assert [s for s, _ in ours] == [s for s, _ in theirs] and len(ours) >= least
        # see test_two_processes_with_half_the_batch_follow_one
        assert [v for _, v in ours] == pytest.approx([v for _, v in theirs], abs=5e-3)
