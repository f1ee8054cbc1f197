"""Kills runs of the real command line at random moments, resumes them, compares what they become.

    python tests/kills.py --rounds 200 --in_saves 50 --seed 1 --jobs 2 --out kills.json

A chain is one run: started, killed, resumed and killed again a few times, then left to end and
compared, bit by bit, with a run of the same settings that nobody touched: both checkpoints, every
logged series and sample, and what `generate` writes. What the signals are, where they fall and whom
they reach follows from the seed; how far a run has come by then does not.

Where a kill fell is known by evidence: it counts as inside a save only if the temporary file of
that save is still there when the process is dead, or, for a signal that is waited for, if it was
there right before and right after the signal was sent.
"""

import argparse
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
from collections.abc import Iterator
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
SIGNALS = {  # what is sent, in turn: how often
    ("SIGKILL",): 10,
    ("SIGTERM",): 4,
    ("SIGINT",): 4,
    ("SIGINT", "SIGINT"): 1,
    ("SIGTERM", "SIGKILL"): 1,
}


# one process


def start(folder: Path, *flags: str, log: str = "log.txt") -> subprocess.Popen:
    """`python -m gpt_lightning FLAGS` in `folder`, in a session of its own, so that a signal to its
    group reaches workers and ranks, and nobody else."""
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


def temporaries(folder: Path) -> set[str]:
    """Names of the files that saves are writing, or were when they were killed."""
    try:
        return {name for name in os.listdir(folder / CHECKPOINTS) if name.endswith(".tmp")}
    except FileNotFoundError:
        return set()


def left_behind(session: int, seconds: float = 20.0) -> list[int]:
    """The processes of a session that still live after so long. Where there is no /proc: none."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):  # it ended just now
                continue
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


# one kill


@dataclass
class Strike:
    """What is sent to a run, to whom, and when.

    Args:
        signals: their names, in turn.
        where: `start` (before the first step, counted from the start of the process), `training`,
            `save`.
        saves: strike at the so manieth save that begins (`save`), or after it (`training`).
        delay: seconds from there.
        pause: seconds from the first signal to the second.
        group: as Ctrl-C and a shutdown do, to workers too; or to the main process alone.
    """

    signals: tuple[str, ...]
    where: str = "training"
    saves: int = 1
    delay: float = 0.0
    pause: float = 0.0
    group: bool = True


def any_strike(dice: random.Random, saves_only: bool, first: bool) -> Strike:
    """A random one; not in the first start-up, after which there is nothing to resume."""
    signals = dice.choices(list(SIGNALS), SIGNALS.values())[0]
    where = dice.choices(["save", "training", "start"], [5, 4, 0 if first else 1])[0]
    where = "save" if saves_only else where
    longest = {"save": 0.006, "training": 0.15, "start": 6.0}[where]  # a save, ten steps, a start
    return Strike(
        signals,
        where,
        saves=dice.randint(1, 18),
        delay=dice.uniform(0, longest),
        pause=dice.uniform(0, 0.05),
        group=dice.random() < 0.5,
    )


@dataclass
class Kill:
    """What came of a strike."""

    strike: Strike
    step: int | None = None  # of last.ckpt after it; None if there is none yet
    in_save: bool = False
    code: int | None = None
    ended: bool = False  # the run was quicker
    faults: list[str] = field(default_factory=list)
    resume: list[str] = field(default_factory=list)  # the command that the run said goes on
    session: int = 0
    case: str = ""
    chain: int = 0


def kill(folder: Path, how: list[str], strike: Strike, steps: int, log: str) -> Kill:
    """Start or resume the run of so many steps in `folder`, strike, and look at what is left."""
    found = Kill(strike)
    old, step_before = temporaries(folder), last_step(folder)
    process = start(folder, *how, log=log)
    found.session = process.pid
    saving = None
    if strike.where == "start":
        time.sleep(strike.delay)
    else:
        saving = wait_for_save(process, folder, old, strike.saves)
        if saving and strike.where == "training":
            while (folder / CHECKPOINTS / saving).exists():
                time.sleep(0.0003)
        time.sleep(strike.delay)
        if saving and old & temporaries(folder):
            found.faults.append(f"orphans: {old & temporaries(folder)}")
    if process.poll() is None:
        send(process, strike, found, folder / CHECKPOINTS / saving if saving else None)
    elif process.returncode:
        found.faults.append("lost: ended before it was killed")
    try:
        found.code = process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        found.faults.append("hangs: 90 s after the signal")
        os.killpg(process.pid, signal.SIGKILL)
        found.code = process.wait()
    new = temporaries(folder) - old
    if strike.signals[-1] == "SIGKILL" and found.code == -signal.SIGKILL:
        found.in_save = bool(new)
    found.faults += torn(folder)
    found.step = last_step(folder)
    found.ended = found.step == steps
    said = (folder / log).read_text(errors="replace")
    if not found.ended:
        found.faults += wrong_end(found, said, new)
    if (found.step or 0) < (step_before or 0):
        found.faults.append(f"lost: from step {step_before} back to {found.step}")
    if line := re.search(r"^Go on with: python -m gpt_lightning (.*)$", said, re.MULTILINE):
        found.resume = shlex.split(line[1])
    return found


def wait_for_save(process, folder: Path, old: set[str], count: int) -> str | None:
    """Wait until `count` saves have begun; the file that the last one writes. None if the run ends
    before."""
    seen, deadline = set(old), time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        new = temporaries(folder) - seen
        count -= len(new)
        if new and count <= 0:
            return new.pop()
        seen |= new
        time.sleep(0.0003)
    return None


def send(process, strike: Strike, found: Kill, saving: Path | None) -> None:
    """Send the signals, and note whether a save was going on right before and after the first."""
    for n, name in enumerate(strike.signals):
        if n:
            time.sleep(strike.pause)
        before = saving is not None and saving.exists()
        try:
            if strike.group:
                os.killpg(process.pid, signal.Signals[name])
            else:
                os.kill(process.pid, signal.Signals[name])
        except ProcessLookupError:
            return
        if n == 0:
            found.in_save = before and saving.exists()


def wrong_end(found: Kill, said: str, new: set[str]) -> list[str]:
    """What is wrong with a killed run's exit code and last words."""
    strike, faults = found.strike, []
    first = signal.Signals[strike.signals[0]]
    killed = "SIGKILL" in strike.signals
    graceful = {128 + first} if first != signal.SIGKILL else set()
    if strike.where == "start" or len(strike.signals) > 1:
        allowed = graceful | {-first} | ({-signal.SIGKILL} if killed else set())
    else:
        allowed = graceful or {-signal.SIGKILL}
    if "Fatal Python error: init" in said:  # the interpreter's own start, before there is a command
        allowed = {1}
    if found.code not in allowed:
        last = (said.strip() or "nothing said").splitlines()[-1]
        faults.append(f"exit: code {found.code} in place of {sorted(map(int, allowed))}: {last}")
    if found.code in graceful and strike.where != "start" and len(strike.signals) == 1:
        if said.count("\nGo on with: ") != 1:
            faults.append("words: no line says how to go on")
        if said.count("Stopping after this step") != 1:
            faults.append(f"words: 'Stopping' {said.count('Stopping after this step')} times")
    # who cuts short the end itself may see one: of a worker left alone, of Python's cleaning up
    if "Traceback" in said and strike.where != "start" and len(strike.signals) == 1 and not killed:
        faults.append("words: a traceback")
    if new and found.code in graceful:
        faults.append(f"orphans: {new} of a run that ended by itself")
    return faults


