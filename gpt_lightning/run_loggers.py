"""The loggers of a run. A resumed run continues in the same place, with any logger."""

import csv
import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from gpt_lightning.checkpoint import KEY
from gpt_lightning.compatibility import is_plain
from gpt_lightning.files import unused
from gpt_lightning.settings import as_list, class_path

RUN_ARGUMENTS = ("version", "run_id", "experiment_key")  # one of them is its run, for each class


def loggers_in(folder: Path, first_step: int) -> dict[str, Logger]:
    """The loggers that write to a run's folder, by their short names."""
    place = (folder.parent.parent, folder.parent.name, folder.name)
    tensorboard = TensorBoardLogger(
        *place,
        default_hp_metric=False,
        purge_step=first_step + 1,  # hides what a killed run logged after its checkpoint
        flush_secs=10,
    )
    return {"csv": CSVLogger(*place), "tensorboard": tensorboard}


def open_loggers(loggers: list[Logger], first_step: int) -> list[dict[str, Any]]:
    """Open the loggers; returns for each the argument that names its run, for the checkpoints."""
    runs = []
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            keep_rows(logger, first_step)
        getattr(logger, "experiment", None)  # opens it; some have no version before
        known = inspect.signature(type(logger)).parameters
        runs.append({name: logger.version for name in RUN_ARGUMENTS if name in known})
    return runs


def resumed_loggers(settings: Any, checkpoint: dict[str, Any]) -> Any:
    """The settings of the loggers, with the runs that `open_loggers` returned before."""
    resumed, stored = deepcopy(settings), checkpoint[KEY]["settings"]
    before = as_list(stored["trainer"].get("logger"))
    runs = stored.get("logger_runs", [])
    for one, same, run in zip(as_list(resumed), before, runs, strict=False):
        if isinstance(one, dict) and class_path(one) == class_path(same) and is_plain(run):
            if class_path(one).endswith("TensorBoardLogger"):
                run = {**run, "purge_step": checkpoint["global_step"] + 1}
            one["init_args"] = {**run, **one.get("init_args", {})}
    return resumed


def keep_rows(logger: CSVLogger, first_step: int) -> None:
    """Keep the rows of the steps before `first_step` in metrics.csv; CSVLogger deletes the file.

    If there are later rows, the whole old file is kept under another name.
    """
    path = Path(logger.log_dir, "metrics.csv")
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if int(row["step"]) <= first_step]
    last_step = max((int(row["step"]) for row in rows), default=0)
    old = path.replace(unused(path.with_stem(f"metrics-step{last_step}")))
    logger.experiment.metrics = kept
    logger.save()
    if kept == rows:
        old.unlink()
