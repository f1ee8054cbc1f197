"""Kills runs of the real command line at random moments, resumes them, and compares the results.

    python tests/kills.py --rounds 100 --in_saves 25 --seed 1 --jobs 2

A chain is one run: started, killed, resumed and killed again a few times, then left to finish and
compared, bit by bit, with an uninterrupted run of the same settings: both checkpoints, every logged
series and sample. The seed decides which signals are sent and when; how far a run has come by then
varies. The first fault ends the test with an error.

A kill counts as inside a save if the temporary file of that save is left when the process is dead
or, for a signal that is waited for, exists right before and right after the signal.
"""

import argparse
import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = Path("lightning_logs/version_0/checkpoints")
STEPS = 600
FIT = [
    "fit",
    "--data.corpus=playwright:5:30000",
    "--data.block_size=16",
    "--data.batch_size=12",
    "--model.n_layer=2",
    "--model.n_head=2",
    "--model.n_embd=32",
    "--model.dropout=0.2",
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=30",
    "--trainer.accelerator=cpu",
    "--checkpoint.every_n_train_steps=10",
    "--sample.every_n_steps=100",
    "--sample.max_new_tokens=20",
]
RESUME = ["fit", "--ckpt_path=last"]
PRECISIONS = ("bf16-mixed", "32-true")
SIGNALS = {"SIGKILL": 10, "SIGTERM": 5, "SIGINT": 4, "SIGHUP": 1}  # with their weights in the draw


def start(folder: Path, *flags: str, log: str = "log.txt") -> subprocess.Popen:
    """`python -m gpt_lightning FLAGS` in `folder`, as the leader of a new process group."""
    folder.mkdir(exist_ok=True)
    with open(folder / log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "gpt_lightning", *flags],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def finish(folder: Path, *flags: str, log: str = "log.txt") -> None:
    """Run a command to its end, which must be a good one."""
    process = start(folder, *flags, log=log)
    assert process.wait(timeout=300) == 0, (folder / log).read_text()


def temporaries(folder: Path) -> set[Path]:
    """The files that saves are writing, or were writing when they were killed."""
    return set((folder / CHECKPOINTS).glob(".*.tmp"))


@dataclass
class Strike:
    """A signal that is sent `delay` seconds after save number `saves` of a process.

    With `in_save` the delay counts from the start of the save, otherwise from its end.
    """

    name: str
    in_save: bool = False
    saves: int = 2
    delay: float = 0.0


def random_strike(draw: random.Random) -> Strike:
    in_save = draw.random() < 0.5
    return Strike(
        draw.choices(list(SIGNALS), list(SIGNALS.values()))[0],
        in_save,
        saves=draw.randint(3, 18),  # after the first ones there is something to resume
        delay=draw.uniform(0, 0.006 if in_save else 0.15),  # a save, ten steps
    )


@dataclass
class Kill:
    """The result of a strike."""

    signal: str
    step: int  # of last.ckpt after it
    in_save: bool
    finished: bool  # the run ended before it was killed
    resume: list[str]  # the command that the run printed


