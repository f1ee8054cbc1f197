"""The LightningModule: a model, its cross-entropy loss, and its optimizer.

Legend: B batch, T time (block_size), V vocabulary.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torchmetrics import MeanMetric

from gpt_lightning.checkpoint import KEY, describe, refuse_mismatch
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model import build_config, build_model, model_settings
from gpt_lightning.model.lecture import LectureConfig
from gpt_lightning.model.size import refuse_too_large
from gpt_lightning.training.callbacks import RunLog
from gpt_lightning.training.memory import keep_freed_memory
from gpt_lightning.training.optimizers import adamw, hidden_matrices, muon, scheduled

AHEAD = 0.3  # weight of the token after the next one in training; of the one after that, half of it


class GPTModule(LightningModule):
    """A language model in training: next-token cross-entropy, optimizer, learning rates.

    Logged every `trainer.log_every_n_steps` steps (by `callbacks.RunLog`): `train/loss`, `lr`,
    `grad_norm`, `chars_per_second`. At each validation: `val/loss` (nats per
    character, exact: every held-out token but the first is predicted once, in fp32, without
    dropout), `val/bpc` (the same in bits), `val/floor` where it is known. The x-axis is optimizer
    steps done.

    Args:
        vocab_size: V; from the data module.
        block_size: T, the longest context; from the data module.
        name: `gpt` (the modern GPT), `lecture` (the lecture's final one) or `bigram` (its
            baseline, which ignores the sizes below).
        optimizer: `muon` (Muon for the matrices inside the blocks, AdamW for the rest) or `adamw`.
        learning_rate: AdamW's, at its peak.
        muon_learning_rate: Muon's, at its peak.
        schedule: how they fall after the warm-up: `linear` or `cosine`.
        min_lr: where AdamW's ends; Muon's ends at the same share of its peak.
        warmup_steps: steps over which they rise.
        lr_decay_steps: the step at which they arrive there; the run's last unless given. 0 keeps
            them at their peaks.
        weight_decay: on matrices only, with Muon on its own ones only; unless given 0.1 with AdamW
            alone and 0 with Muon.
        embedding_weight_decay: with Muon, on the embeddings and the head, which are AdamW's.
        beta1: AdamW's.
        beta2: AdamW's.
        look_ahead: in training, predict so many further tokens after the next one too, each with a
            head of its own, which are no part of the model that writes (Gloeckle et al. 2024,
            "Better & faster large language models via multi-token prediction"); for `gpt` alone,
            1 unless given. `train/loss` is the next token's alone.
        n_gram: up to so many characters in a row have an embedding together; for `gpt` alone, 3
            unless given. The longer, the quicker it learns: 5 for a run of seconds, 2 for one that
            sees its text many times and would learn it by heart.
        confidence_penalty: in training, subtract so many times the entropy of the predictions from
            the loss, which keeps a model that sees a small text often from being too sure (Pereyra
            et al. 2017).
        eval_iters: also estimate the losses as the lecture does, by the mean over so many random
            batches of each part (`estimate/train`, `estimate/val`); 0 does not.
        compile: compile the model (torch.compile); pays on a GPU.
        seed: dropout's randomness at each step follows from it.
        **architecture: settings of the model.

    Raises:
        ValueError: in one line that names the flag, for settings that cannot be.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        name: Literal["gpt", "lecture", "bigram"] = "gpt",
        optimizer: Literal["muon", "adamw"] = "muon",
        learning_rate: float = 8e-3,
        muon_learning_rate: float = 0.02,
        schedule: Literal["linear", "cosine"] = "linear",
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        lr_decay_steps: int | None = None,
        weight_decay: float | None = None,
        embedding_weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        look_ahead: int | None = None,
        n_gram: int | None = None,
        confidence_penalty: float = 0.0,
        eval_iters: int = 0,
        compile: bool = False,
        seed: int = 1337,
        **architecture,
    ):
        super().__init__()
        if weight_decay is None:
            weight_decay = 0.0 if optimizer == "muon" else 0.1
        for flag, value in (
            ("learning_rate", learning_rate),
            ("muon_learning_rate", muon_learning_rate),
            ("min_lr", min_lr),
            ("weight_decay", weight_decay),
            ("embedding_weight_decay", embedding_weight_decay),
            ("warmup_steps", warmup_steps),
            ("lr_decay_steps", lr_decay_steps or 0),
            ("look_ahead", look_ahead or 0),
            ("confidence_penalty", confidence_penalty),
            ("eval_iters", eval_iters),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"--model.{flag}={value} must be 0 or more")
        for flag, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"--model.{flag}={value} must lie in [0, 1)")
        self.save_hyperparameters(logger=False)
        self.hparams.weight_decay = weight_decay  # the command line's are as given
        # named here, and not in build_model alone, so that the command line finds its fields
        config = LectureConfig(vocab_size=vocab_size, block_size=block_size, **architecture)
        settings = asdict(config)
        if n_gram is not None:
            if name != "gpt":
                raise ValueError(f"--model.n_gram={n_gram} is for --model.name=gpt alone")
            settings["n_gram"] = n_gram
        # weights, their gradients, and what the optimizer keeps
        refuse_too_large(name, build_config(name, **settings), times=3)
        self.net = build_model(name, **settings)
        if look_ahead is None:
            look_ahead = int(name == "gpt" and block_size > 1)
        if look_ahead and name != "gpt":
            raise ValueError(f"--model.look_ahead={look_ahead} is for --model.name=gpt alone")
        if look_ahead >= block_size:
            raise ValueError(
                f"--model.look_ahead={look_ahead} must be below --data.block_size={block_size}"
            )
        self.ahead = nn.ModuleList(
            nn.Linear(self.net.config.n_embd, vocab_size, bias=False) for _ in range(look_ahead)
        )
        for head in self.ahead:
            nn.init.zeros_(head.weight)
        if optimizer == "muon":
            hidden_matrices(self.net)  # refused here if there are none, before a run has its folder
        self.val_loss = MeanMetric()
        self.grad_norm: torch.Tensor | None = None
        self.next_loss: torch.Tensor | None = None  # of the present step
        self.run_config: str | None = None  # YAML: what the command line was told, for resuming

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the name of each hook that it calls, 47 times a step; nn.Module would look
        # for a weight in each, which is an eighth of what the Trainer costs
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to logits (B, T, V)."""
        return self.net(ids)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor], reduction: str = "mean"):
        """Cross-entropy in nats per token of x, y (B, T) each."""
        x, y = batch
        return cross_entropy(self.net(x), y, reduction)

    # training

    def configure_model(self) -> None:
        # The module is compiled in place: torch.compile(net) would rename every weight.
        if self.hparams.compile and self.net._compiled_call_impl is None:
            self.net.compile()

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hp = self.hparams
        # fused AdamW unscales fp16 gradients itself, after they have been clipped: too late
        fused = self.trainer.precision != "16-mixed"
        settings = (self, hp.learning_rate, hp.weight_decay, (hp.beta1, hp.beta2), fused)
        if hp.optimizer == "adamw":
            return adamw(*settings)
        return muon(*settings, embedding_weight_decay=hp.embedding_weight_decay)

    def on_train_start(self) -> None:
        # The optimizer's state came from the checkpoint with the settings of that time; those of
        # this run hold.
        for group, fresh in zip(
            self.optimizers().param_groups, self.configure_optimizers().param_groups, strict=True
        ):
            group.update({k: v for k, v in fresh.items() if k in ("betas", "weight_decay")})
        self.decay_steps = self._decay_steps()

    def _decay_steps(self) -> int:
        trainer = self.trainer
        if self.hparams.lr_decay_steps is not None:
            return self.hparams.lr_decay_steps
        if trainer.max_steps > 0:
            return trainer.max_steps
        if (
            trainer.max_epochs
            and trainer.max_epochs > 0
            and trainer.num_training_batches < math.inf
        ):
            return (
                trainer.max_epochs * trainer.num_training_batches // trainer.accumulate_grad_batches
            )
        return 0

    def lr_at(self, step: int) -> float:
        """AdamW's learning rate at optimizer step `step`, counted from 0."""
        hp = self.hparams
        peak, low = hp.learning_rate, hp.min_lr
        return scheduled(step, peak, low, hp.warmup_steps, self.decay_steps, hp.schedule)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Everything that a step draws or follows is a function of (seed, step, micro-step, rank),
        # so that a resumed run takes the same steps. No scheduler: its state would bring the
        # checkpoint's learning rate back over the one that is asked for.
        step = self.global_step
        rate, hp = self.lr_at(step), self.hparams
        muon_rate = hp.muon_learning_rate * (rate / hp.learning_rate if hp.learning_rate else 1)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:
            group["lr"] = muon_rate if group.get("muon") else rate
        if self.net.config.dropout:  # nothing else in a step is drawn, and seeds cost 0.1 ms
            micro_step = batch_idx % self.trainer.accumulate_grad_batches
            seed_everywhere(self.device, (hp.seed, step, micro_step, self.global_rank))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int):
        """The loss to learn from, and the next token's alone, in nats per token."""
        x, y = batch
        if self.ahead:
            logits, features = self.net(x, with_features=True)  # (B, T, V), (B, T, C)
        else:
            logits = self.net(x)
        loss = next_loss = cross_entropy(logits, y)
        for n, head in enumerate(self.ahead, start=1):
            loss = loss + AHEAD / n * cross_entropy(head(features[:, :-n]), y[:, n:])
        if self.hparams.confidence_penalty:
            logs = F.log_softmax(logits.float(), dim=-1)
            entropy = -(logs.exp() * logs).sum(dim=-1).mean()
            loss = loss - self.hparams.confidence_penalty * entropy
        self.next_loss = next_loss.detach()
        return {"loss": loss, "next": self.next_loss}

    def configure_callbacks(self) -> list[Callback]:
        return [RunLog()]

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        if gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            limit = math.inf if gradient_clip_val is None else gradient_clip_val
            # the optimizer's list: to walk through the modules takes longer than the norms
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)
            # a GPU is not asked whether there is anything to clip: it would have to finish first
            if self.device.type != "cpu" or float(self.grad_norm) > limit:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, self.grad_norm)
        logged = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        # a GPU is asked seldom: each time it has to finish what it was told to do
        if self.device.type == "cpu" or logged:
            self.refuse_not_finite(self.global_step + 1)

    def refuse_not_finite(self, step: int) -> None:
        """Raise a ValueError if loss or gradient of the newest step, number `step`, is not finite.

        On a CPU that is before the optimizer takes the step. On a GPU it is some steps late, but
        before anything is saved: weights that are once not finite never give a finite loss again.
        """
        if self.next_loss is None:
            return
        # fp16's scaler meets gradients that are not finite, and passes over such a step, by design
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        loss = float(self.next_loss)
        norm = 0.0 if scaled or self.grad_norm is None else float(self.grad_norm)
        if math.isfinite(loss) and math.isfinite(norm):
            return
        groups = self.optimizers(use_pl_optimizer=False).param_groups
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(group["lr"] for group in groups))
        raise ValueError(
            f"step {step:,} has a loss of {loss:g} and a gradient of norm {norm:g} "
            f"at a learning rate of {rates}: lower --model.learning_rate and "
            "--model.muon_learning_rate, or try --trainer.precision=32-true"
        )

    # validation

    @contextmanager
    def exact(self) -> Iterator[None]:
        """fp32 and not compiled, however the model trains, so that figures can be compared.

        Besides, validation's odd batch shapes would be compiled one by one, for minutes.
        """
        eager = torch.compiler.set_stance("force_eager")
        with torch.autocast(self.device.type, enabled=False), eager:
            yield

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        with self.exact():
            self.val_loss.update(self.loss(batch), weight=batch[1].numel())

    def on_validation_epoch_end(self) -> None:
        self._log_exact("val")

    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._log_exact("test")

    def predict_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int):
        """Nats (B, T) that each next token costs, and the tokens (B, T)."""
        with self.exact():
            return self.loss(batch, reduction="none").view_as(batch[1]), batch[1]

    def _log_exact(self, part: str) -> None:
        nats = self.val_loss.compute()  # per token, over all processes
        self.val_loss.reset()
        data = self.data
        if data is not None:
            nats = nats * data.val_tokens / data.val_characters
        metrics = {f"{part}/loss": nats, f"{part}/bpc": nats / math.log(2)}
        if data is not None and data.val_floor is not None:
            metrics[f"{part}/floor"] = torch.tensor(data.val_floor)
        if data is not None and self.hparams.eval_iters:
            metrics["estimate/train"] = self._estimate(data, data.train_spans)
            metrics["estimate/val"] = self._estimate(data, data.val_spans)
        # While fitting, to the loggers at our own step: the Trainer's would be one less.
        fitting = self.trainer.state.fn == "fit"
        self.log_dict(metrics, logger=not fitting)
        if fitting and not self.trainer.sanity_checking:
            self.log_to_loggers({name: float(value) for name, value in metrics.items()})

    @property
    def data(self) -> TextDataModule | None:
        """The run's data module, unless its loaders are of somebody else's making."""
        data = self.trainer.datamodule
        return data if isinstance(data, TextDataModule) else None

    def _estimate(self, data, spans) -> torch.Tensor:
        """The lecture's `estimate_loss`: mean loss of random batches, in nats per token."""
        mean = MeanMetric().to(self.device)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        for batch in data.estimator_batches(spans, self.hparams.eval_iters, rank, world):
            with self.exact():
                mean.update(self.loss([part.to(self.device) for part in batch]))
        return mean.compute()

    def log_to_loggers(self, metrics: dict[str, float]) -> None:
        """Write scalars at the present step (optimizer steps done) to every logger."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step)

    # checkpoints

    def describe(self, data: TextDataModule) -> dict[str, Any]:
        """What makes a checkpoint self-contained; see `checkpoint.describe`."""
        settings = model_settings(self.hparams.name, self.net)
        corpus = {
            "name": data.corpus.name,
            "sha256": data.corpus_sha256,
            "split": data.hparams.split,
            "val_fraction": data.hparams.val_fraction,
        }
        return describe(settings, data.tokenizer.state(), corpus)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.data is not None:
            checkpoint[KEY] = {**self.describe(self.data), "config": self.run_config}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if KEY in checkpoint and self._trainer is not None and self.data is not None:
            refuse_mismatch(
                checkpoint[KEY],
                self.describe(self.data),
                self.trainer.ckpt_path,
                corpus=self.trainer.state.fn == "fit",
            )


# Lightning looks up the parameters of training_step in every step: a twentieth of a millisecond
GPTModule.training_step.__signature__ = inspect.signature(GPTModule.training_step)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Nats that tokens y (B, T) cost under logits (B, T, V), in fp32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction=reduction)


def seed_everywhere(device: torch.device, key: tuple[int, ...]) -> None:
    """Seed torch's generators for the CPU and `device` from a tuple of integers.

    Not torch.manual_seed, which costs a hundred microseconds a call. SeedSequence, because a CPU
    generator ignores a seed's high 32 bits, so keys must be mixed, not packed.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
