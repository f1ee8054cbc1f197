"""A text of gigabytes: its preparation, and training steps on it and on a small text."""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from unittest.mock import patch

from benchmarks.common import ENVIRONMENT, columns, fit, markdown, median
from gpt_lightning.data.playwright import write_lines

PREPARE = """
import json, re, sys, time
from pathlib import Path
from gpt_lightning.data.corpus import find_corpus
from gpt_lightning.data.tokens import TokenizerSettings, prepare_tokens

def peak_memory():  # MB; getrusage's starts at that of the process which started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, start = peak_memory(), time.perf_counter()
tokens = prepare_tokens(find_corpus(sys.argv[1]), TokenizerSettings()).ids
seconds = time.perf_counter() - start
figures = {"seconds": seconds, "memory": peak_memory() - before, "tokens": len(tokens)}
print(json.dumps(figures))
"""


def add_arguments(parser):
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=300)


def write_text(path: Path, lines: list[str], size: int) -> None:
    """Write `size` bytes or a little more: `lines` again and again, each time rotated."""
    rng = random.Random(1337)
    with path.open("wb") as file:
        while file.tell() < size:
            at = rng.randrange(len(lines))
            file.write("".join(lines[at:] + lines[:at]).encode())


def other_alphabets(line: str, number: int) -> str:
    """Every third line as it is, with umlauts and an emoji, in Chinese characters."""
    if number % 3 == 0:
        return line
    if number % 3 == 1:
        return line.translate(str.maketrans("aouAOU", "äöüÄÖÜ")).replace("\n", " 😀\n")
    return line.translate({ord("a") + i: 0x4E00 + 7 * i for i in range(26)})


def prepare(path: Path, cache: str) -> dict:
    """Seconds and memory (MB above what imports take) of preparing a text in a new process."""
    environment = ENVIRONMENT | {"GPT_LIGHTNING_CACHE": cache}
    command = [sys.executable, "-c", PREPARE, str(path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)
    return {**figures, "mb_per_second": path.stat().st_size / 1e6 / figures["seconds"]}


def measure(args) -> tuple[dict, str]:
    """Needs four times `--gigabytes` in the temporary folder ($TMPDIR).

    The files have just been written, so the system's cache holds as much of them as it can.
    """
    size = int(args.gigabytes * 1e9)
    lines = [line for line, _ in islice(write_lines(1337), min(400_000, size // 100))]
    with tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder, "cache"))
        small, big, mixed = (Path(folder, name) for name in ("small.txt", "big.txt", "mixed.txt"))
        small.write_text("".join(lines)[: 10**6])
        write_text(big, lines, size)
        write_text(mixed, [other_alphabets(line, i) for i, line in enumerate(lines)], size)
        prepared = [prepare(path, cache) for path in (big, mixed, big)]
        print(prepared, flush=True)
        mixed.unlink()
        flags = [f"--trainer.max_steps={args.steps}", f"--trainer.val_check_interval={args.steps}"]
        flags += ["--data.max_val_tokens=4097", "--sample.every_n_steps=0"]
        runs: dict[str, list[dict]] = {"small": [], "big": []}
        with patch.dict(ENVIRONMENT, GPT_LIGHTNING_CACHE=cache):
            for turn in range(args.rounds + 1):  # the first one does not count
                for path in (small, big):
                    run = fit(*flags, f"--data.corpus={path}")
                    if turn > 0:
                        run["ms"] = run["training"] / run["steps"] * 1e3
                        runs[path.stem].append(run)
    return summarize(args, prepared, runs)


def summarize(args, prepared: list[dict], runs: dict[str, list[dict]]) -> tuple[dict, str]:
    first, mixed, again = prepared
    gb, on_small, on_big = f"{args.gigabytes:g} GB", runs["small"], runs["big"]
    pairs = zip(on_small, on_big, strict=True)
    ratio = statistics.median(b["ms"] / a["ms"] for a, b in pairs)
    memory = max(first["memory"], mixed["memory"])
    rows = [
        [f"preparing {gb} of ASCII", f"{first['mb_per_second']:,.0f} MB/s"],
        [f"preparing {gb} in several alphabets", f"{mixed['mb_per_second']:,.0f} MB/s"],
        ["finding it prepared", f"{again['mb_per_second']:,.0f} MB/s"],
        ["peak memory of preparing, above the imports", f"{memory:,.0f} MB"],
        ["a step on 1 MB", f"{median(on_small, 'ms'):.2f} ms"],
        [f"a step on {gb}", f"{median(on_big, 'ms'):.2f} ms"],
        ["median ratio of the steps", f"{ratio:.3f}"],
        ["peak memory of training on 1 MB", f"{median(on_small, 'memory'):,.0f} MB"],
        [f"on {gb}, mapped pages included", f"{median(on_big, 'memory'):,.0f} MB"],
    ]
    figures = {"gigabytes": args.gigabytes, "steps": args.steps}
    figures["preparing ASCII, several alphabets, again"] = columns(prepared)
    return {**figures, **{name: columns(r) for name, r in runs.items()}}, markdown(["", ""], rows)
