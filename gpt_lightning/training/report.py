"""What a run says to the person who started it: what it is about to do, and what came of it."""

import math
import shlex

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from gpt_lightning.checkpoint import HOW, go_on_with
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.training.callbacks import RunLog
from gpt_lightning.training.checkpointing import BestAndLast
from gpt_lightning.training.lightning_module import GPTModule

MANY_TOKENS = 10_000_000  # to validate on: minutes, even for a small model


def introduction(trainer: Trainer, model: GPTModule, data: TextDataModule, why: str) -> str:
    """Text, model and run, in a line each; `why` this precision, in brackets or not at all."""
    train, val = (
        sum(stop - start for start, stop in spans) for spans in (data.train_spans, data.val_spans)
    )
    config, hp = model.net.config, data.hparams
    shape = f"{config.n_layer} layers x {config.n_embd}, {config.n_head} heads, "
    shape = "" if model.hparams.name == "bigram" else shape
    parameters = sum(p.numel() for p in model.net.parameters())
    folder = trainer.logger.log_dir if trainer.logger else "no log"
    device = trainer.strategy.root_device.type
    held_out = "validated" if hp.max_val_tokens else "held out"
    steps = f", {trainer.max_steps:,} steps" if trainer.max_steps > 0 else ""
    hint = "       --data.max_val_tokens=1000000 would validate in less time\n"
    return (
        f"text   {data.corpus.name}: {train:,} tokens to train on, {val:,} {held_out}, "
        f"vocabulary {data.vocab_size}\n{hint if val > MANY_TOKENS else ''}"
        f"model  {model.hparams.name}, {shape}block {hp.block_size}: {parameters:,} parameters\n"
        f"run    {folder} on {device} x {trainer.world_size}, "
        f"batch {hp.batch_size} x {hp.block_size}{steps}\n"
        f"       {model.hparams.optimizer}, {trainer.precision}{why}"
    )


def closing_table(trainer: Trainer, model: GPTModule, seconds: float, first_step: int) -> str:
    """Steps, time, text seen, losses, distance to the floor, checkpoints, and how to go on.

    Args:
        trainer: after `fit`.
        model: the one it trained.
        seconds: how long `fit` took.
        first_step: the step that this run went on from; 0 for a new one.
    """
    data, metrics, steps = model.data, trainer.callback_metrics, trainer.global_step
    keeper = next(c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast))
    run_log = next(c for c in trainer.callbacks if isinstance(c, RunLog))
    windows = steps * data.hparams.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    seen, epochs = windows * data.hparams.block_size, windows / len(data.windows)
    began = f" ({first_step:,} of them before)" if first_step else ""
    rows = [
        ("steps", f"{steps:,}{began}"),
        ("time", f"{seconds:.1f} s, validation and samples included"),
        ("training alone", f"{run_log.all_seconds:.2f} s"),
        ("characters seen", f"{seen:,} ({epochs:.1f} epochs)"),
    ]
    if data.tokenizer.kind != "char":
        rows[-1] = ("tokens seen", rows[-1][1])
    if "val/loss" in metrics:
        final, best = float(metrics["val/loss"]), keeper.best_val_loss
        rows += [
            ("final val loss", f"{final:.4f} nats per character ({final / math.log(2):.4f} bits)"),
            (
                "best val loss",
                f"{best:.4f} nats ({best / math.log(2):.4f} bits), step {keeper.best_step:,}",
            ),
        ]
        if data.val_floor is not None:
            away = final - data.val_floor
            rows.append(("the floor", f"{data.val_floor:.4f} nats: {away:.4f} above it"))
    path = keeper.best_path if keeper.best_path.exists() else keeper.last_path
    rows.append(("checkpoints", str(keeper.folder)))
    write = f'{HOW} generate --ckpt_path={shlex.quote(str(path))} --prompt "..."'
    rows.append(("write with it", write))
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]
    if any(timer.time_remaining() <= 0 for timer in timers):
        go_on = f"{go_on_with(keeper.last_path)} --trainer.max_time=null"
        rows.append(("go on with", go_on))
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
