"""Kills runs of the real command line at random moments, resumes them, and compares the results.

    python tests/kills.py --rounds 100 --in_saves 25 --seed 1 --jobs 2 --out kills.json

A chain is one run: started, killed, resumed and killed again a few times, then left to finish and
compared, bit by bit, with an uninterrupted run of the same settings: both checkpoints, every logged
series and sample, and what `generate` prints. The seed decides which signals are sent and when; how
far a run has come by then varies.

A kill counts as inside a save only if the temporary file of that save still exists when the process
is dead or, for a signal that is waited for, if it existed right before and right after the signal.
"""

import argparse
import contextlib
import itertools
import json
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
from dataclasses import asdict, dataclass, field
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
SIGNALS = {  # what is sent, one after the other: its weight in the draw
    ("SIGKILL",): 10,
    ("SIGTERM",): 4,
    ("SIGINT",): 4,
    ("SIGHUP",): 1,
    ("SIGINT", "SIGINT"): 1,
    ("SIGTERM", "SIGKILL"): 1,
}


# one process


def start(folder: Path, *flags: str, log: str = "log.txt") -> subprocess.Popen:
    """`python -m gpt_lightning FLAGS` in `folder`, as the leader of a new process group."""
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with open(folder / log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "gpt_lightning", *flags],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def finish(folder: Path, *flags: str, log: str = "log.txt") -> None:
    """Run a command to its end, which must be a good one."""
    process = start(folder, *flags, log=log)
    assert process.wait(timeout=300) == 0, (folder / log).read_text()


def temporaries(folder: Path) -> dict[str, int]:
    """The files that saves are writing, or were when they were killed: name to time of change."""
    found = {}
    for path in (folder / CHECKPOINTS).glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # the save has just ended
            found[path.name] = path.stat().st_mtime_ns
    return found


# one kill


@dataclass
class Strike:
    """Which signals a run is sent, and when.

    Args:
        signals: their names, in order.
        where: `start` (so long after the start of the process), `save` (after the start of a save)
            or `training` (after its end).
        saves: the number of the save, counted from the start of the process.
        delay: seconds from there.
        pause: seconds from the first signal to the second.
    """

    signals: tuple[str, ...]
    where: str = "training"
    saves: int = 1
    delay: float = 0.0
    pause: float = 0.0


def random_strike(draw: random.Random, saves_only: bool, first: bool) -> Strike:
    """A strike, but not in a run's first start: after that there is nothing to resume."""
    signals = draw.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    where = draw.choices(["save", "training", "start"], [5, 4, 0 if first else 1])[0]
    where = "save" if saves_only else where
    longest = {"save": 0.006, "training": 0.15, "start": 6.0}[where]  # a save, ten steps, a start
    return Strike(
        signals,
        where,
        saves=draw.randint(1, 18),
        delay=draw.uniform(0, longest),
        pause=draw.uniform(0, 0.05),
    )


@dataclass
class Kill:
    """The result of a strike."""

    strike: Strike
    step: int | None = None  # of last.ckpt after it; None if there is none yet
    in_save: bool = False
    code: int | None = None
    finished: bool = False  # the run ended before it was killed
    faults: list[str] = field(default_factory=list)
    resume: list[str] = field(default_factory=list)  # the command that the run printed
    precision: str = ""
    chain: int = 0


def kill(folder: Path, flags: list[str], strike: Strike, steps: int, log: str) -> Kill:
    """Start or resume the run of so many steps in `folder`, strike, and look at what is left."""
    found = Kill(strike)
    left, step_before = temporaries(folder), last_step(folder)
    process = start(folder, *flags, log=log)

    def saving() -> set[str]:
        """Names of the files that this process is writing."""
        return {name for name, when in temporaries(folder).items() if left.get(name) != when}

    if strike.where != "start":
        wait_for_save(process, saving, strike.saves)
        while strike.where == "training" and saving() and process.poll() is None:
            time.sleep(0.0003)
    time.sleep(strike.delay)
    if process.poll() is None:
        for number, name in enumerate(strike.signals):
            time.sleep(strike.pause if number else 0)
            before = saving()
            try:
                os.killpg(process.pid, signal.Signals[name])
            except ProcessLookupError:
                break
            if number == 0:
                found.in_save = bool(before & saving())
    elif process.returncode:
        found.faults.append("lost: ended before it was killed")
    try:
        found.code = process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        found.faults.append("hangs: 90 s after the signal")
        os.killpg(process.pid, signal.SIGKILL)
        found.code = process.wait()
    if found.code == -signal.SIGKILL:
        found.in_save = bool(saving())
    found.faults += torn(folder)
    found.step = last_step(folder)
    found.finished = found.step == steps
    output = (folder / log).read_text(errors="replace")
    if not found.finished:
        found.faults += wrong_end(found, output)
        if saving() and found.code != -signal.SIGKILL and len(strike.signals) == 1:
            found.faults.append(f"left over: {saving()}")
    if (found.step or 0) < (step_before or 0):
        found.faults.append(f"lost: from step {step_before} back to {found.step}")
    if line := re.search(r"^Resume with: python -m gpt_lightning (.*)$", output, re.MULTILINE):
        found.resume = shlex.split(line[1])
    return found


