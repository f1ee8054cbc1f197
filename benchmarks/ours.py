"""`python -m gpt_lightning fit`, as a user runs it, and what its closing table says."""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def fit(config: Path, *flags: str) -> dict:
    """Train in a folder of its own.

    Returns:
        `loss` (exact, of the last step, nats per character), `training` (seconds of the steps
        alone), `command` (seconds of the whole command), `steps`, `chars_per_second` (of the steps
        alone, the first ones included).

    Raises:
        ValueError: if the command fails, with its last line.
    """
    command = [sys.executable, "-m", "gpt_lightning", "fit", f"--config={config.resolve()}", *flags]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        raise ValueError((done.stderr.strip() or "fit failed").splitlines()[-1])
    return {**read(done.stdout), "command": seconds}


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
