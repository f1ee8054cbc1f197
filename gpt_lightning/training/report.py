"""What `fit` prints before and after a run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from gpt_lightning.checkpoint import shell_command
from gpt_lightning.compatibility import flags_to_repeat
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.documents import JSON_LINES, TABLES, listed
from gpt_lightning.data.statistics import MOST_CHECKED, split_messages
from gpt_lightning.files import unused
from gpt_lightning.model import num_parameters
from gpt_lightning.training.callbacks import TrainingMetrics, limit_note
from gpt_lightning.training.module import GPTModule
from gpt_lightning.training.saving import BestAndLast, find_best_and_last

MANY_ONCE = 100  # characters that occur once, from which a line suggests a smaller vocabulary
NOTICEABLE = 0.01  # nats by which a validation loss must change to be reported


class Introduction(Callback):
    """Prints what the run is about to do, and stores its settings as config.yaml."""

    def __init__(self, settings: dict[str, Any], precision_reason: str, folder: Path | None):
        self.settings, self.precision_reason, self.folder = settings, precision_reason, folder

    def on_train_start(self, trainer: Trainer, module: GPTModule) -> None:
        data = module.data
        module.print(self.text(trainer, module, data))
        if trainer.is_global_zero and not trainer.ckpt_path:
            for message in split_notes(data):
                module.print(f"note   {message}")
        if self.folder is None or not trainer.is_global_zero:
            return
        settings = {k: v for k, v in self.settings.items() if k != "ckpt_path"}
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        path = self.folder / "config.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != text:  # of the run it resumes
            path = unused(path.with_stem(f"config-step{trainer.global_step}"))
        path.write_text(text, encoding="utf-8")

    def text(self, trainer: Trainer, module: GPTModule, data: TextDataModule) -> str:
        """Text, model and run in a line each."""
        train, val = (sum(b - a for a, b in spans) for spans in (data.train_spans, data.val_spans))
        config, hp = module.config, data.hparams
        validated = "validated" if hp.max_val_tokens else "held out"
        if data.val_text is not data.corpus:
            validated = f"of {data.val_text.name} to validate on"
        shape = ""
        if config.name != "bigram":
            shape = f"{config.n_layer} layers x {config.n_embd}, {config.n_head} heads, "
        device = f"{trainer.strategy.root_device.type} x {trainer.world_size}"
        reason = f" ({self.precision_reason})" if self.precision_reason else ""
        steps = f", {trainer.max_steps:,} steps" if trainer.max_steps > 0 else ""
        start = f"resumes {trainer.ckpt_path}, step {trainer.global_step:,}\n       "
        return (
            f"text   {data.corpus.name}: {train:,} tokens to train on, {val:,} {validated}, "
            f"vocabulary {data.vocab_size}\n{files_read(data)}{vocabulary_notes(data)}"
            f"model  {config.name}, {shape}block {hp.block_size}: "
            f"{num_parameters(module.net):,} parameters\n"
            f"run    {self.folder or 'no folder'} on {device}, "
            f"batch {hp.batch_size} x {hp.block_size}{steps}\n"
            f"       {start if trainer.ckpt_path else ''}"
            f"{module.optimizer_config.optimizer}, {trainer.precision}{reason}"
            f"{', compiled at the first step' if module.hparams.compile else ''}"
        )


def split_notes(data: TextDataModule) -> list[str]:
    """What is wrong with the split into training and validation text, if it is not too large."""
    ids, val, n = data.tokens, data.val_spans, len(data.tokens)
    if n + len(data.val_ids) > MOST_CHECKED or data.corpus.floor_path is not None:
        return []  # the embedded corpus, whose floor is known, is in order
    own = data.val_text is not data.corpus
    if own:
        ids, val = np.concatenate([ids, data.val_ids]), [(n + a, n + b) for a, b in val]
    is_tail = data.hparams.split == "tail" and not own
    sizes = data.vocab_size, data.train_spans, val, data.hparams.block_size
    return split_messages(ids, *sizes, is_tail)


def files_read(data: TextDataModule) -> str:
    """Files, documents and characters of a text of several, and what is left out; or ""."""
    corpus, read = data.corpus, data.token_file
    files, notes = len(corpus.files), ""
    if any(file.kind in (*JSON_LINES, *TABLES) and file.field is None for file in corpus.files):
        notes += "       rows are read as plain text: --data.field=NAME reads a field of each\n"
    if max(files, read.documents) > 1 or corpus.left_out:
        between = f" separated by {corpus.separator!r}" if corpus.separator else ""
        notes += (
            f"       {read.documents:,} documents{between} in {files:,} file{'s' * (files > 1)}, "
            f"{read.characters:,} characters{listed('; left out: ', corpus.left_out)}\n"
        )
    return notes


def vocabulary_notes(data: TextDataModule) -> str:
    """How many characters are not in the vocabulary, or that a model can be much smaller; or ""."""
    notes, action = "", "left out" if data.hparams.unknown == "drop" else "replaced"
    for file in dict.fromkeys((data.token_file, data.val_file)):
        if file.unknown:
            notes += (
                f"       {file.unknown:,} of {file.characters:,} characters of {file.corpus.name} "
                f"are not in the vocabulary and are {action}\n"
            )
    if data.token_file.once >= MANY_ONCE and data.hparams.min_count == 1:
        notes += (
            f"       {data.token_file.once:,} characters occur only once: --data.min_count=2, "
            "--data.tokenizer=byte or bpe makes the model smaller\n"
        )
    return notes


def closing_table(
    trainer: Trainer, module: GPTModule, data: TextDataModule, seconds: float, first_step: int
) -> str:
    """The results of a `fit` that took `seconds` and resumed from `first_step`, and next steps."""
    metrics, steps = trainer.callback_metrics, trainer.global_step
    keeper = find_best_and_last(trainer)
    batches = (steps - first_step) * trainer.world_size * trainer.accumulate_grad_batches
    windows = batches * data.hparams.batch_size
    seen, epochs = windows * data.hparams.block_size, windows / len(data.windows)
    unit = "characters" if data.tokenizer.kind == "char" else "tokens"
    rows = {
        "steps": f"{steps:,}" + (f" (resumed at {first_step:,})" if first_step else ""),
        "time": f"{seconds:.1f} s, validation and samples included",
        "training alone": f"{module.clock.seconds:.2f} s",
        f"{unit} seen": f"{seen:,} ({epochs:.1f} epochs)" + " since then" * bool(first_step),
    }
    limited = limit_note(trainer) if "loss/val" in metrics else ""
    if "loss/val" in metrics:
        rows["final val loss"] = in_nats(float(metrics["loss/val"]), " per character") + limited
    if keeper is not None and keeper.best_val_loss < math.inf:
        rows["best val loss"] = (
            f"{in_nats(keeper.best_val_loss)}, step {keeper.best_step:,}{limited}"
        )
    if "loss/val" in metrics and data.val_floor is not None:
        above = float(metrics["loss/val"]) - data.val_floor
        rows["the floor"] = f"{data.val_floor:.4f} nats: {above:.4f} above it"
    rows |= outcome(trainer, keeper)
    if keeper is not None:
        path = keeper.best_path if keeper.best_path.exists() else keeper.last_path
        rows["checkpoints"] = str(keeper.folder)
        rows["generate"] = f'{shell_command("generate", path)} --prompt "..."'
        if any(map(time_is_over, trainer.callbacks)):
            flags = ["--trainer.max_time=null", *flags_to_repeat(module.run_settings or {})]
            rows["resume"] = shell_command("fit", keeper.last_path, *flags)
    width = max(map(len, rows))
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def outcome(trainer: Trainer, keeper: BestAndLast | None) -> dict[str, str]:
    """Whether the run was stopped early, and why; whether it overfitted or is still falling."""
    rows, step, planned = {}, trainer.global_step, trainer.estimated_stepping_batches
    if step < planned:
        # EarlyStopping of Lightning 2.6 and later has a message
        reasons = [getattr(c, "stopping_reason_message", None) for c in trainer.callbacks]
        reasons += ["--trainer.max_time is over" for c in trainer.callbacks if time_is_over(c)]
        reason = next(filter(None, reasons), "by a callback")
        end = f" of {planned:,}" if planned < math.inf else ""
        rows["stopped early"] = f"step {step:,}{end}: {reason}"
    metrics = next(c for c in trainer.callbacks if isinstance(c, TrainingMetrics))
    losses = dict(metrics.val_losses)
    if keeper is not None and keeper.best_val_loss < math.inf:
        losses[keeper.best_step] = keeper.best_val_loss  # maybe from before the run was resumed
    if len(losses) < 2:
        return rows
    best_step = min(losses, key=losses.get)
    (before_step, before), (_, last) = sorted(losses.items())[-2:]
    rise, fall = last - losses[best_step], before - last
    if rise >= NOTICEABLE:
        rows["overfitted"] = f"lowest at step {best_step:,}, +{rise:.2f} since"
    elif fall >= NOTICEABLE:
        rows["still falling"] = f"{fall:.4f} nats since step {before_step:,}"
        if keeper is not None and step >= planned:
            longer = f"--trainer.max_steps={2 * step}"
            flags = [longer, *flags_to_repeat(trainer.lightning_module.run_settings or {})]
            rows["train longer"] = shell_command("fit", keeper.last_path, *flags)
    return rows


def time_is_over(callback: Callback) -> bool:
    left = callback.time_remaining() if isinstance(callback, Timer) else None
    return left is not None and left <= 0


def in_nats(loss: float, unit: str = "") -> str:
    return f"{loss:.4f} nats{unit} ({loss / math.log(2):.4f} bits)"
