"""Figures of a benchmark, as JSON with all that was measured and as a Markdown table."""

import json
import os
import platform
import statistics
import subprocess
from datetime import date
from pathlib import Path

import torch


def machine() -> dict:
    """Processor, cores, versions, date and commit that the figures belong to."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().split("\n") if info.exists() else []
    model = [line.split(":")[1].strip() for line in names if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "processor": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are figures."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def write(folder: Path, name: str, figures: dict, text: str) -> None:
    """NAME.json and NAME.md into `folder`; the table to the terminal too."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"machine": machine(), **figures}
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}\n{folder / name}.json, .md")
