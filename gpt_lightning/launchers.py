"""What started this process: torchrun, SLURM, or the user's shell."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched

from gpt_lightning.checkpoint import LOGS
from gpt_lightning.errors import UserError

# torchrun has started the processes of a run


def adopt_torchrun(trainer: dict[str, Any]) -> None:
    """Complete the Trainer's settings by torchrun's processes and nodes.

    Without this, each process would train the whole model alone.

    Raises:
        UserError: if other numbers of them are given.
    """
    if not is_torchelastic_launched():
        return
    processes, in_all = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    for name, started in (("devices", processes), ("num_nodes", in_all // processes)):
        if trainer.get(name, "auto") not in ("auto", started, str(started)):
            raise UserError(
                f"--trainer.{name}={trainer[name]} is not the {started} that torchrun started; "
                f"give --trainer.{name}={started}"
            )
        trainer[name] = started
    if in_all > 1:
        trainer.setdefault("strategy", "ddp")


# a SLURM job that is requeued runs the same command again

REQUEUE_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has none
SLURM_NOTE = "slurm.json"  # in the folder of a run that has not reached its end


def slurm_note(settings: dict[str, Any]) -> str:
    """The job and what identifies a run in it: the given settings that affect the weights."""
    trainer = {k: v for k, v in settings["trainer"].items() if k != "max_time"}
    names = ("seed_everything", "init_from", "data", "model")
    run = {name: settings.get(name) for name in names} | {"trainer": trainer}
    return json.dumps({"job": slurm_job(), **run}, sort_keys=True)


def slurm_job() -> str:
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    array = [os.environ[name] for name in names if name in os.environ]
    return "_".join(array) or os.environ.get("SLURM_JOB_ID", "")


def requeued_checkpoint(note: str, root: Path) -> str | None:
    """The last checkpoint of the run with this note, or None if there is none."""
    for path in root.glob(f"{LOGS}/*/{SLURM_NOTE}"):
        last = path.parent / "checkpoints" / "last.ckpt"
        if last.exists() and path.read_text(encoding="utf-8") == note:
            return str(last)
    return None


def requeue() -> None:
    try:
        subprocess.run(["scontrol", "requeue", slurm_job()], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the SLURM job could not be requeued ({error})", file=sys.stderr)
