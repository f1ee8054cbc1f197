"""Callbacks of a run: metrics for the loggers, generated samples, the progress bar, predictions."""

import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from gpt_lightning.data.datamodule import ExactLoader
from gpt_lightning.errors import at_least
from gpt_lightning.generation.generator import TextGenerator
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.terminal import safe_to_show
from gpt_lightning.training.saving import find_best_and_last, optimizer_step_done

# TensorBoard's tab "custom scalars": both losses and the floor in one chart
CHARTS = {"loss": {"nats per character": ["Multiline", ["loss/train", "loss/val$", "loss/floor"]]}}
BEST_LOSS = "summary/best_loss"
SAMPLE_STEPS = 250
SLOW_SECONDS = 60  # at a third of the best speed, before a line says so
PROGRESS_SECONDS = 30  # between lines of progress where there is no bar
KEPT_SAMPLES, KEPT_CHARACTERS = 20, 2_000  # of a run, and of each sample, in checkpoints


class TrainingClock:
    """Seconds spent in training steps: validation, samples and saves are left out."""

    def __init__(self):
        self.seconds = 0.0
        self.running_since: float | None = None

    def start(self) -> None:
        if self.running_since is None:
            self.running_since = time.perf_counter()

    def pause(self) -> None:
        if self.running_since is not None:
            self.seconds += time.perf_counter() - self.running_since
            self.running_since = None


class TrainingMetrics(Callback):
    """Logs every `log_every_n_steps` steps, and prints a line after each validation.

    `loss/train` is in nats per character, the mean over processes and micro-steps;
    `speed/chars_per_second` counts the training of all processes. This is a callback and not
    `self.log` in the step, which costs 0.3 ms in every step, logged or not.
    """

    def __init__(self):
        self.losses: list[torch.Tensor] = []  # of the current step, one for each micro-step
        self.tokens = 0  # since the last log line
        self.seconds_before = 0.0  # of training, until the last log line
        self.val_losses: dict[int, float] = {}  # by step
        self.floor: float | None = None  # of the validation text, if known
        self.best_speed, self.last_fast = 0.0, math.inf  # `last_fast` is a time

    def state_dict(self) -> dict[str, Any]:
        return {"val_losses": self.val_losses, "floor": self.floor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.val_losses, self.floor = dict(state["val_losses"]), state.get("floor")

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        hp = all_settings(module)
        starts = trainer.is_global_zero and trainer.ckpt_path is None
        for logger in trainer.loggers:
            logger.log_hyperparams(hp)
            if isinstance(logger, TensorBoardLogger) and starts:
                logger.experiment.add_custom_scalars(CHARTS)
                # TensorBoard's table of runs: Lightning writes it only with a value of the loss
                plain = {k: v if isinstance(v, int | float) else str(v) for k, v in hp.items()}
                for summary in hparams(plain, {BEST_LOSS: 0.0}):
                    logger.experiment.file_writer.add_summary(summary)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        module.clock.start()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.losses.clear()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["next"])
        self.tokens += batch[1].numel()
        if not optimizer_step_done(trainer, batch_idx):
            return
        every = trainer.log_every_n_steps  # 0 in Lightning's barebones mode
        if every and trainer.global_step % every == 0:
            self.log_metrics(trainer, module)

    def newest_loss(self, trainer: Trainer, module: LightningModule) -> float:
        """Of the step that has ended last: over processes and micro-steps, nats per character."""
        loss = trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean")
        loss = float(loss) * tokens_per_character(module)
        trainer.callback_metrics["loss/train"] = torch.tensor(loss)  # for the bar and the line
        return loss

    def log_metrics(self, trainer: Trainer, module: LightningModule) -> None:
        loss = self.newest_loss(trainer, module)  # a GPU finishes before the clock is read
        module.clock.pause()
        seconds = module.clock.seconds - self.seconds_before
        characters = self.tokens * trainer.world_size / tokens_per_character(module)
        speed = characters / max(seconds, 1e-9)
        metrics = {"loss/train": loss, "speed/chars_per_second": speed}
        if self.is_slow(speed, time.monotonic()):
            module.print(
                f"step {trainer.global_step}  training has been at less than a third of its best "
                "speed for a minute: do other programs use the processor?"
            )
        for group in trainer.optimizers[0].param_groups:
            name = "optimizer/lr_muon" if group.get("muon") else "optimizer/lr"
            metrics[name] = float(group["lr"])
        if module.grad_norm is not None:
            metrics["optimizer/grad_norm"] = float(module.grad_norm)
        module.log_to_loggers(metrics)
        self.tokens, self.seconds_before = 0, module.clock.seconds
        module.clock.start()

    def is_slow(self, speed: float, now: float) -> bool:
        """True once, if for a minute each speed was below a third of the best one."""
        self.best_speed = max(self.best_speed, speed)
        if speed >= self.best_speed / 3:
            self.last_fast = now
        if now - self.last_fast < SLOW_SECONDS:
            return False
        self.last_fast = math.inf  # until it is fast again
        return True

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.losses:
            self.newest_loss(trainer, module)
        module.clock.pause()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.barebones:
            return
        metrics = trainer.callback_metrics
        self.val_losses[trainer.global_step] = float(metrics["loss/val"])
        self.floor = float(metrics["loss/floor"]) if "loss/floor" in metrics else None
        line = validation_line(metrics, trainer.global_step)
        module.print(line + limit_note(trainer))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        module.clock.pause()
        keeper = find_best_and_last(trainer)
        if keeper is not None and keeper.best_val_loss < math.inf:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.log_metrics({BEST_LOSS: keeper.best_val_loss}, trainer.global_step)


