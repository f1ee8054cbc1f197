"""A key/value cache whose tensors only grow: that of an ONNX file and of transformers.

Legend: B batch, H heads, T tokens of the window, P past tokens, D head size.
"""

from collections.abc import Callable

import torch

Tensors = tuple[torch.Tensor, torch.Tensor]


class PastKeyValues:
    """Takes the place of `KVCache`. The whole window begins at position 0.

    Args:
        length: P, the number of tokens whose keys and values are known.
        append: (layer, k, v) of the new tokens (B, H, T - P, D) -> the keys and values of all
            tokens (B, H, T, D).
    """

    def __init__(self, length: int, append: Callable[[int, torch.Tensor, torch.Tensor], Tensors]):
        self.length, self.append = length, append

    def new_tokens(self, ids: torch.Tensor) -> slice:
        """The index of the new tokens on the time axis of the window ids (B, T)."""
        T = ids.shape[1]
        positions = torch.arange(T, device=ids.device)
        self.visible = positions[None] <= positions[self.length :, None]  # (T - P, T)
        return slice(self.length, T)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """softmax(scale q keys^T) values (B, H, T - P, D), from the new tokens to all so far."""
        keys, values = self.append(layer, k, v)
        scores = (q * scale) @ keys.mT  # (B, H, T - P, T)
        return scores.masked_fill(~self.visible, -torch.inf).softmax(dim=-1) @ values