def wait_for_save(process: subprocess.Popen, saving, count: int) -> None:
    """Wait until `count` saves have begun, or the process has ended."""
    before, deadline = set(), time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        now = saving()
        count -= len(now - before)
        if count <= 0:
            return
        before = now
        time.sleep(0.0003)


def wrong_end(found: Kill, output: str) -> list[str]:
    """What is wrong with a killed run's exit code and output."""
    strike, faults = found.strike, []
    first = signal.Signals[strike.signals[0]]
    alone = len(strike.signals) == 1 and strike.where != "start"
    graceful = {128 + first} - {128 + signal.SIGKILL}
    # before training starts, and at the second signal, the process may die of the signal itself
    allowed = (
        graceful if alone and graceful else graceful | {-signal.Signals[n] for n in strike.signals}
    )
    if "Fatal Python error: init" in output:  # the interpreter's own start
        allowed = {1}
    if found.code not in allowed:
        last = (output.strip() or "no output").splitlines()[-1]
        faults.append(f"exit: code {found.code} in place of {sorted(map(int, allowed))}: {last}")
    if alone and graceful:
        for words in ("\nResume with: ", "Stopping after this step"):
            if output.count(words) != 1:
                faults.append(f"output: {words.strip()!r} {output.count(words)} times")
        if "Traceback" in output:
            faults.append("output: a traceback")
    return faults


def torn(folder: Path) -> list[str]:
    """The checkpoints that are not complete, by their own checksums and by torch."""
    faults = []
    for path in (folder / CHECKPOINTS).glob("*.ckpt"):
        try:
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
            torch.load(path, weights_only=True)
        except Exception as error:
            faults.append(f"torn: {path.name} ({type(error).__name__}: {error})")
    return faults


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / CHECKPOINTS / f"{name}.ckpt", weights_only=True)


def last_step(folder: Path) -> int | None:
    exists = (folder / CHECKPOINTS / "last.ckpt").exists()
    return checkpoint(folder)["global_step"] if exists else None


# one run


def chain(folder: Path, flags: list[str], strikes: Iterable[Strike]) -> list[Kill]:
    """A run that is killed, resumed at once and killed again, then left to finish.

    Faults of its end are among those of the last kill.
    """
    kills, command = [], flags
    steps = [int(flag.partition("=")[2]) for flag in flags if "max_steps=" in flag][-1]
    for strike in strikes:
        found = kill(folder, command, strike, steps, log=f"{len(kills)}.txt")
        kills.append(found)
        if found.finished:
            break
        # every other time the command that was printed; SIGKILL leaves no time to print one
        command = found.resume if found.resume and len(kills) % 2 else RESUME
        if found.step is None:  # killed before there was anything to resume
            shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
            command = flags
    last = kills[-1]
    if not last.finished:
        process = start(folder, *command, log="end.txt")
        if code := process.wait(timeout=300):
            words = (folder / "end.txt").read_text().strip().splitlines()[-1:]
            last.faults.append(f"lost: exit code {code} on resuming: {words}")
    files = {path.name for path in (folder / CHECKPOINTS).iterdir()}
    if clutter := sorted(files - {"best.ckpt", "last.ckpt", ".lock"}):
        last.faults.append(f"left over: {clutter}")
    runs = sorted(path.name for path in (folder / "lightning_logs").iterdir())
    if runs != ["version_0"]:
        last.faults.append(f"left over: {runs}")
    return kills


