"""Cost of the Trainer: its steps against a plain loop over the same model."""

import statistics
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer

from benchmarks.common import markdown, round_figure
from gpt_lightning import GPTModule, LectureConfig, OptimizerConfig, TextDataModule
from gpt_lightning.model import build_model
from gpt_lightning.training.optim import build_optimizer, learning_rate_at

TURN = 10  # steps of each before the other continues
OPTIMIZER = OptimizerConfig("adamw")


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=300, help="at least 20")


def build_data() -> TextDataModule:
    """The embedded corpus in nanoGPT's CPU batches."""
    data = TextDataModule("playwright", block_size=64, batch_size=12)
    data.prepare_data()
    data.setup()
    return data


def plain_loop(config: LectureConfig, precision: str, steps: int) -> Iterator[None]:
    """Steps in plain PyTorch: the same model, batches, optimizer, clipping and schedule."""
    model = build_model(config)
    optimizer = build_optimizer(model, OPTIMIZER)
    for step, (x, y) in enumerate(build_data().train_dataloader()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, OPTIMIZER, steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield


class Alternate(Callback):
    """Takes ten steps of the plain loop after every ten of the Trainer.

    The speed of a machine changes by a tenth within a minute, more than the overhead.
    """

    def __init__(self, loop: Iterator[None]):
        self.loop = loop
        self.seconds: list[tuple[float, float]] = []  # of a turn, the Trainer's and the loop's

    def on_train_start(self, trainer, module) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % TURN == 0:
            middle = time.perf_counter()
            for _ in range(TURN):
                next(self.loop)
            end = time.perf_counter()
            self.seconds.append((middle - self.start, end - middle))
            self.start = time.perf_counter()


def alternate(precision: str, steps: int) -> list[tuple[float, float]]:
    """Seconds of the turns of a run. The Trainer logs to TensorBoard every ten steps."""
    data = build_data()
    config = LectureConfig(
        n_layer=4, n_head=4, n_embd=128, bias=False, vocab_size=data.vocab_size, block_size=64
    )
    callback = Alternate(plain_loop(config, precision, steps))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", precision=precision, max_steps=steps, callbacks=[callback],
            gradient_clip_val=1.0, log_every_n_steps=10, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(GPTModule(config, OPTIMIZER), data)
    return callback.seconds[1:]  # the first steps are slower on both sides


def measure(args) -> tuple[dict, str]:
    """Medians over all turns, in nanoGPT's CPU shape."""
    figures: dict = {"steps": args.steps, "rounds": args.rounds}
    rows = []
    for precision in ("32-true", "bf16-mixed"):
        turns = [turn for _ in range(args.rounds) for turn in alternate(precision, args.steps)]
        trainer_ms, loop_ms = (
            statistics.median(side) * 1e3 / TURN for side in zip(*turns, strict=True)
        )
        overhead = statistics.median(a / b - 1 for a, b in turns)
        rows.append([precision, f"{trainer_ms:.2f} ms", f"{loop_ms:.2f} ms", f"{overhead:+.1%}"])
        figures[precision] = {
            "turns": len(turns),
            "trainer_ms": round_figure(trainer_ms),
            "loop_ms": round_figure(loop_ms),
            "overhead": round_figure(overhead),
        }
    return figures, markdown(["", "Trainer, a step", "plain loop, a step", "overhead"], rows)
