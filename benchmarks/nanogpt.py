"""nanoGPT, from the user's checkout: its train.py, its model.py, and its exact loss."""

import importlib.util
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from gpt_lightning import TextDataModule

CPU_RECIPE = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4",
    "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
    "--always_save_checkpoint=True",  # otherwise the last step's weights are saved only if best
]  # fmt: skip


class NanoGPT:
    """A temporary copy of a checkout; it is removed with this object."""

    def __init__(self, checkout: Path):
        if not (checkout / "train.py").is_file():
            raise SystemExit(f"--nanogpt={checkout}: no train.py there")
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name) / "nanoGPT"
        shutil.copytree(checkout, self.folder, ignore=shutil.ignore_patterns(".git", "out*"))

    def train(self, *flags: str, seed: int = 1337) -> dict:
        """Train by its CPU recipe; `flags` override it. Figures as of `common.fit`."""
        val = self.prepare_data()
        # the seed is in the script, not among its flags
        script = (self.folder / "train.py").read_text().replace("1337 + ", f"{seed} + ")
        (self.folder / "train_seeded.py").write_text(script)
        command = [sys.executable, "train_seeded.py", *CPU_RECIPE, *flags]
        start = time.perf_counter()
        log = subprocess.check_output(command, cwd=self.folder, text=True)
        seconds = time.perf_counter() - start
        saved = next(self.folder.glob("out*/ckpt.pt"), None)
        loss = exact_loss(self.model(), saved, val) if saved else None
        return {**read_log(log), "loss": loss, "command": seconds}

    def prepare_data(self) -> torch.Tensor:
        """Write tiny Shakespeare as nanoGPT's ids; returns those of the validation text."""
        data = TextDataModule("tinyshakespeare", block_size=64)
        data.prepare_data()
        data.setup()
        tokens, cut = data.tokens[:].astype("uint16"), data.train_spans[0][1]
        folder = self.folder / "data" / "shakespeare_char"
        folder.mkdir(parents=True, exist_ok=True)
        tokens[:cut].tofile(folder / "train.bin")
        tokens[cut:].tofile(folder / "val.bin")
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": data.vocab_size}))
        return torch.from_numpy(tokens[cut:].astype("int64"))

    def model(self) -> ModuleType:
        """Its model.py as a module."""
        spec = importlib.util.spec_from_file_location("nanogpt_model", self.folder / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@torch.no_grad()
def exact_loss(module: ModuleType, path: Path, ids: torch.Tensor) -> float:
    """Nats per character of a nanoGPT checkpoint over the text `ids` (N,), in fp32.

    Windows do not overlap, and every character but the first is predicted once.
    """
    saved = torch.load(path, weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    # torch.compile adds a prefix
    weights = {name.removeprefix("_orig_mod."): w for name, w in saved["model"].items()}
    model.load_state_dict(weights)
    block_size, total = saved["model_args"]["block_size"], 0.0
    for start in range(0, len(ids) - 1, block_size):
        window = ids[start : start + block_size + 1][None]
        logits, _ = model(window[:, :-1], window[:, 1:])
        total += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    return total / (len(ids) - 1)


def read_log(log: str, batch: int = 12 * 64) -> dict:
    """The figures of a log of train.py with a line for every step.

    The time of the first step after an evaluation includes the evaluation; such a step counts as a
    median step. The first 20 steps are left out of `chars_per_second`.
    """
    steps, after_evaluation, evaluated = [], [], False
    for line in log.splitlines():
        evaluated = evaluated or line.startswith("step ")
        if found := re.match(r"iter \d+: .* time ([\d.]+)ms", line):
            steps.append(float(found[1]) / 1e3)
            after_evaluation.append(evaluated)
            evaluated = False
    plain = [t for t, after in zip(steps, after_evaluation, strict=True) if not after]
    return {
        "training": sum(plain) + statistics.median(plain) * sum(after_evaluation),
        "steps": len(steps),
        "chars_per_second": batch / statistics.median(plain[20:] or plain),
    }
