"""nanoGPT, from a checkout that the user names: its train.py as it is, and its exact loss.

Nothing of it is part of this project.
"""

import importlib.util
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

from gpt_lightning.data.datamodule import TextDataModule

CPU_RECIPE = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4",
    "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
    "--always_save_checkpoint=True",  # or the last step's weights are kept only if they are best
]  # fmt: skip


class NanoGPT:
    """A working copy of a checkout, with tiny Shakespeare prepared in it.

    Args:
        checkout: nanoGPT's folder.
        folder: an empty folder for the copy.

    Raises:
        ValueError: if `checkout` is none.
    """

    def __init__(self, checkout: Path, folder: Path):
        if not (checkout / "train.py").is_file() or not (checkout / "model.py").is_file():
            raise ValueError(f"--nanogpt={checkout}: no train.py and model.py there")
        self.folder = folder / "nanoGPT"
        shutil.copytree(checkout, self.folder, ignore=shutil.ignore_patterns(".git", "out*"))
        data = TextDataModule("tinyshakespeare", block_size=64)
        data.prepare_data()
        data.setup("fit")
        tokens = np.asarray(data.tokens[:], dtype=np.uint16)
        self.cut = data.train_spans[0][1]
        self.val = torch.from_numpy(tokens[self.cut :].astype(np.int64))
        place = self.folder / "data" / "shakespeare_char"
        place.mkdir(parents=True, exist_ok=True)
        tokens[: self.cut].tofile(place / "train.bin")
        tokens[self.cut :].tofile(place / "val.bin")
        (place / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": data.vocab_size}))

    def train(self, *flags: str, seed: int = 1337) -> dict:
        """Its CPU recipe; later flags win. Figures as of `ours.fit`, and `with_evaluations`
        (seconds of training as its user waits for them)."""
        # its script has the seed in its text, not among its flags
        script = (self.folder / "train.py").read_text().replace("1337 + ", f"{seed} + ")
        (self.folder / "train_seeded.py").write_text(script)
        start = time.perf_counter()
        command = [sys.executable, "train_seeded.py", *CPU_RECIPE, *flags]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise ValueError(f"nanoGPT's train.py: {done.stderr.strip().splitlines()[-1]}")
        saved = sorted(self.folder.glob("out*/ckpt.pt"))
        loss = self.exact_loss(saved[0]) if saved else None
        return {**read(done.stdout), "loss": loss, "command": seconds}

    def model(self) -> ModuleType:
        """Its model.py."""
        spec = importlib.util.spec_from_file_location("nanogpt_model", self.folder / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @torch.no_grad()
    def exact_loss(self, path: Path) -> float:
        """Nats per character over the held-out text: windows that do not overlap, every character
        but the first predicted once, fp32."""
        saved = torch.load(path, weights_only=True)
        module = self.model()
        model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
        prefix = "_orig_mod."
        weights = {name.removeprefix(prefix): w for name, w in saved["model"].items()}
        model.load_state_dict(weights)
        T, total = saved["model_args"]["block_size"], 0.0
        for start in range(0, len(self.val) - 1, T):
            window = self.val[start : start + T + 1][None]
            logits, _ = model(window[:, :-1], window[:, 1:])
            total += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        return total / (len(self.val) - 1)


def read(log: str, batch: int = 12 * 64) -> dict:
    """Seconds of training in a log with a line for every step.

    A step's time there reaches from the end of the one before, so that the first after each
    evaluation has the evaluation in it: these count as a median step. The first 20 steps are left
    out of `chars_per_second`.
    """
    steps, evaluated, after = [], [], False
    for line in log.splitlines():
        after = after or line.startswith("step ")
        found = re.match(r"iter \d+: .* time ([\d.]+)ms", line)
        if found:
            steps.append(float(found[1]) / 1e3)
            evaluated.append(after)
            after = False
    plain = [t for t, was in zip(steps, evaluated, strict=True) if not was]
    median = statistics.median(plain)
    return {
        "training": sum(plain) + median * sum(evaluated),
        "with_evaluations": sum(steps),
        "steps": len(steps),
        "chars_per_second": batch / statistics.median(plain[20:] or plain),
    }