def torn(folder: Path) -> list[str]:
    """The checkpoints that are not whole, by their own checksums and by torch."""
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
    return (
        checkpoint(folder)["global_step"] if (folder / CHECKPOINTS / "last.ckpt").exists() else None
    )


# one run


def chain(folder: Path, flags: list[str], strikes: Iterator[Strike] | list[Strike]) -> list[Kill]:
    """A run that is struck, resumed at once and struck again, then left to end.

    The last kill's faults are those of the end too.
    """
    kills, how = [], flags
    steps = [int(flag.partition("=")[2]) for flag in flags if "max_steps=" in flag][-1]
    for strike in strikes:
        found = kill(folder, how, strike, steps, log=f"{len(kills)}.txt")
        kills.append(found)
        if found.ended:
            break
        # every other time the command that was printed; what dies unheard prints none
        how = found.resume if found.resume and len(kills) % 2 else RESUME
        if found.step is None:  # killed before there was anything to resume
            shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
            how = flags
    last = kills[-1]
    if not last.ended:
        process = start(folder, *how, log="end.txt")
        if code := process.wait(timeout=300):
            words = (folder / "end.txt").read_text().strip().splitlines()[-1:]
            last.faults.append(f"lost: exit code {code} on resuming: {words}")
    if left := temporaries(folder):
        last.faults.append(f"orphans: {left} at the end")
    files = {path.name for path in (folder / CHECKPOINTS).iterdir()} - {"best.ckpt", "last.ckpt"}
    if clutter := sorted(files - left):
        last.faults.append(f"clutter: {clutter}")
    runs = sorted(path.name for path in (folder / "lightning_logs").iterdir())
    if runs != ["version_0"]:
        last.faults.append(f"clutter: {runs}")
    for one in kills:  # a loader's worker looks every five seconds whether its run still lives
        if left := left_behind(one.session):
            one.faults.append(f"processes: {left} live on")
            os.killpg(one.session, signal.SIGKILL)
    return kills


# what became of it


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


def state(folder: Path, name: str) -> dict:
    """All of a checkpoint that a run comes to: not how often it was started, nor its workers."""
    apart = ("datamodule_hyper_parameters", "gpt_lightning", "loops")
    return {key: value for key, value in checkpoint(folder, name).items() if key not in apart}


