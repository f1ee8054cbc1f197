"""AdamW over two groups of parameters, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases and norms (1-D) are not pulled to zero.

    `fused` is one kernel in place of hundreds, on devices that have it, the CPU among them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = fused and parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def warmup_cosine(step: int, peak: float, low: float, warmup_steps: int, decay_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Rises in a line over `warmup_steps`, so that step `warmup_steps` is the first at `peak`, then
    falls along half a cosine and is `low` from step `decay_steps` on. `decay_steps` of 0 or less
    means that no end is known: it stays at `peak`. A run shorter than its warm-up just rises.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if decay_steps <= 0:
        return peak
    if step >= decay_steps:
        return low
    done = (step - warmup_steps) / (decay_steps - warmup_steps)
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2
