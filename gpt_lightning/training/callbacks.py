"""What watches a run: figures for the loggers, generated text, the progress bar."""

import math
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.generation.writer import Writer


def stepped(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this batch completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


# TensorBoard's tab "custom scalars": what belongs together in one chart
CHARTS = {
    "loss": {"nats per character": ["Multiline", ["train/loss", "val/loss", "val/floor"]]},
    "step": {
        "learning rate": ["Multiline", ["lr", "lr_muon"]],
        "gradient norm": ["Multiline", ["grad_norm"]],
        "characters per second": ["Multiline", ["chars_per_second"]],
    },
}


class RunLog(Callback):
    """Writes `train/loss` (nats per token, mean over processes and micro-steps), `lr`, `lr_muon`,
    `grad_norm` and `chars_per_second` (training alone, all processes) every `log_every_n_steps`
    steps.

    A callback and not `self.log` in the step: that costs 0.3 ms on every step, logged or not.
    """

    def __init__(self):
        self.losses: list[torch.Tensor] = []  # of the present step, one for each micro-step
        self.tokens, self.seconds = 0, 0.0  # since the last line
        self.all_seconds = 0.0  # of training alone, since its start
        self.since: float | None = None  # when training last went on

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.since = time.perf_counter()
        for logger in trainer.loggers:
            logger.log_hyperparams(settings(module))
            if isinstance(logger, TensorBoardLogger) and trainer.global_step == 0:
                logger.experiment.add_custom_scalars(CHARTS)

    def pause(self) -> None:
        """Stop the clock: what follows is not training. It goes on with the next batch."""
        if self.since is not None:
            passed = time.perf_counter() - self.since
            self.seconds += passed
            self.all_seconds += passed
            self.since = None

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.pause()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.since is None:
            self.since = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["next"])
        self.tokens += batch[1].numel()
        if not stepped(trainer, batch_idx):
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.write(trainer, module)
        self.losses.clear()

    def write(self, trainer: Trainer, module: LightningModule) -> None:
        loss = float(trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean"))
        self.pause()
        metrics = {
            "train/loss": loss,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "chars_per_second": self.tokens * trainer.world_size / max(self.seconds, 1e-9),
        }
        for group in trainer.optimizers[0].param_groups:
            if group.get("muon"):
                metrics["lr_muon"] = group["lr"]
        if module.grad_norm is not None:
            metrics["grad_norm"] = float(module.grad_norm)
        # for the bar and whoever watches metrics; module.log takes half a millisecond for it
        trainer.callback_metrics["train/loss"] = torch.tensor(loss)
        module.log_to_loggers(metrics)  # last: TensorBoard's thread takes Python's lock after it
        self.tokens, self.seconds = 0, 0.0
        self.since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.pause()
        losses = [getattr(c, "best_val_loss", math.inf) for c in trainer.checkpoint_callbacks]
        best = min(losses, default=math.inf)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and best < math.inf:
                # settings beside the best loss: a row in TensorBoard's table of runs
                metrics = {"val/best": best}
                logger.log_hyperparams(settings(module), metrics, step=trainer.global_step)


def settings(module: LightningModule) -> dict[str, Any]:
    """All settings of the model and the data, flat: `model/n_layer`, `data/block_size`, ..."""
    data = module.data.hparams if module.data else {}
    return {f"model/{k}": v for k, v in module.hparams.items()} | {
        f"data/{k}": v for k, v in data.items()
    }


class GenerateText(Callback):
    """Lets the model write every so many steps, to the terminal and to TensorBoard.

    The text depends on the weights and the seed alone, and training is not touched by it.

    Args:
        every_n_steps: optimizer steps from sample to sample; 0 writes none.
        prompt: what the text begins with; a line's start unless given.
        max_new_tokens: tokens to write.
        temperature: below 1 plays safe, above 1 takes risks.
        top_k: draws from the k likeliest tokens only.
        seed: of the draws.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        prompt: str = "",
        max_new_tokens: int = 300,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 1337,
    ):
        if every_n_steps < 0:
            raise ValueError(f"--sample.every_n_steps={every_n_steps} must be 0 or more")
        if max_new_tokens < 1:
            raise ValueError(f"--sample.max_new_tokens={max_new_tokens} must be at least 1")
        self.every_n_steps, self.prompt = every_n_steps, prompt
        self.max_new_tokens, self.seed = max_new_tokens, seed
        try:
            self.sampling = Sampling(temperature, top_k)
        except ValueError as error:
            raise ValueError(str(error).replace("--", "--sample.", 1)) from error

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage == "fit" and module.data is not None:
            module.data.tokenizer.encode(self.prompt)  # an unknown character ends the run here

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if self.every_n_steps < 1 or step % self.every_n_steps or not stepped(trainer, batch_idx):
            return
        for callback in trainer.callbacks:
            if isinstance(callback, RunLog):
                callback.pause()
        if trainer.is_global_zero and module.data is not None:
            self.write(trainer, module)

    def write(self, trainer: Trainer, module: LightningModule) -> None:
        writer = Writer(module.net, module.data.tokenizer)
        # texts of growing length: compiling for each would take minutes
        with torch.compiler.set_stance("force_eager"):
            text = writer.write(
                self.prompt,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                seed=self.seed,
            )[0]
        rule = f" step {trainer.global_step} ".center(72, "-")
        module.print(f"\n{rule}\n{text.strip()}\n{'-' * 72}")
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                fenced = "\n".join("    " + line for line in text.splitlines())
                logger.experiment.add_text("generated", fenced, trainer.global_step)


class RunBar(TQDMProgressBar):
    """One bar for the whole run, not one an epoch: how many steps, how long still.

    Where the output is no terminal there is no bar, but validations print their lines all the same.
    """

    def __init__(self, refresh_rate: int = 10):
        super().__init__(refresh_rate=refresh_rate if sys.stdout.isatty() else 0)

    def print(self, *args, sep: str = " ") -> None:
        if self.is_enabled:
            super().print(*args, sep=sep)
        elif self.trainer.is_global_zero:
            print(*args, sep=sep, flush=True)

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict:
        metrics = trainer.callback_metrics
        names = {"train/loss": "train", "val/loss": "val"}
        return {short: f"{metrics[n]:.3f}" for n, short in names.items() if n in metrics}

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        if trainer.max_steps < 1:
            super().on_train_epoch_start(trainer)
        elif self.train_progress_bar.total != trainer.max_steps:
            self.train_progress_bar.reset(trainer.max_steps)
            self.train_progress_bar.initial = trainer.global_step
            self.train_progress_bar.set_description("Training")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.max_steps < 1:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        elif stepped(trainer, batch_idx) and self._should_update(
            trainer.global_step, trainer.max_steps
        ):
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, module))

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_validation_end(trainer, module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.print(validation_line(trainer))


def validation_line(trainer: Trainer) -> str:
    """What a validation found, in one line."""
    metrics = trainer.callback_metrics
    parts = [f"step {trainer.global_step}"]
    if "train/loss" in metrics:
        parts.append(f"train {metrics['train/loss']:.4f}")
    parts.append(f"val {metrics['val/loss']:.4f} nats ({metrics['val/bpc']:.4f} bits)")
    if "val/floor" in metrics:
        parts.append(f"floor {metrics['val/floor']:.4f}")
    return "  ".join(parts)
