"""A long run with much validation, saving and generation: memory, open files, step time.

The run is a real `fit`, looked at once a second from outside, through /proc (so on Linux alone),
and from inside through its own TensorBoard log.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.report import table

EVERY = 50  # steps, some seconds
FLAGS = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1000000000",
    f"--trainer.val_check_interval={EVERY}",
    f"--checkpoint.every_n_train_steps={EVERY // 2}",
    f"--sample.every_n_steps={EVERY}",
    "--sample.max_new_tokens=100",
]
POINTS = 300  # of each series, kept and drawn
SERIES = {  # name: unit
    "memory": "MB",
    "memory of its own": "MB",  # without mapped files, which the system can take back
    "open files": "",
    "threads": "",
    "a step of training": "ms",
    "a step with all that comes between": "ms",
}


def measure(minutes: float, flags: list[str], picture: Path):
    """Train for so long, and watch.

    Returns:
        the series, thinned, each a list of [minute, value]; and a table of their first and last
        quarters, with the slope of a straight line through the last three.

    Raises:
        ValueError: if there is no /proc, or the run fails, with its last line.
    """
    if not Path("/proc/self/status").exists():
        raise ValueError("soak reads /proc, which this system does not have")
    days, hours = divmod(timedelta(minutes=minutes) // timedelta(hours=1), 24)
    minute, second = divmod(round(minutes * 60) % 3600, 60)
    flags = [*FLAGS, f"--trainer.max_time={days:02}:{hours:02}:{minute:02}:{second:02}", *flags]
    with tempfile.TemporaryDirectory() as folder:
        watched = watch([sys.executable, "-m", "gpt_lightning", "fit", *flags], Path(folder))
        logged, counts = read_log(Path(folder, "lightning_logs/version_0"))
    began, ended = (logged["a step of training"][end][0] for end in (0, -1))
    series = {
        name: thin([((at - began) / 60, value) for at, value in points if began <= at <= ended])
        for name, points in (watched | logged).items()
    }
    rows = []
    for name, unit in SERIES.items():
        early, late, slope = trend(series[name])
        figures = [f"{early:,.1f}", f"{late:,.1f}", f"{slope:+,.1f}"]
        rows.append([name, *(f"{figure} {unit}".strip() for figure in figures)])
    header = ["", "first quarter", "last quarter", "an hour's change"]
    did = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    did = f"{minutes:g} minutes: {did}, a checkpoint every {EVERY // 2} steps"
    draw(series, picture, did)
    text = f"{did}.\n\n{table(header, rows)}"
    return {"minutes": minutes, "flags": flags, "counts": counts, "series": series}, text


def watch(command: list[str], folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Run a command in `folder`; once a second (time, value) of what it holds."""
    series: dict[str, list] = {name: [] for name in list(SERIES)[:4]}
    with open(folder / "out", "w") as out, open(folder / "err", "w+") as err:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
        try:
            while process.poll() is None:
                if found := look(process.pid):
                    for points, value in zip(series.values(), found, strict=True):
                        points.append((time.time(), value))
                time.sleep(1)
        finally:
            process.send_signal(signal.SIGTERM)  # to none if it has ended
            process.wait()
        err.seek(0)
        if process.returncode:
            raise ValueError((err.read().strip() or "fit failed").splitlines()[-1])
    return series


def look(pid: int) -> list[float] | None:
    """Memory and its own part in MB, open files, threads of a process; None if it ends just now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        files = len(os.listdir(f"/proc/{pid}/fd"))
        size = [int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")]
        return [*size, files, int(status["Threads"])]
    except (OSError, KeyError):  # a process that has ended holds nothing
        return None


def read_log(run: Path) -> tuple[dict[str, list[tuple[float, float]]], dict[str, int]]:
    """(time, milliseconds a step) from a run's TensorBoard log, and how much it did."""
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    batch = data["batch_size"] * data["block_size"]
    log = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    speeds = log.Scalars("chars_per_second")
    pairs = zip(speeds, speeds[1:], strict=False)
    series = {
        "a step of training": [(e.wall_time, 1000 * batch / e.value) for e in speeds],
        "a step with all that comes between": [
            (b.wall_time, 1000 * (b.wall_time - a.wall_time) / (b.step - a.step)) for a, b in pairs
        ],
    }
    counts = {
        "steps": speeds[-1].step,
        "validations": len(log.Scalars("val/loss")),
        "texts written": len(log.Tensors("generated/text_summary")),
    }
    return series, counts


def thin(points: list[tuple[float, float]]) -> list[list[float]]:
    """At most `POINTS` points: means of neighbours."""
    parts = np.array_split(np.array(points), min(POINTS, len(points)))
    return [[round(float(x), 3) for x in part.mean(axis=0)] for part in parts]


def trend(points: list[list[float]]) -> tuple[float, float, float]:
    """Medians of the first and the last quarter, and the slope an hour of the last three."""
    times, values = np.array(points).T
    quarter = max(1, len(values) // 4)
    slope = np.polyfit(times[quarter:], values[quarter:], 1)[0] * 60
    return statistics.median(values[:quarter]), statistics.median(values[-quarter:]), float(slope)


def draw(series: dict[str, list[list[float]]], path: Path, title: str) -> None:
    """The curves, one below the other, to `path`; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print('for a picture: pip install "matplotlib>=3.8"')
        return
    charts = {
        "memory, MB": ["memory", "memory of its own"],
        "open files, threads": ["open files", "threads"],
        "a step, ms": ["a step of training", "a step with all that comes between"],
    }
    figure = Figure(figsize=(8, 6.5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(len(charts), sharex=True)
    for axes, (label, names) in zip(panels, charts.items(), strict=True):
        for name in names:
            axes.plot(*np.array(series[name]).T, label=name, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.legend(fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
