"""What the benchmarks share: a run of `fit`, tables, and result files."""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}  # processes find this project in any folder


def fit(*flags: str) -> dict:
    """Run `python -m gpt_lightning fit` in an empty folder, as a user does.

    Returns:
        `loss` (exact validation loss of the last step, nats per character), `training` (seconds of
        the steps alone), `steps`, `chars_per_second` (of the steps alone; nan if tokens are not
        characters), `vocabulary`, `parameters`, `command` (seconds of the whole command), `memory`
        (peak of its process, MB).

    Raises:
        SystemExit: if the command fails; its own message is on stderr.
    """
    command = [sys.executable, "-m", "gpt_lightning", "fit", *flags]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "output"), "w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)  # with the memory of this process alone
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    sizes = re.search(r"vocabulary (\d+)\n(?s:.*?) ([\d,]+) parameters\n", printed)
    return read_closing_table(printed) | {
        "vocabulary": int(sizes[1]),
        "parameters": int(sizes[2].replace(",", "")),
        "command": seconds,
        "memory": usage.ru_maxrss / 1024,
    }


def read_closing_table(output: str) -> dict:
    """The figures of the table that `fit` prints at its end."""
    table = output[output.rindex("\nsteps  ") :]  # a sample's text comes before it
    rows = dict(re.findall(r"^([a-z][a-z ]+?)  +(\d[\d.,]*)", table, re.MULTILINE))
    number = {name: float(text.replace(",", "")) for name, text in rows.items()}
    return {
        "loss": number["final val loss"],
        "training": number["training alone"],
        "steps": int(number["steps"]),
        "chars_per_second": number.get("characters seen", math.nan) / number["training alone"],
    }


def median(runs: list[dict], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def columns(runs: list[dict]) -> dict[str, list]:
    """The figures of several runs by name, rounded to five digits, for a result file."""
    return {name: [round_figure(run[name]) for run in runs] for name in runs[0]}


def round_figure(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. All columns but the first are aligned right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine() -> dict:
    """Processor, cores, torch, date and commit that a result belongs to."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }


def write_results(folder: Path, name: str, figures: dict, table: str) -> None:
    """Write NAME.json and NAME.md, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **figures}, indent=1)
    # lists of figures in one line each
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    (folder / f"{name}.json").write_text(text + "\n")
    (folder / f"{name}.md").write_text(table)
    print(f"\n{table}\nwritten: {folder / name}.json and .md")
