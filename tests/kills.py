"""Kills runs of the real command line at random moments, resumes them, and compares the results.

    python tests/kills.py --rounds 100 --in_saves 25 --seed 1 --jobs 2 --out kills.json

A chain is one run: started, killed, resumed and killed again a few times, then left to finish and
compared, bit by bit, with an uninterrupted run of the same settings: both checkpoints, every logged
series and sample, and what `generate` prints. The seed decides which signals are sent and when; how
far a run has come by then varies.

A kill counts as inside a save if the temporary file of that save is left when the process is dead
or, for a signal that is waited for, exists right before and right after the signal.
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
SIGNALS = {"SIGKILL": 10, "SIGTERM": 5, "SIGINT": 4, "SIGHUP": 1}  # with their weights in the draw


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


def temporaries(folder: Path) -> set[Path]:
    """The files that saves are writing, or were writing when they were killed."""
    return set((folder / CHECKPOINTS).glob(".*.tmp"))


# one kill


@dataclass
class Strike:
    """Which signal a run is sent, and when.

    Args:
        name: of the signal.
        in_save: count the delay from the start of the save, not from its end.
        saves: the number of the save, counted from the start of the process.
        delay: seconds.
    """

    name: str
    in_save: bool = False
    saves: int = 2
    delay: float = 0.0


def random_strike(draw: random.Random, saves_only: bool) -> Strike:
    in_save = saves_only or draw.random() < 0.5
    return Strike(
        draw.choices(list(SIGNALS), list(SIGNALS.values()))[0],
        in_save,
        saves=draw.randint(3, 18),  # after the first ones there is something to resume
        delay=draw.uniform(0, 0.006 if in_save else 0.15),  # a save, ten steps
    )


@dataclass
class Kill:
    """The result of a strike."""

    strike: Strike
    step: int = 0  # of last.ckpt after it
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
    for path in temporaries(folder):
        path.unlink()  # of the kill before, so that those seen are of this process
    step_before = last_step(folder)
    process = start(folder, *flags, log=log)
    wait_for_save(process, folder, strike.saves)
    while not strike.in_save and temporaries(folder) and process.poll() is None:
        time.sleep(0.0003)
    time.sleep(strike.delay)
    signum = signal.Signals[strike.name]
    if process.poll() is None:
        before = temporaries(folder)
        os.killpg(process.pid, signum)
        found.in_save = bool(before & temporaries(folder))
    try:
        found.code = process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        found.faults.append("hangs: 90 s after the signal")
        os.killpg(process.pid, signal.SIGKILL)
        found.code = process.wait()
    if signum == signal.SIGKILL:
        found.in_save = bool(temporaries(folder))
    elif left := temporaries(folder):
        found.faults.append(f"left over: {left}")
    found.faults += torn(folder)
    found.step = last_step(folder)
    found.finished = found.step == steps
    output = (folder / log).read_text(errors="replace")
    if not found.finished:
        found.faults += wrong_end(signum, found.code, output)
    if found.step < step_before:
        found.faults.append(f"lost: from step {step_before} back to {found.step}")
    if line := re.search(r"^Resume with: python -m gpt_lightning (.*)$", output, re.MULTILINE):
        found.resume = shlex.split(line[1])
    return found


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


def wrong_end(signum: signal.Signals, code: int, output: str) -> list[str]:
    """What is wrong with a killed run's exit code and output."""
    if signum == signal.SIGKILL:
        return [] if code == -signum else [f"exit: code {code} after SIGKILL"]
    faults = [] if code == 128 + signum else [f"exit: code {code} after {signum.name}"]
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


def last_step(folder: Path) -> int:
    """The step of last.ckpt; 0 if there is none yet."""
    exists = (folder / CHECKPOINTS / "last.ckpt").exists()
    return checkpoint(folder)["global_step"] if exists else 0


# one run


def chain(folder: Path, flags: list[str], strikes: Iterable[Strike]) -> list[Kill]:
    """A run that is killed, resumed at once and killed again, then left to finish.

    Faults of its end are among those of the last kill.
    """
    kills, command = [], flags
    steps = [int(flag.partition("=")[2]) for flag in flags if "max_steps=" in flag][-1]
    for strike in strikes:
        kills.append(kill(folder, command, strike, steps, log=f"{len(kills)}.txt"))
        if kills[-1].finished:
            break
        # every other time the command that was printed; SIGKILL leaves no time to print one
        command = kills[-1].resume if kills[-1].resume and len(kills) % 2 else RESUME
    last = kills[-1]
    if not last.finished:
        process = start(folder, *command, log="end.txt")
        if code := process.wait(timeout=300):
            words = (folder / "end.txt").read_text().strip().splitlines()[-1:]
            last.faults.append(f"lost: exit code {code} on resuming: {words}")
    files = {path.name for path in (folder / CHECKPOINTS).iterdir()}
    runs = {path.name for path in (folder / "lightning_logs").iterdir()}
    if clutter := files - {"best.ckpt", "last.ckpt", ".lock"} | runs - {"version_0"}:
        last.faults.append(f"left over: {sorted(clutter)}")
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
    add("--rounds", type=int, default=100, help="kills, at least")
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
            saves_only = sum(not one.finished for one in kills) >= args.rounds
            if saves_only and sum(one.in_save for one in kills) >= args.in_saves:
                return
            number = next(numbers)
            draw = random.Random(f"{args.seed}/{number}")
            precision, folder = draw.choice(PRECISIONS), work / f"chain_{number}"
            strikes = [random_strike(draw, saves_only) for _ in range(6)]
            found = chain(folder, [*FIT, f"--trainer.precision={precision}"], strikes)
            last = found[-1]
            if not any(fault.startswith("lost") for fault in last.faults):
                arrived = result(folder) | {"generate": generate(folder)}
                unlike = differences(expected[precision], arrived)
                last.faults += [f"differs: {difference}" for difference in unlike[:5]]
            for one in found:
                one.precision, one.chain = precision, number
                print(json.dumps(asdict(one)), flush=True)
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


def summarize(kills: list[Kill]) -> dict:
    killed = [one for one in kills if not one.finished]
    spoilt = {k.chain for k in kills if any(f.startswith(("lost", "differs")) for f in k.faults)}
    return {
        "kills": len(killed),
        "resumed bit-equal": sum(one.chain not in spoilt for one in killed),
        "in a save": sum(one.in_save for one in killed),
        "by signal": Counter(one.strike.name for one in killed),
        "by precision": Counter(one.precision for one in killed),
        "finished before the kill": len(kills) - len(killed),
        "runs": len({one.chain for one in kills}),
        "faults": Counter(fault.partition(":")[0] for one in kills for fault in one.faults),
    }


if __name__ == "__main__":
    sys.exit(main())
