"""What the Trainer costs: a step of `Trainer.fit` against a raw loop over the same module."""

import statistics
import tempfile
import time
from itertools import islice

import torch
from lightning.pytorch import Callback, Trainer

from benchmarks.report import table
from gpt_lightning import GPTModule, TextDataModule
from gpt_lightning.training.memory import keep_freed_memory
from gpt_lightning.training.optimizers import scheduled


class Clock(Callback):
    """Seconds from the 20th step to the last."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx == 19:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", time.perf_counter())


def build():
    data = TextDataModule("playwright", block_size=64, batch_size=12)
    settings = {"name": "lecture", "optimizer": "adamw", "n_layer": 4, "n_head": 4, "n_embd": 128}
    torch.manual_seed(1337)
    return GPTModule(data.vocab_size, 64, bias=False, **settings), data


def fitted(precision: str, steps: int) -> float:
    """Seconds a step under `Trainer.fit`, with TensorBoard, clipping and lines every 10 steps."""
    module, data = build()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", precision=precision, max_steps=steps, callbacks=[clock],
            gradient_clip_val=1.0, log_every_n_steps=10, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, data)
    return clock.seconds / (steps - 20)


def raw(precision: str, steps: int) -> float:
    """Seconds a step in plain PyTorch: same module, batches, optimizer, clipping and schedule."""
    module, data = build()
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.prepare_data()
    data.setup("fit")
    net, hp = module.net, module.hparams
    betas = (hp.beta1, hp.beta2)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=hp.learning_rate, betas=betas, fused=True)
    for i, batch in enumerate(islice(data.train_dataloader(), steps)):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(i, hp.learning_rate, 0.0, 0, steps, "linear")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if i == 19:
            start = time.perf_counter()
    return (time.perf_counter() - start) / (steps - 20)


def measure(rounds: int, steps: int):
    """Both loops in turn, in nanoGPT's CPU shape; medians.

    Every other pair begins with the raw loop, so that a machine which grows slower in the course of
    a run favours neither.
    """
    keep_freed_memory()  # as the Trainer's run does for itself
    runs, rows = {}, []
    for precision in ("32-true", "bf16-mixed"):
        pairs = []
        for turn in range(rounds):
            loops = (fitted, raw) if turn % 2 == 0 else (raw, fitted)
            taken = {loop: loop(precision, steps) for loop in loops}
            pairs.append((taken[fitted], taken[raw]))
        runs[precision] = pairs
        trainer, loop = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        share = statistics.median(a / b - 1 for a, b in pairs)
        rows.append([precision, f"{trainer:.2f} ms", f"{loop:.2f} ms", f"{share:+.1%}"])
    header = ["", "Trainer, a step", "raw loop, a step", "overhead"]
    return {"steps": steps, "seconds": runs}, table(header, rows)
