"""GPTModule: a model with its cross-entropy loss, exact validation, learning rate and optimizer.

Legend: B batch, T time (block_size), V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torchmetrics import MeanMetric

from gpt_lightning.checkpoint import KEY, describe
from gpt_lightning.compatibility import check_compatible, check_corpus
from gpt_lightning.data.datamodule import Batch, TextDataModule
from gpt_lightning.errors import UserError
from gpt_lightning.model import (
    GPTConfig,
    ModelConfig,
    build_model,
    config_from_dict,
    config_to_dict,
)
from gpt_lightning.training.callbacks import TrainingClock, TrainingMetrics
from gpt_lightning.training.hardware import compiler_fault, keep_freed_memory
from gpt_lightning.training.optim import OptimizerConfig, build_optimizer, learning_rate_at
from gpt_lightning.training.step_graph import StepGraph, can_record


class GPTModule(LightningModule):
    """A language model in training.

    `TrainingMetrics` logs `loss/train`, the learning rates, the gradient norm and the speed. Each
    validation logs `loss/val` (nats per character: every held-out character but the first is
    predicted once, in fp32, without dropout), `loss/val_bits` (bits per character) and, where the
    entropy of the text is known, `loss/floor`. The x-axis is the number of optimizer steps.

    Args:
        model: a model config. `vocab_size` and `block_size` may be left 0: they come from the data.
        optimizer: the optimizer and its schedule.
        confidence_penalty: in training, subtract this multiple of the predictions' entropy from the
            loss, against overconfidence on small texts (Pereyra et al. 2017).
        eval_iters: at each validation also estimate the losses as the lecture does, from this many
            random batches of each part (`estimate/train`, `estimate/val`); 0 turns it off.
        compile: compile the training step with torch.compile. The command line compiles long runs
            on one CUDA GPU if this is not given.
        cuda_graph: on one GPU, take each step as one CUDA graph (see `StepGraph`).
        seed: of the initial weights, and of dropout at each step.

    Attributes:
        net: the model, built by `configure_model`: ids (B, T) -> logits (B, T, V).
        initial_weights: state dict that `configure_model` loads into it; random weights by default.
    """

    def __init__(
        self,
        model: ModelConfig | dict[str, Any] | None = None,
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        *,
        confidence_penalty: float = 0.0,
        eval_iters: int = 0,
        compile: bool = False,
        cuda_graph: bool = True,
        seed: int = 1337,
    ):
        super().__init__()
        # dicts come from a checkpoint's hyper-parameters
        self.config = config_from_dict(model) if isinstance(model, dict) else model or GPTConfig()
        self.optimizer_config = (
            OptimizerConfig(**optimizer)
            if isinstance(optimizer, dict)
            else optimizer or OptimizerConfig()
        )
        for name, value in (("confidence_penalty", confidence_penalty), ("eval_iters", eval_iters)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name}={value} must be 0 or more")
        if self.config.name == "bigram" and self.optimizer_config.optimizer == "muon":
            raise UserError(
                "optimizer=muon needs matrices between embedding and head, which the bigram model "
                "does not have; use optimizer=adamw",
            )
        self.save_hyperparameters(ignore=["model", "optimizer"], logger=False)
        self.net: Any = None
        self.compute_losses: Callable = training_losses
        self.initial_weights: dict[str, torch.Tensor] | None = None
        self.val_loss = MeanMetric()
        self.clock = TrainingClock()
        self.grad_norm: torch.Tensor | None = None
        self.next_token_loss: torch.Tensor | None = None  # of the current step
        self.step_graph: StepGraph | None = None
        self.decay_steps = 0
        self.run_settings: dict[str, Any] | None = None  # the command line's, stored to resume

    @property
    def data(self) -> TextDataModule | None:
        """The trainer's data module, or None if the user passed loaders of their own."""
        try:
            data = self.trainer.datamodule
        except RuntimeError:  # not attached to a Trainer
            return None
        return data if isinstance(data, TextDataModule) else None

    def configure_model(self) -> None:
        """Build the model, once the data are known. The weights depend on the seed alone."""
        if self.net is not None:
            return
        if self.data is not None:
            sizes = {
                "vocab_size": self.data.vocab_size,
                "block_size": self.data.hparams.block_size,
            }
            for name, value in sizes.items():
                if getattr(self.config, name) not in (0, value):
                    raise UserError(
                        f"{name}={getattr(self.config, name)} of the model is not the data's "
                        f"{value}; leave it out",
                    )
            self.config = replace(self.config, **sizes)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams.seed)
            self.net = build_model(self.config)
        if self.initial_weights is not None:
            self.net.load_state_dict(self.initial_weights)
            self.initial_weights = None
        self.hparams["model"] = config_to_dict(self.config)
        self.hparams["optimizer"] = asdict(self.optimizer_config)
        if self.hparams.compile:
            self.compute_losses = torch.compile(training_losses)

    def configure_callbacks(self) -> list[Callback]:
        return [TrainingMetrics()]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to logits (B, T, V)."""
        return self.net(ids)

    # training

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.hparams.compile and (fault := compiler_fault(self.device)):
            raise UserError(f"compile=true: {fault}; compile=false trains without it")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # fused AdamW unscales fp16 gradients after they have been clipped, which is too late
        fused = self.trainer.precision != "16-mixed"
        compile = self.hparams.compile
        optimizer = build_optimizer(self.net, self.optimizer_config, fused, compile)
        self.group_settings = [
            {name: group[name] for name in ("lr", "betas", "weight_decay")}
            for group in optimizer.param_groups
        ]
        return optimizer

    def on_train_start(self) -> None:
        # Loading a checkpoint overwrites the groups' settings. Set them to this run's values.
        optimizer = self.optimizers(use_pl_optimizer=False)
        for group, settings in zip(optimizer.param_groups, self.group_settings, strict=True):
            group.update(settings)
        self.decay_steps = self._decay_steps()
        if self.hparams.cuda_graph and can_record(self.trainer):
            self.step_graph = StepGraph(self.losses, self.clip_to_norm, optimizer)

    def on_train_end(self) -> None:
        self.step_graph = None

    def _decay_steps(self) -> int:
        """The step at which the learning rate reaches its minimum; 0 if it stays at its peak."""
        if self.optimizer_config.lr_decay_steps is not None:
            return self.optimizer_config.lr_decay_steps
        trainer = self.trainer
        ends = [trainer.max_steps]
        if trainer.num_training_batches < math.inf:
            steps = trainer.num_training_batches // trainer.accumulate_grad_batches
            ends.append((trainer.max_epochs or 0) * steps)
        return min((end for end in ends if end > 0), default=0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Learning rate and dropout are functions of (seed, step, micro-step, rank), so that a
        # resumed run takes the same steps. There is no LR scheduler: on resume its saved state
        # would overwrite a learning rate given on the command line.
        step, config = self.global_step, self.optimizer_config
        rate = learning_rate_at(step, config, self.decay_steps)
        muon_rate = config.muon_learning_rate * (
            rate / config.learning_rate if config.learning_rate else 1
        )
        for group in self.optimizers(use_pl_optimizer=False).param_groups:
            new = muon_rate if group.get("muon") else rate
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(new)
            else:
                group["lr"] = new
        if getattr(self.config, "dropout", 0):
            micro_step = batch_idx % self.trainer.accumulate_grad_batches
            seed_dropout(self.device, (self.hparams.seed, step, micro_step, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        """The loss to minimise, and `next`, that of the next token alone: nats per token."""
        outputs = (self.step_graph or self.losses)(batch)
        self.next_token_loss, self.grad_norm = outputs["next"], outputs.get("grad_norm")
        return outputs

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        loss, next_token_loss = self.compute_losses(
            self.net, *batch, self.hparams.confidence_penalty
        )
        return {"loss": loss, "next": next_token_loss.detach()}

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:  # a recorded step includes its backward pass
            super().backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip, and keep the norm of the gradient for the log and for `check_finite`."""
        if gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            norm = self.clip_to_norm(optimizer)
            self.grad_norm = self.grad_norm if norm is None else norm
        step = self.global_step + 1
        every = self.trainer.log_every_n_steps  # 0 in Lightning's barebones mode
        if self.device.type == "cpu" or (every and step % every == 0):
            self.check_finite(step)

    def clip_to_norm(self, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        """Clip the gradients to a norm of `gradient_clip_val`; return their norm before that.

        None without gradients: a step of `StepGraph` has been clipped already.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return None
        norm = torch.nn.utils.get_total_norm(gradients)
        largest = self.trainer.gradient_clip_val
        # On a GPU, clip without reading the norm: reading it would wait for all queued kernels.
        if largest and not (self.device.type == "cpu" and float(norm) <= largest):
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def check_finite(self, step: int) -> None:
        """Raise a UserError if the loss or the gradient norm of step number `step` is not finite.

        On a CPU this is checked before every optimizer step. On a GPU it is checked every
        `log_every_n_steps` steps and before a checkpoint is saved.
        """
        if self.next_token_loss is None:
            return
        loss = float(self.next_token_loss)
        # the scaler of 16-mixed meets infinite gradients by design and skips such a step
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        norm = 0.0 if scaled or self.grad_norm is None else float(self.grad_norm)
        if math.isfinite(loss) and math.isfinite(norm):
            return
        groups = self.optimizers(use_pl_optimizer=False).param_groups
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(group["lr"] for group in groups))
        raise UserError(
            f"step {step:,} has a loss of {loss:g} and a gradient norm of {norm:g} at a learning "
            f"rate of {rates}: lower learning_rate and muon_learning_rate, or train in 32-true"
        )

    # validation

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """No autocast and no TF32, so that losses can be compared.

        With bf16-true and 16-true the weights themselves stay in half precision.
        """
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def on_validation_epoch_start(self) -> None:
        # bf16-true and 16-true convert the metric too, and a sum in half precision is wrong
        self.val_loss.set_dtype(torch.float32)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        with self.full_precision():
            self.val_loss.update(cross_entropy(self.net(x), y), weight=y.numel())

    def on_validation_epoch_end(self) -> None:
        self._log_exact("val")

    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._log_exact("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The nats (B, T) that each next token costs, and the tokens (B, T)."""
        x, y = batch
        with self.full_precision():
            return cross_entropy(self.net(x), y, reduction="none").view_as(y), y

    def _log_exact(self, part: str) -> None:
        nats = self.val_loss.compute()  # per token, over all processes
        self.val_loss.reset()
        data = self.data
        if data is not None:
            nats = nats * data.tokens_per_character
        metrics = {f"loss/{part}": nats, f"loss/{part}_bits": nats / math.log(2)}
        if data is not None and data.val_floor is not None:
            metrics["loss/floor"] = torch.tensor(data.val_floor)
        if data is not None and self.hparams.eval_iters:
            metrics["estimate/train"] = self._estimate(data, "train")
            metrics["estimate/val"] = self._estimate(data, "val")
        # In `fit`, Lightning would log at one step less than what has been done.
        fitting = self.trainer.state.fn == "fit"
        self.log_dict(metrics, logger=not fitting)
        if fitting and not self.trainer.sanity_checking:
            self.log_to_loggers({name: float(value) for name, value in metrics.items()})

    def _estimate(self, data: TextDataModule, part: Literal["train", "val"]) -> torch.Tensor:
        """The lecture's `estimate_loss`: mean loss of random batches, nats per character."""
        mean = MeanMetric().to(self.device)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        for batch in data.estimator_batches(part, self.hparams.eval_iters, rank, world):
            x, y = (part.to(self.device) for part in batch)
            with self.full_precision():
                mean.update(cross_entropy(self.net(x), y))
        return mean.compute() * data.tokens_per_character

    def log_to_loggers(self, metrics: dict[str, float]) -> None:
        """Log scalars to every logger, at the number of optimizer steps done."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step)

    # checkpoints

    def settings(self) -> dict[str, dict[str, Any]]:
        """All settings of the model and, under a Trainer, of the data, as the command line's."""
        config = asdict(self.config)
        model = {k: v for k, v in config.items() if k not in ("vocab_size", "block_size")}
        model |= asdict(self.optimizer_config)
        model |= {k: v for k, v in self.hparams.items() if k not in ("model", "optimizer", "seed")}
        data = dict(self.data.hparams) if self.data else {}
        data.pop("seed", None)
        return {"model": {"name": self.config.name, **model}, "data": data}

    def describe(self, data: TextDataModule) -> dict[str, Any]:
        """What makes a checkpoint self-contained; see `checkpoint.describe`."""
        settings = self.run_settings or self.settings()
        return describe(self.config, data.tokenizer.state(), data.describe(), settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.data is not None:
            checkpoint[KEY] = self.describe(self.data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if KEY in checkpoint and self.data is not None:
            theirs, ours, path = checkpoint[KEY], self.describe(self.data), self.trainer.ckpt_path
            if not (self.trainer.state.fn == "test" and self.data.hparams.test_corpus):
                fitting = self.trainer.state.fn == "fit"
                check_corpus(theirs["corpus"], ours["corpus"], path, fitting)
            check_compatible(theirs, ours, path)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Nats that tokens y (B, T) cost under logits (B, T, V), computed in fp32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction=reduction)


def training_losses(
    net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, confidence_penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss to minimise, and that of the next token alone, for x and y (B, T): nats a token."""
    further: torch.Tensor | float = 0.0
    if getattr(net.config, "multi_token_heads", 0):
        logits, further = net(x, targets=y)
    else:
        logits = net(x)
    next_token_loss = cross_entropy(logits, y)
    loss = next_token_loss + further
    if confidence_penalty:
        logs = F.log_softmax(logits.float(), dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1).mean()
        loss = loss - confidence_penalty * entropy
    return loss, next_token_loss


def seed_dropout(device: torch.device, key: tuple[int, ...]) -> None:
    """Seed the generators of the CPU and of `device` from a tuple of integers.

    torch.manual_seed takes a hundred microseconds. A CPU generator ignores a seed's high 32 bits,
    so the key is mixed by SeedSequence, not packed into one integer.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