def tokens_per_character(module: LightningModule) -> float:
    """Of the validation text, so that losses and speeds of all tokenizers compare."""
    return 1.0 if module.data is None else module.data.tokens_per_character


def validation_line(metrics: dict[str, Any], step: int, part: str = "val") -> str:
    """One line with the step and the losses. `part` is "val" after a validation, else "test"."""
    parts = [f"step {step}"]
    if "loss/train" in metrics:
        parts.append(f"train {metrics['loss/train']:.4f}")
    nats, bits = metrics[f"loss/{part}"], metrics[f"loss/{part}_bits"]
    parts.append(f"{part} {nats:.4f} nats ({bits:.4f} bits)")
    if "loss/floor" in metrics:
        parts.append(f"floor {metrics['loss/floor']:.4f}")
    return "  ".join(parts)


def limit_note(trainer: Trainer, part: str = "val") -> str:
    """What to print after a loss if the Trainer limits the batches it is measured on, else ""."""
    loader = getattr(trainer, f"{part}_dataloaders")
    if not isinstance(loader, ExactLoader):  # a user's own, which may have no length
        return ""
    done, batches = sum(getattr(trainer, f"num_{part}_batches")), len(loader)
    return f"  (on {done} of {batches} batches)" if done < batches else ""


def all_settings(module: LightningModule) -> dict[str, Any]:
    """All settings of the model and the data, flat: `model/n_layer`, `data/block_size`, ..."""
    sections = module.settings().items()
    settings = {f"{name}/{k}": v for name, section in sections for k, v in section.items()}
    # TensorBoard refuses file names that are not UTF-8
    return {
        k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v
        for k, v in settings.items()
    }