def series(folder: Path) -> dict[str, list[tuple]]:
    """Every series in a run's TensorBoard log: (step, value or text)."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # each resumed run is worth a warning
    # not event_accumulator's, which shows a text twice that was written before and after a kill
    events = EventAccumulator(str(folder / CHECKPOINTS.parent), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(e.step, make_ndarray(e.tensor_proto).tolist()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def curves(folder: Path) -> dict[str, list[tuple]]:
    """What of `series` is the same on every day: of the speed its steps alone."""
    found = series(folder)
    found["chars_per_second"] = [(step,) for step, _ in found["chars_per_second"]]
    return found


def unequal(one: Path, other: Path) -> list[str]:
    """Where two runs that ended are not the same."""
    found = [
        f"{name}.ckpt{difference}"
        for name in ("last", "best")
        for difference in differences(state(one, name), state(other, name))
    ]
    return found + differences(curves(one), curves(other), "TensorBoard")


def generate(folder: Path) -> str:
    """What `generate` writes from a run's last checkpoint."""
    flags = [f"--ckpt_path={CHECKPOINTS / 'last.ckpt'}", "--max_new_tokens=60", "--temperature=1"]
    finish(folder, "generate", *flags, log="generated.txt")
    return (folder / "generated.txt").read_text()


# many runs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=200, help="kills after a first checkpoint, at least")
    add("--in_saves", type=int, default=50, help="of these inside a save, at least")
    add("--seed", type=int, default=1)
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--out", type=Path, help="JSON of every kill")
    args = parser.parse_args()
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ |= {"GPT_LIGHTNING_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    whole = {name: work / f"whole_{name}" for name in PRECISIONS}
    texts = {}
    for name, folder in whole.items():
        finish(folder, *FIT, f"--trainer.precision={name}")
        texts[name] = generate(folder)
    print(f"seed {args.seed}, {args.jobs} jobs, in {work}", flush=True)

    kills: list[Kill] = []
    numbers = itertools.count()

    def wanted() -> bool:
        counted = [k for k in kills if counts(k)]
        return len(counted) < args.rounds or sum(k.in_save for k in counted) < args.in_saves

    def work_off() -> None:
        while wanted():
            number = next(numbers)
            dice = random.Random(f"{args.seed}/{number}")
            workers, precision = dice.choice((0, 2)), dice.choice(PRECISIONS)
            folder = work / f"chain_{number}"
            flags = [*FIT, f"--trainer.precision={precision}", f"--data.num_workers={workers}"]
            saves_only = sum(counts(k) for k in kills) >= args.rounds
            strikes = [any_strike(dice, saves_only, first=i == 0) for i in range(6)]
            found = chain(folder, flags, strikes)
            last = found[-1]
            if not any(fault.startswith("lost") for fault in last.faults):
                unlike = unequal(whole[precision], folder)
                last.faults += [f"differs: {difference}" for difference in unlike[:5]]
                if generate(folder) != texts[precision]:
                    last.faults.append("differs: what generate writes")
            for one in found:
                one.case, one.chain = f"{workers} workers, {precision}", number
                print(line(one), flush=True)
            kills.extend(found)
            if not any(one.faults for one in found):
                shutil.rmtree(folder)

    with ThreadPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(work_off) for _ in range(args.jobs)]:
            job.result()
    summary = summarise(kills) | {
        "seed": args.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "torch": torch.__version__,
    }
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
    return one.step is not None and not one.ended


def line(one: Kill) -> str:
    where = "in a save" if one.in_save else one.strike.where.replace("save", "by a save")
    to = "group" if one.strike.group else "process"
    step = "no checkpoint" if one.step is None else f"step {one.step}"
    names = " ".join(one.strike.signals)
    return "  ".join(
        [f"{one.chain:3}", f"{names:<15}", f"{to:<7}", f"{where:<9}", f"{step:<13}", one.case]
        + ["ended" if one.ended else f"exit {one.code}", *one.faults]
    )


def summarise(kills: list[Kill]) -> dict:
    """Counts, for the record."""
    counted = [one for one in kills if counts(one)]
    spoilt = {k.chain for k in kills if any(f.startswith(("lost", "differs")) for f in k.faults)}
    return {
        "kills": len(counted),
        "resumed bit-equal": sum(one.chain not in spoilt for one in counted),
        "in a save": sum(one.in_save for one in counted),
        "in a save, by signal": Counter(" ".join(k.strike.signals) for k in counted if k.in_save),
        "by signal": Counter(" ".join(one.strike.signals) for one in counted),
        "by moment": Counter(one.strike.where for one in counted),
        "by case": Counter(one.case for one in counted),
        "to the group": sum(one.strike.group for one in counted),
        "before the first checkpoint": sum(one.step is None for one in kills),
        "the run was quicker": sum(one.ended for one in kills),
        "runs": len({one.chain for one in kills}),
        "faults": Counter(fault.partition(":")[0] for one in kills for fault in one.faults),
    }


if __name__ == "__main__":
    sys.exit(main())
