"""Weights for generation: as trained (fp32), in bf16, or in int8.

Generating a token reads every weight once and computes little with it, so that smaller weights are
faster. One private name is used: `torch._weight_int8pack_mm`, the only product of torch with int8
weights on a CPU that is faster than fp32; it is also what torchao and gpt-fast call.

Legend: B rows, K input channels, N output channels.
"""

import copy
import timeit

import torch
import torch.nn.functional as F
from torch import nn

from gpt_lightning.errors import UserError, one_of

PRECISIONS = ("auto", "fp32", "bf16", "int8")
LARGE = 2_000_000  # weights of linear layers; below, reading them is a small part of the time
FEW = 16  # rows; for more of them, a matrix product in bf16 is faster


class Int8Linear(nn.Module):
    """A linear layer, rounded to integer weights from -127 to 127 and one scale per output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1).clamp_min(1e-12) / 127).bfloat16()  # (N,)
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)  # (N, K)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("wide", (rounded * scale.float()[:, None]).bfloat16())  # for many rows
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (B, K)
        if rows.shape[0] > FEW:
            return F.linear(x, self.wide, self.bias)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale)  # (B, N)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


def quantize(model: nn.Module, precision: str) -> nn.Module:
    """The model with weights of this precision: itself (`fp32`) or a copy.

    `int8` rounds the weights of linear layers and keeps the others in bf16. The loss rises by less
    than 0.001 nats per token (docs/experiments.md). `auto` is int8 for a large model on a CPU if a
    measurement of some milliseconds finds it 1.5 times as fast, otherwise fp32.

    Raises:
        UserError: for an unknown precision, or int8 on another device than a CPU.
    """
    device = next(model.parameters()).device.type
    one_of(PRECISIONS, precision=precision)
    if precision == "int8" and device != "cpu":
        raise UserError(f"precision=int8 is for a CPU, not for device={device}; choose bf16")
    if precision == "auto":
        sizes = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
        if device != "cpu" or sum(sizes) < LARGE:
            return model
        rounded = quantize(model, "int8")
        # int8 is two to four times as fast or not faster at all: the choice is always the same
        return rounded if token_seconds(model) > 1.5 * token_seconds(rounded) else model
    if precision == "fp32":
        return model
    narrow = copy.deepcopy(model).bfloat16()
    if precision == "int8":
        originals = dict(model.named_modules())
        for name, module in list(narrow.named_modules()):
            if isinstance(module, nn.Linear):
                narrow.set_submodule(name, Int8Linear(originals[name]))
    return narrow


@torch.inference_mode()
def token_seconds(model: nn.Module) -> float:
    """Seconds that the model takes for one token, the fastest of ten measurements."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    return min(timeit.repeat(lambda: model(ids), number=1, repeat=10))