# comparing two runs


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


def generate(folder: Path) -> str:
    """What `generate` prints from a run's last checkpoint."""
    flags = [f"--ckpt_path={CHECKPOINTS / 'last.ckpt'}", "--max_new_tokens=60", "--temperature=1"]
    finish(folder, "generate", *flags, log="generated.txt")
    return (folder / "generated.txt").read_text()


# many runs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=100, help="kills after a first checkpoint, at least")
    add("--in_saves", type=int, default=25, help="of these inside a save, at least")
    add("--seed", type=int, default=1)
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--out", type=Path, help="JSON of every kill")
    args = parser.parse_args()
    for name in ("SIGINT", "SIGHUP"):  # a background job ignores them, and so would its children
        signal.signal(signal.Signals[name], signal.default_int_handler)
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ |= {"GPT_LIGHTNING_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    expected = {}
    for name in PRECISIONS:
        finish(work / name, *FIT, f"--trainer.precision={name}")
        expected[name] = result(work / name) | {"generate": generate(work / name)}
    print(f"seed {args.seed}, {args.jobs} jobs, in {work}", flush=True)
    kills: list[Kill] = []
    numbers = itertools.count()

    def run_chains() -> None:
        while True:
            counted = [one for one in kills if counts(one)]
            saves_only = len(counted) >= args.rounds
            if saves_only and sum(one.in_save for one in counted) >= args.in_saves:
                return
            number = next(numbers)
            draw = random.Random(f"{args.seed}/{number}")
            precision, folder = draw.choice(PRECISIONS), work / f"chain_{number}"
            strikes = [random_strike(draw, saves_only, first=i == 0) for i in range(6)]
            found = chain(folder, [*FIT, f"--trainer.precision={precision}"], strikes)
            last = found[-1]
            if not any(fault.startswith("lost") for fault in last.faults):
                arrived = result(folder) | {"generate": generate(folder)}
                unlike = differences(expected[precision], arrived)
                last.faults += [f"differs: {difference}" for difference in unlike[:5]]
            for one in found:
                one.precision, one.chain = precision, number
                print(line(one), flush=True)
            kills.extend(found)
            if not any(one.faults for one in found):
                shutil.rmtree(folder)

    with ThreadPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(run_chains) for _ in range(args.jobs)]:
            job.result()
    minutes = round((time.monotonic() - began) / 60, 1)
    summary = summarize(kills) | {"seed": args.seed, "minutes": minutes, "torch": torch.__version__}
    print(json.dumps(summary, indent=1))
    if args.out:
        record = {"summary": summary, "kills": [asdict(one) for one in kills]}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if summary["faults"]:
        print(f"kept: {work}")
        return 1
    shutil.rmtree(work)
    return 0


def counts(one: Kill) -> bool:
    """Whether a kill is one of the number asked for: there was something to resume."""
    return one.step is not None and not one.finished


def line(one: Kill) -> str:
    where = "in a save" if one.in_save else one.strike.where.replace("save", "by a save")
    step = "no checkpoint" if one.step is None else f"step {one.step}"
    end = "finished" if one.finished else f"exit {one.code}"
    names = " ".join(one.strike.signals)
    parts = [f"{one.chain:3}", f"{names:<15}", f"{where:<9}", f"{step:<13}", f"{one.precision:<10}"]
    return "  ".join([*parts, end, *one.faults])


def summarize(kills: list[Kill]) -> dict:
    counted = [one for one in kills if counts(one)]
    spoilt = {k.chain for k in kills if any(f.startswith(("lost", "differs")) for f in k.faults)}
    return {
        "kills": len(counted),
        "resumed bit-equal": sum(one.chain not in spoilt for one in counted),
        "in a save": sum(one.in_save for one in counted),
        "in a save, by signal": Counter(" ".join(k.strike.signals) for k in counted if k.in_save),
        "by signal": Counter(" ".join(one.strike.signals) for one in counted),
        "by moment": Counter(one.strike.where for one in counted),
        "by precision": Counter(one.precision for one in counted),
        "before the first checkpoint": sum(one.step is None for one in kills),
        "finished before the kill": sum(one.finished for one in kills),
        "runs": len({one.chain for one in kills}),
        "faults": Counter(fault.partition(":")[0] for one in kills for fault in one.faults),
    }


if __name__ == "__main__":
    sys.exit(main())
