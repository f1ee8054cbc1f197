"""What `fit` prints before and after a run."""

import math
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from gpt_lightning.checkpoint import shell_command
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model import num_parameters
from gpt_lightning.training.module import GPTModule
from gpt_lightning.training.saving import find_keeper


class Introduction(Callback):
    """Prints what the run is about to do, and stores its settings as config.yaml."""

    def __init__(self, settings: dict[str, Any], precision_reason: str, folder: Path | None):
        self.settings, self.precision_reason, self.folder = settings, precision_reason, folder

    def on_train_start(self, trainer: Trainer, module: GPTModule) -> None:
        module.print(self.text(trainer, module, module.data))
        if self.folder is None or not trainer.is_global_zero:
            return
        settings = {k: v for k, v in self.settings.items() if k != "ckpt_path"}
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        path = self.folder / "config.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != text:  # of the run it resumes
            path = path.with_name(f"config-step{trainer.global_step}.yaml")
        path.write_text(text, encoding="utf-8")

    def text(self, trainer: Trainer, module: GPTModule, data: TextDataModule) -> str:
        """Text, model and run in a line each."""
        train, val = (sum(b - a for a, b in spans) for spans in (data.train_spans, data.val_spans))
        config, hp = module.config, data.hparams
        validated = "validated" if hp.max_val_tokens else "held out"
        shape = ""
        if config.name != "bigram":
            shape = f"{config.n_layer} layers x {config.n_embd}, {config.n_head} heads, "
        device = f"{trainer.strategy.root_device.type} x {trainer.world_size}"
        reason = f" ({self.precision_reason})" if self.precision_reason else ""
        steps = f", {trainer.max_steps:,} steps" if trainer.max_steps > 0 else ""
        left_out = [path.name for path in data.corpus.left_out]
        more = ", ..." if len(left_out) > 5 else ""
        files = f"       {len(data.corpus.paths):,} text files"
        if left_out:
            files += f"; left out, empty or binary: {', '.join(left_out[:5])}{more}"
        files += "\n" if left_out or len(data.corpus.paths) > 1 else ""
        return (
            f"text   {data.corpus.name}: {train:,} tokens to train on, {val:,} {validated}, "
            f"vocabulary {data.vocab_size}\n"
            f"model  {config.name}, {shape}block {hp.block_size}: "
            f"{num_parameters(module.net):,} parameters\n"
            f"run    {self.folder or 'no folder'} on {device}, "
            f"batch {hp.batch_size} x {hp.block_size}{steps}\n"
            f"       {module.optimizer_config.optimizer}, {trainer.precision}{reason}"
        )


def closing_table(
    trainer: Trainer, module: GPTModule, data: TextDataModule, seconds: float, first_step: int
) -> str:
    """The results of a `fit` that took `seconds` and resumed from `first_step`, and next steps."""
    metrics, steps, keeper = trainer.callback_metrics, trainer.global_step, find_keeper(trainer)
    windows = steps * data.hparams.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    seen, epochs = windows * data.hparams.block_size, windows / len(data.windows)
    unit = "characters" if data.tokenizer.kind == "char" else "tokens"
    rows = {
        "steps": f"{steps:,}" + (f" (resumed at {first_step:,})" if first_step else ""),
        "time": f"{seconds:.1f} s, validation and samples included",
        "training alone": f"{module.clock.seconds:.2f} s",
        f"{unit} seen": f"{seen:,} ({epochs:.1f} epochs)",
    }
    if "loss/val" in metrics:
        rows["final val loss"] = in_nats(float(metrics["loss/val"]), " per character")
    if keeper is not None and keeper.best_val_loss < math.inf:
        rows["best val loss"] = f"{in_nats(keeper.best_val_loss)}, step {keeper.best_step:,}"
    if "loss/val" in metrics and data.val_floor is not None:
        above = float(metrics["loss/val"]) - data.val_floor
        rows["the floor"] = f"{data.val_floor:.4f} nats: {above:.4f} above it"
    if keeper is not None:
        path = keeper.best_path if keeper.best_path.exists() else keeper.last_path
        rows["checkpoints"] = str(keeper.folder)
        rows["generate"] = f'{shell_command("generate", path)} --prompt "..."'
        left = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]
        if any(seconds is not None and seconds <= 0 for seconds in left):
            rows["resume"] = shell_command("fit", keeper.last_path, "--trainer.max_time=null")
    width = max(map(len, rows))
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def in_nats(loss: float, unit: str = "") -> str:
    return f"{loss:.4f} nats{unit} ({loss / math.log(2):.4f} bits)"
