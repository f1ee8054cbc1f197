"""A training step as one CUDA graph.

Launching a kernel takes the CPU 5 to 25 microseconds, and a step of a small model has hundreds of
kernels that take the GPU less than that. A CUDA graph launches all of them at once.
"""

from collections.abc import Callable

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from gpt_lightning.data.datamodule import Batch

EAGER_STEPS = 3  # before recording: they compile, create the optimizer's state and tune cuBLAS
NEED_GRADIENTS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")


def can_record(trainer: Trainer) -> bool:
    """Whether this run's steps can be a CUDA graph.

    Not with several processes or accumulated gradients, with the gradient scaling of 16-mixed, with
    clipping by value, or with callbacks that look at gradients.
    """
    return (
        isinstance(trainer.strategy, SingleDeviceStrategy)
        and trainer.strategy.root_device.type == "cuda"
        and trainer.accumulate_grad_batches == 1
        and trainer.precision != "16-mixed"
        and trainer.gradient_clip_algorithm in (None, "norm")
        and not any(
            getattr(type(callback), hook) is not getattr(Callback, hook)
            for callback in trainer.callbacks
            for hook in NEED_GRADIENTS
        )
    )


class StepGraph:
    """Takes training steps: eagerly at first, then as a recorded CUDA graph.

    A step is the forward and backward pass, clipping and the optimizer. Afterwards `.grad` is
    None, so that Lightning's own backward pass, clipping and optimizer step do nothing.
    Learning rates must be tensors on the GPU. Dropout follows the seed set before each step.

    Args:
        losses: (x, y) -> {"loss": the loss to minimise, ...}, scalars on the GPU.
        clip: clips the gradients and returns their norm.
        optimizer: makes the step.
    """

    def __init__(
        self,
        losses: Callable[[Batch], dict[str, torch.Tensor]],
        clip: Callable[[torch.optim.Optimizer], torch.Tensor | None],
        optimizer: torch.optim.Optimizer,
    ):
        self.losses, self.clip, self.optimizer = losses, clip, optimizer
        self.eager_steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Take a step on x and y (B, T); returns its losses and `grad_norm`."""
        if self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            return self.step(batch)
        if self.graph is None:
            self.record(batch)
        if batch[0].shape != self.batch[0].shape:
            return self.step(batch)
        for recorded, part in zip(self.batch, batch, strict=True):
            recorded.copy_(part)
        self.graph.replay()
        return self.outputs

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        outputs = self.losses(batch)
        with torch.autocast("cuda", enabled=False):
            outputs["loss"].backward()
            outputs["grad_norm"] = self.clip(self.optimizer)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: value.detach() for name, value in outputs.items()}

    def record(self, batch: Batch) -> None:
        """Record the graph. Nothing is computed until it is replayed."""
        self.batch = [part.clone() for part in batch]
        graph = torch.cuda.CUDAGraph()
        # a compilation would synchronise, which cannot be recorded
        compiled_already = torch.compiler.set_stance("fail_on_recompile")
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), compiled_already:
            self.outputs = self.step(self.batch)
        self.graph = graph
