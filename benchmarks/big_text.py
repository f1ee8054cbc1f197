"""A text of gigabytes: its preparation, the order of its windows, a step beside a small text's."""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks import ours
from benchmarks.report import table
from gpt_lightning.data import windows
from gpt_lightning.data.playwright import write_play

PREPARE = """
import json, re, sys, time
from pathlib import Path
from gpt_lightning.data import corpora, tokens

def peak():  # of this process alone, in MB; getrusage's begins with that of the one it came from
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, start = peak(), time.perf_counter()
found = tokens.prepare_tokens(corpora.find_corpus(sys.argv[1]))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "memory": peak() - before, "tokens": len(found.open())}))
"""


def translated(line: str, turn: int) -> str:
    """A line in another alphabet: as it is, with umlauts and an emoji, in Chinese characters."""
    if turn == 1:
        return line.translate(str.maketrans("aouAOU", "äöüÄÖÜ")).replace("\n", " 😀\n")
    return line.translate({ord("a") + i: 0x4E00 + 7 * i for i in range(26)}) if turn else line


def repeat(path: Path, lines: list[str], size: int) -> None:
    """Write `lines` over and over, each time from another of them on, until there are `size` bytes.

    So the file has no period, though every line of it comes again.
    """
    rng = random.Random(1337)
    with path.open("wb") as file:
        while file.tell() < size:
            at = rng.randrange(len(lines))
            file.write("".join(lines[at:] + lines[:at]).encode())


def prepare(path: Path) -> dict:
    """Seconds and memory (MB above what the imports take) of a fresh process, and tokens found."""
    command = [sys.executable, "-c", PREPARE, str(path)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {**found, "mb_per_second": path.stat().st_size / 1e6 / found["seconds"]}


def prove_order(tokens: int, block_size: int, epoch: int) -> int:
    """The number of windows in an epoch, each of which was met once; ValueError if one was not.

    All are gone through: as many numbers as places, and every place taken.
    """
    train, _ = windows.split_spans(tokens, "tail", 0.1, block_size)
    source = windows.SlidingWindows(train, block_size, block_size, seed=1337)
    n, piece = len(source), 1 << 20
    met, phases = np.zeros(n, bool), set()
    for first in range(epoch * n, (epoch + 1) * n, piece):
        starts = source.starts(np.arange(first, min(first + piece, (epoch + 1) * n)))
        places, phase = np.divmod(starts, block_size)
        met[places] = True
        phases.update(np.unique(phase).tolist())
    if not met.all() or len(phases) != 1:
        raise ValueError(f"epoch {epoch} of {n:,} windows is no permutation of them")
    return n


def measure(gigabytes: float, rounds: int, steps: int):
    """Prepare an ASCII text and one in several alphabets, and train on the first and on 1 MB of it.

    Training is a bare `fit` of `steps` steps, by the command line, the two texts in turn. Texts and
    token files are made in the temporary folder ($TMPDIR), which takes four times `gigabytes`. They
    have just been written, so that the system holds of them in memory what it can.

    Returns:
        all figures, and a table of medians.
    """
    size = int(gigabytes * 1e9)
    lines = write_play(1337, min(10**7, size // 4))[0].splitlines(keepends=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, GPT_LIGHTNING_CACHE=str(Path(folder, "cache"))),
    ):
        small, big, mixed = (Path(folder, name) for name in ("small.txt", "big.txt", "mixed.txt"))
        small.write_text("".join(lines)[: 10**6])
        repeat(big, lines, size)
        repeat(mixed, [translated(line, i % 3) for i, line in enumerate(lines)], size)
        found = {"ascii": prepare(big), "again": prepare(big), "mixed": prepare(mixed)}
        print(found, flush=True)
        mixed.unlink()
        for epoch in range(2):
            found["windows"] = prove_order(found["ascii"]["tokens"], 128, epoch)
        flags = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        flags += ["--data.max_val_tokens=4097", "--sample.every_n_steps=0"]
        runs: dict[str, list[dict]] = {"small": [], "big": []}
        for turn in range(rounds + 1):  # the first is not counted
            for name in ("small", "big") if turn % 2 else ("big", "small"):
                path = Path(folder, f"{name}.txt")
                run = ours.fit(None, *flags, f"--data.corpus={path}")
                if turn:
                    runs[name].append(run)
    ms = {name: [run["training"] / run["steps"] * 1e3 for run in runs[name]] for name in runs}
    share = statistics.median(b / a for a, b in zip(ms["small"], ms["big"], strict=True))
    memory = {name: statistics.median(run["memory"] for run in runs[name]) for name in runs}
    rates = {
        name: f"{found[name]['mb_per_second']:,.0f} MB/s" for name in ("ascii", "again", "mixed")
    }
    most = max(found[name]["memory"] for name in ("ascii", "mixed"))
    rows = [
        [f"preparing {gigabytes:g} GB of ASCII", rates["ascii"]],
        ["the same in several alphabets", rates["mixed"]],
        ["finding it prepared", rates["again"]],
        ["peak memory of preparing, above the imports'", f"{most:,.0f} MB"],
        ["windows of an epoch, each met once", f"{found['windows']:,}"],
        ["a step on 1 MB", f"{statistics.median(ms['small']):.2f} ms"],
        [f"a step on {gigabytes:g} GB", f"{statistics.median(ms['big']):.2f} ms"],
        ["of the small text's", f"{share:.3f}"],
        ["peak memory of training on 1 MB", f"{memory['small']:,.0f} MB"],
        [f"on {gigabytes:g} GB, mapped pages included", f"{memory['big']:,.0f} MB"],
    ]
    figures = {"gigabytes": gigabytes, "steps": steps, "preparation": found, "runs": runs}
    return figures, table(["", ""], rows)