def kill(folder: Path, flags: list[str], strike: Strike, steps: int, log: str) -> Kill:
    """Start or resume the run of so many steps in `folder`, strike, and look at what is left."""
    for path in temporaries(folder):
        path.unlink()  # of the kill before, so that those seen are of this process
    step_before, in_save, signum = last_step(folder), False, signal.Signals[strike.name]
    process = start(folder, *flags, log=log)
    wait_for_save(process, folder, strike.saves)
    while not strike.in_save and temporaries(folder) and process.poll() is None:
        time.sleep(0.0003)
    time.sleep(strike.delay)
    if process.poll() is None:
        before = temporaries(folder)
        os.killpg(process.pid, signum)
        in_save = bool(before & temporaries(folder))
    try:
        code = process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    left = temporaries(folder)
    if signum == signal.SIGKILL:
        in_save = bool(left)
    else:
        assert not left, left
    for path in (folder / CHECKPOINTS).glob("*.ckpt"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path
    step = last_step(folder)
    assert step >= step_before, folder
    output = (folder / log).read_text(errors="replace")
    if step < steps:
        assert code == (-signum if signum == signal.SIGKILL else 128 + signum), output
        if signum != signal.SIGKILL:
            words = ("\nResume with: ", "Stopping after this step", "Traceback")
            assert [output.count(word) for word in words] == [1, 1, 0], output
    line = re.search(r"^Resume with: python -m gpt_lightning (.*)$", output, re.MULTILINE)
    resume = shlex.split(line[1]) if line else []
    return Kill(strike.name, step, in_save, step == steps, resume)


def wait_for_save(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Wait until `count` saves have begun, or the process has ended."""
    before, deadline = set(), time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        now = temporaries(folder)
        count -= len(now - before)
        if count <= 0:
            return
        before = now
        time.sleep(0.0003)


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / CHECKPOINTS / f"{name}.ckpt", weights_only=True)


def last_step(folder: Path) -> int:
    """The step of last.ckpt; 0 if there is none yet."""
    exists = (folder / CHECKPOINTS / "last.ckpt").exists()
    return checkpoint(folder)["global_step"] if exists else 0


def chain(folder: Path, flags: list[str], strikes: Iterable[Strike]) -> list[Kill]:
    """A run that is killed, resumed at once and killed again, then left to finish."""
    kills, command = [], flags
    steps = [int(flag.partition("=")[2]) for flag in flags if "max_steps=" in flag][-1]
    for strike in strikes:
        kills.append(kill(folder, command, strike, steps, log=f"{len(kills)}.txt"))
        if kills[-1].finished:
            break
        # every other time the command that was printed; SIGKILL leaves no time to print one
        command = kills[-1].resume if kills[-1].resume and len(kills) % 2 else RESUME
    if not kills[-1].finished:
        finish(folder, *command, log="end.txt")
    assert [path.name for path in (folder / "lightning_logs").iterdir()] == ["version_0"]
    files = {path.name for path in (folder / CHECKPOINTS).iterdir()}
    assert files <= {"best.ckpt", "last.ckpt", ".lock"}, files
    return kills


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Where two nests of dicts, lists, tensors and plain values are not the same, bit by bit."""
    if type(a) is not type(b):
        return [f"{name}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, dict):
        odd = [f"{name}/{key} in one alone" for key in a.keys() ^ b.keys()]
        both = [key for key in a if key in b]
        return odd + [d for key in both for d in differences(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{name}: {len(a)} and {len(b)} of them"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (one, other) in pairs for d in differences(one, other, f"{name}/{i}")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [f"{name}: tensors differ"]
    return [] if a == b else [f"{name}: {a!r}, {b!r}"]


def series(folder: Path) -> dict[str, list[tuple]]:
    """Every series in a run's TensorBoard log: (step, value or text)."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resumed run
    # event_accumulator's shows a text twice that was logged before and after a kill
    events = EventAccumulator(str(folder / CHECKPOINTS.parent), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(e.step, make_ndarray(e.tensor_proto).tolist()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def result(folder: Path) -> dict[str, Any]:
    """What a run arrived at, without what depends on the time or on the number of restarts."""
    logged = series(folder)
    logged["speed/chars_per_second"] = [(s,) for s, _ in logged["speed/chars_per_second"]]
    apart = ("gpt_lightning", "loops")
    return {"TensorBoard": logged} | {
        f"{name}.ckpt": {k: v for k, v in checkpoint(folder, name).items() if k not in apart}
        for name in ("last", "best")
    }


def run_chain(folder: Path, draw: random.Random, expected: dict[str, dict]) -> list[Kill]:
    """A random chain, compared with the results that are expected of each precision."""
    precision = draw.choice(PRECISIONS)
    flags = [*FIT, f"--trainer.precision={precision}"]
    kills = chain(folder, flags, [random_strike(draw) for _ in range(6)])
    print(precision, *kills, sep="\n", flush=True)
    unlike = differences(expected[precision], result(folder))
    assert not unlike, unlike[:5]
    shutil.rmtree(folder)
    return [one for one in kills if not one.finished]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="kills, at least")
    parser.add_argument("--in_saves", type=int, default=25, help="of these in a save, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    for name in ("SIGINT", "SIGHUP"):  # a background job ignores them, and so would its children
        signal.signal(signal.Signals[name], signal.default_int_handler)
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ |= {"GPT_LIGHTNING_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    expected = {}
    for name in PRECISIONS:
        finish(work / name, *FIT, f"--trainer.precision={name}")
        expected[name] = result(work / name)
    kills: list[Kill] = []
    runs = in_saves = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        while len(kills) < args.rounds or in_saves < args.in_saves:
            numbers = range(runs, runs + args.jobs)
            draws = [random.Random(f"{args.seed}/{number}") for number in numbers]
            folders = [work / f"chain_{number}" for number in numbers]
            for found in pool.map(run_chain, folders, draws, [expected] * args.jobs):
                kills += found
            runs, in_saves = runs + args.jobs, sum(one.in_save for one in kills)
    print(f"{len(kills)} kills in {runs} runs, {in_saves} of them in a save: all bit-equal")
    print(
        dict(Counter(one.signal for one in kills)), f"seed {args.seed}, torch {torch.__version__}"
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
