"""`python -m gpt_lightning fit`, as a user runs it, and what its closing table says."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def fit(config: Path | None, *flags: str) -> dict:
    """Train in a folder of its own, with the defaults where there is no config.

    Returns:
        `loss` (exact, of the last step, nats per character), `training` (seconds of the steps
        alone), `command` (seconds of the whole command), `memory` (its peak, MB), `steps`,
        `chars_per_second` (of the steps alone, the first ones included).

    Raises:
        ValueError: if the command fails, with its last line.
    """
    flags = (*([f"--config={config.resolve()}"] if config else []), *flags)
    command = [sys.executable, "-m", "gpt_lightning", "fit", *flags]
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder, "out"), "w+") as out,
        open(Path(folder, "err"), "w+") as err,
    ):
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone
        seconds = time.perf_counter() - start
        output, errors = (Path(folder, name).read_text() for name in ("out", "err"))
    if status:
        raise ValueError((errors.strip() or "fit failed").splitlines()[-1])
    return {**read(output), "command": seconds, "memory": usage.ru_maxrss / 1024}


def read(output: str) -> dict:
    """The figures in a closing table."""
    rows = output[output.rindex("\nsteps  ") :]  # what stands before may be a sample's text
    found = dict(re.findall(r"^([a-z][a-z ]+?)  +(\d[\d.,]*)", rows, re.MULTILINE))
    number = {name: float(text.replace(",", "")) for name, text in found.items()}
    return {
        "loss": number["final val loss"],
        "training": number["training alone"],
        "steps": int(number["steps"]),
        "chars_per_second": number["characters seen"] / number["training alone"],
    }
