"""What the Trainer costs: a step of `Trainer.fit` against a raw loop over the same module."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice

import torch
from lightning.pytorch import Callback, Trainer

from benchmarks.report import table
from gpt_lightning import GPTModule, TextDataModule
from gpt_lightning.training.optimizers import scheduled

TURN = 10  # steps of each before the other goes on


class Turns(Callback):
    """Lets the raw loop take ten steps after every ten of the Trainer.

    Two whole runs, one after the other, differ by more than the overhead: in a minute a machine
    changes by a tenth.
    """

    def __init__(self, loop: Iterator[None]):
        self.loop = loop
        self.seconds: list[tuple[float, float]] = []  # of ten steps, the Trainer's and the loop's

    def on_train_start(self, trainer, module) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % TURN:
            return
        middle = time.perf_counter()
        for _ in range(TURN):
            next(self.loop)
        end = time.perf_counter()
        self.seconds.append((middle - self.start, end - middle))
        self.start = time.perf_counter()


def build():
    data = TextDataModule("playwright", block_size=64, batch_size=12)
    settings = {"name": "lecture", "optimizer": "adamw", "n_layer": 4, "n_head": 4, "n_embd": 128}
    torch.manual_seed(1337)
    return GPTModule(data.vocab_size, 64, bias=False, **settings), data


def in_turn(precision: str, steps: int) -> list[tuple[float, float]]:
    """Seconds of ten steps of `Trainer.fit`, with TensorBoard, clipping and lines every 10 steps,
    and of ten of the raw loop, over and over."""
    module, data = build()
    turns = Turns(raw(precision, steps))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", precision=precision, max_steps=steps, callbacks=[turns],
            gradient_clip_val=1.0, log_every_n_steps=10, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, data)
    return turns.seconds[2:]  # the first are slower, of both


def raw(precision: str, steps: int) -> Iterator[None]:
    """Steps in plain PyTorch: same module, batches, optimizer, clipping and schedule."""
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
        yield


def measure(rounds: int, steps: int):
    """Both loops in turn, ten steps each, in nanoGPT's CPU shape; medians over all turns.

    Raises:
        ValueError: for too few steps.
    """
    if steps < 3 * TURN:
        raise ValueError(f"--steps={steps} must be at least {3 * TURN}")
    runs, rows = {}, []
    for precision in ("32-true", "bf16-mixed"):
        turns = [turn for _ in range(rounds) for turn in in_turn(precision, steps)]
        runs[precision] = turns
        trainer, loop = (statistics.median(c) * 1e3 / TURN for c in zip(*turns, strict=True))
        share = statistics.median(a / b - 1 for a, b in turns)
        rows.append([precision, f"{trainer:.2f} ms", f"{loop:.2f} ms", f"{share:+.1%}"])
    header = ["", "Trainer, a step", "raw loop, a step", "overhead"]
    return {"steps": steps, "turn": TURN, "seconds": runs}, table(header, rows)