class GenerateText(Callback):
    """Generates a sample at regular steps, for the terminal and for TensorBoard.

    The sample depends on the weights and the seed alone, and does not affect training. Checkpoints
    keep the samples so far, at most 20, the first and the last among them.

    Args:
        every_n_steps: optimizer steps between samples; 0 generates none. When not given: 250, or
            a quarter of the run if that is less.
        prompt: the text to continue; a line's start by default.
        max_new_tokens: number of tokens to generate.
        temperature: below 1 prefers likely tokens, above 1 flattens the distribution.
        top_k: sample from the k likeliest tokens only.
        seed: of the sampling.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        prompt: str = "",
        max_new_tokens: int = 300,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 1337,
    ):
        at_least(0, every_n_steps=every_n_steps)
        at_least(1, max_new_tokens=max_new_tokens)
        self.every_n_steps, self.prompt = every_n_steps, prompt
        sampling = Sampling(temperature, top_k)
        self.settings = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
        self.samples: dict[int, str] = {}  # by step

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = dict(state["samples"])

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.every_n_steps is None:
            quarter = -(-trainer.max_steps // 4) if trainer.max_steps > 0 else SAMPLE_STEPS
            self.every_n_steps = max(1, min(SAMPLE_STEPS, quarter))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        every, step = self.every_n_steps, trainer.global_step
        if every and step % every == 0 and optimizer_step_done(trainer, batch_idx):
            module.clock.pause()
            if trainer.is_global_zero and module.data is not None:
                self.generate(trainer, module)

    def generate(self, trainer: Trainer, module: LightningModule) -> None:
        generator = TextGenerator(module.net, module.data.tokenizer)
        (text,) = generator.generate(self.prompt, **self.settings)
        self.keep(trainer.global_step, text)
        title = f" step {trainer.global_step} ".center(72, "-")
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        shown = text.strip().encode(encoding, "replace").decode(encoding)  # "?" for what it lacks
        shown = safe_to_show(shown)
        module.print(f"\n{title}\n{shown}\n{'-' * 72}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                as_code = "\n".join("    " + line for line in text.splitlines())
                logger.experiment.add_text("sample", as_code, trainer.global_step)

    def keep(self, step: int, text: str) -> None:
        """Keep a sample; of too many, drop one whose neighbors are closest to each other."""
        self.samples[step] = text[:KEPT_CHARACTERS]
        if len(self.samples) > KEPT_SAMPLES:
            steps = sorted(self.samples)
            gaps = {b: c - a for a, b, c in zip(steps, steps[1:], steps[2:], strict=False)}
            del self.samples[min(gaps, key=gaps.__getitem__)]


class RunProgressBar(TQDMProgressBar):
    """One bar for all steps of a run, not one for each epoch.

    When stdout is not a terminal, a line every 30 seconds takes its place.
    """

    def __init__(self):
        super().__init__(refresh_rate=10 if sys.stdout.isatty() else 0)

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict:
        names = {"loss/train": "train", "loss/val": "val"}
        metrics = trainer.callback_metrics
        return {short: f"{metrics[n]:.3f}" for n, short in names.items() if n in metrics}

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        steps = self.trainer.estimated_stepping_batches
        bar.total = steps if 0 < steps < math.inf else None  # None: the run has no end
        bar.initial = self.trainer.global_step
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        """Lightning's would start a new bar."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if self.is_enabled:
            if step % self.refresh_rate == 0:
                self.train_progress_bar.n = step
                self.train_progress_bar.set_postfix(self.get_metrics(trainer, module))
            return
        self.tokens += batch[1].numel() * trainer.world_size
        seconds = time.monotonic() - self.began
        if seconds >= PROGRESS_SECONDS and step > self.first_step:
            characters = self.tokens / tokens_per_character(module)
            parts = [f"step {step}", f"{characters / seconds:,.0f} characters/s"]
            if "loss/train" in trainer.callback_metrics:
                parts.insert(1, f"train {trainer.callback_metrics['loss/train']:.4f}")
            left = (trainer.estimated_stepping_batches - step) * seconds / (step - self.first_step)
            if left < math.inf:
                parts.append(f"{timedelta(seconds=round(left))} left")
            module.print("  ".join(parts))
            self.start_line(trainer)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.start_line(trainer)

    def start_line(self, trainer: Trainer) -> None:
        """Measure speed from here to the next line of progress."""
        self.began, self.first_step, self.tokens = time.monotonic(), trainer.global_step, 0


class PredictionWriter(Callback):
    """Streams what `predict` finds to a .npy file: rows of `id`, a token, and `nats`, its cost.

    Attributes:
        count, nats: number of tokens written so far, and the sum of their costs.
    """

    def __init__(self, path: Path):
        self.path, self.count, self.nats = path, 0, 0.0

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.row = np.dtype([("id", module.data.tokens.dtype), ("nats", np.float32)])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("xb")
        self.write_header()

    def write_header(self) -> None:
        """Write a header for `count` rows; numpy pads it, so that a larger count fits later."""
        description = np.lib.format.dtype_to_descr(self.row)
        header = {"descr": description, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_2_0(self.file, header)

    def on_predict_batch_end(self, trainer, module, outputs, *_) -> None:
        nats, ids = (part.flatten().cpu().numpy() for part in outputs)
        rows = np.empty(len(ids), self.row)
        rows["id"], rows["nats"] = ids, nats
        self.file.write(rows.tobytes())
        self.count, self.nats = self.count + len(ids), self.nats + float(nats.sum(dtype=float))

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.file.seek(0)
        self.write_header()
        self.file.close()
