"""The weights that text is written with: as trained (fp32), in bf16, or in int8.

One new token reads every weight once and does little with it, so fewer bytes mean more text.

Legend: B rows, K channels in, N channels out.
"""

import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

PRECISIONS = ("auto", "fp32", "bf16", "int8")
LARGE = 2_000_000  # weights of linear layers; with fewer, reading them is not what takes the time
FEW = 16  # rows; for more, one product of matrices in bf16 is quicker
# whether torch's inner operations for weights laid out by oneDNN are there, and the processor can
ONEDNN = (
    hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers from -127 to 127, one scale to each row.

    Args:
        linear: the layer to round, any float type.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1).clamp_min(1e-12) / 127).bfloat16()  # (N,)
        whole = (weight / scale.float()[:, None]).round().clamp(-127, 127)  # (N, K)
        self.register_buffer("weight", whole.to(torch.int8))
        self.register_buffer("scale", scale)
        self.wide = (whole * scale.float()[:, None]).bfloat16()  # (N, K), the same, for many rows
        if ONEDNN:  # laid out as the product needs it, which every call would do anew
            self.wide = torch.ops.mkldnn._reorder_linear_weight(self.wide, 2 * FEW)
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (B, K)
        if rows.shape[0] > FEW:
            if self.wide.is_mkldnn:
                return torch.ops.mkldnn._linear_pointwise(x, self.wide, self.bias, "none", [], "")
            return F.linear(x, self.wide, self.bias)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale)  # (B, N)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


def for_writing(model: nn.Module, precision: str) -> nn.Module:
    """The model itself (`fp32`), or a copy with smaller weights (`bf16`, `int8`).

    int8 rounds the weights of the linear layers; the rest is bf16. What that does to the loss is in
    docs/experiments.md: less than 0.001 nats.

    Args:
        model: as trained: ids (B, T) -> logits (B, T, V).
        precision: one of `PRECISIONS`. `auto` is int8 for a large model on a CPU where that is
            measured to be clearly quicker, else fp32.

    Raises:
        ValueError: for an unknown precision, or int8 elsewhere than on a CPU.
    """
    device = next(model.parameters()).device.type
    if precision not in PRECISIONS:
        choices = ", ".join(PRECISIONS)
        raise ValueError(f"--precision={precision} is unknown; choose one of {choices}")
    if precision == "int8" and device != "cpu":
        raise ValueError(f"--precision=int8 is for a CPU, not for --device={device}; try bf16")
    if precision == "auto":
        linear = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
        if device != "cpu" or sum(linear) < LARGE:
            return model
        rounded = for_writing(model, "int8")
        # two to four times as quick where it pays at all, so that the answer is always the same
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
    """Seconds of one token's way through the model, the quickest of ten."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    found = []
    for _ in range(10):
        start = time.perf_counter()
        model(ids)
        found.append(time.perf_counter() - start)
    return min(found)
