"""What `fit` prints before and after a run."""

import math
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from gpt_lightning.checkpoint import resume_command, shell_command
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model import num_parameters
from gpt_lightning.training.module import GPTModule
from gpt_lightning.training.saving import BestAndLast

LARGE_VALIDATION = 10_000_000  # tokens: minutes of validation, even for a small model


class Introduction(Callback):
    """Prints what the run is about to do, and stores its settings as config.yaml."""

    def __init__(self, settings: dict[str, Any], precision_reason: str, folder: Path | None):
        self.settings, self.precision_reason, self.folder = settings, precision_reason, folder

    def on_train_start(self, trainer: Trainer, module: GPTModule) -> None:
        folder = self.folder
        module.print(introduction(trainer, module, module.data, self.precision_reason, folder))
        if folder is None or not trainer.is_global_zero:
            return
        settings = {k: v for k, v in self.settings.items() if k != "ckpt_path"}
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        path = folder / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != text:  # of the run it resumes
            path = path.with_name(f"config-step{trainer.global_step}.yaml")
        path.write_text(text, encoding="utf-8")


def introduction(
    trainer: Trainer,
    module: GPTModule,
    data: TextDataModule,
    precision_reason: str,
    folder: Path | None,
) -> str:
    """Text, model and run in a line each."""
    train, val = (sum(b - a for a, b in spans) for spans in (data.train_spans, data.val_spans))
    config, hp = module.config, data.hparams
    validated = "validated" if hp.max_val_tokens else "held out"
    shape = ""
    if config.name != "bigram":
        shape = f"{config.n_layer} layers x {config.n_embd}, {config.n_head} heads, "
    device = trainer.strategy.root_device.type
    reason = f" ({precision_reason})" if precision_reason else ""
    steps = f", {trainer.max_steps:,} steps" if trainer.max_steps > 0 else ""
    lines = [
        f"text   {data.corpus.name}: {train:,} tokens to train on, {val:,} {validated}, "
        f"vocabulary {data.vocab_size}",
        f"model  {config.name}, {shape}block {hp.block_size}: "
        f"{num_parameters(module.net):,} parameters",
        f"run    {folder or 'no folder'} on {device} x {trainer.world_size}, "
        f"batch {hp.batch_size} x {hp.block_size}{steps}",
        f"       {module.optimizer_config.optimizer}, {trainer.precision}{reason}",
    ]
    if summary := data.corpus.summary():
        lines.insert(1, f"       {summary}")
    if val > LARGE_VALIDATION:
        lines.insert(1, "       --data.max_val_tokens=1000000 makes validation shorter")
    return "\n".join(lines)


def closing_table(
    trainer: Trainer, module: GPTModule, data: TextDataModule, seconds: float, first_step: int
) -> str:
    """Steps, time, text seen, losses, distance to the floor, and what to run next.

    Args:
        seconds: wall-clock time of `fit`.
        first_step: the step the run resumed from; 0 for a new run.
    """
    metrics, steps = trainer.callback_metrics, trainer.global_step
    windows = steps * data.hparams.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    unit = "characters" if data.tokenizer.kind == "char" else "tokens"
    resumed = f" (resumed at {first_step:,})" if first_step else ""
    rows = [
        ("steps", f"{steps:,}{resumed}"),
        ("time", f"{seconds:.1f} s, validation and samples included"),
        ("training alone", f"{module.clock.seconds:.2f} s"),
        (
            f"{unit} seen",
            f"{windows * data.hparams.block_size:,} ({windows / len(data.windows):.1f} epochs)",
        ),
    ]
    if "loss/val" in metrics:
        final = float(metrics["loss/val"])
        rows.append(("final val loss", in_nats(final, " per character")))
    keeper = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast)), None)
    if keeper is not None and keeper.best_val_loss < math.inf:
        rows.append(
            ("best val loss", f"{in_nats(keeper.best_val_loss)}, step {keeper.best_step:,}")
        )
    if "loss/val" in metrics and data.val_floor is not None:
        above = final - data.val_floor
        rows.append(("the floor", f"{data.val_floor:.4f} nats: {above:.4f} above it"))
    if keeper is not None:
        path = keeper.best_path if keeper.best_path.exists() else keeper.last_path
        rows.append(("checkpoints", str(keeper.folder)))
        command = shell_command("generate", f"--ckpt_path={path}")
        rows.append(("generate", f'{command} --prompt "..."'))
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]
    time_left = [timer.time_remaining() for timer in timers]
    if keeper is not None and any(left is not None and left <= 0 for left in time_left):
        rows.append(("resume", resume_command(keeper.last_path, "--trainer.max_time=null")))
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def in_nats(loss: float, unit: str = "") -> str:
    return f"{loss:.4f} nats{unit} ({loss / math.log(2):.4f} bits)"
