"""Causal attention for training, and the key/value cache for generation. Both GPTs use them.

Legend: B batch, H heads, T time, D head size, n new tokens, N tokens that the cache has memory for.
"""

import math

import torch
import torch.nn.functional as F

STEP = 32  # tokens by which the cache grows
FEW = 8  # samples; for so many at most, the cache on a CPU is in fp32


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(scale q k^T) v (B, H, T, D), where no position attends to a later one.

    `dropout` is the fraction of the attention weights to drop.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout
        )
    # On a CPU, torch's fused kernel for bf16 takes three to five times as long as this.
    B, H, T, D = q.shape
    q, k, v = (part.reshape(B * H, T, D) for part in (q, k, v))
    mask = q.new_full((T, T), -math.inf).triu(1)
    weights = torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(dim=-1)  # (B * H, T, T)
    return (F.dropout(weights, dropout, dropout > 0) @ v).view(B, H, T, D)


class KVCache:
    """Stores the keys and values of earlier tokens, so that a model computes only the new tokens.

    The caller passes the whole window and the cache to the model. The model skips the first
    `length` tokens of the window, computes the others and adds their keys and values to the cache.
    Each layer has keys and values (B, H, N, D), where N grows by `STEP`.

    Attributes:
        length: number of tokens whose keys and values are stored.
    """

    def __init__(self, block_size: int):
        self.block_size, self.length = block_size, 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store k and v (B, H, n, D) of the new tokens; attend from q to all tokens so far."""
        start, stop = self.length, self.length + k.shape[2]
        keys, values = self._grown(layer, k, stop)
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        if start == 0:
            return causal_attention(q, k, v, scale)
        # Over all N, not up to `stop`: for many samples on a CPU, products of contiguous matrices
        # are faster than those of slices, and than torch's fused attention.
        positions = torch.arange(keys.shape[2], device=k.device)
        future = positions > positions[start:stop, None]  # (n, N)
        scores = (q * scale).type_as(keys) @ keys.mT  # (B, H, n, N)
        weights = scores.masked_fill_(future, -math.inf).softmax(dim=-1)
        return (weights @ values).type_as(k)

    def _grown(self, layer: int, k: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, with memory for at least `length` tokens."""
        if layer not in self.layers:
            B, H, _, D = k.shape
            # On a CPU, a product of a few rows takes several times as long in bf16.
            few = k.device.type == "cpu" and B <= FEW
            empty = k.new_zeros(B, H, 0, D, dtype=torch.float32 if few else k.dtype)
            self.layers[layer] = (empty, empty)
        keys, values = self.layers[layer]
        if length > keys.shape[2]:
            size = min(-(-length // STEP) * STEP, self.block_size)
            if k.device.type == "cuda":  # a CUDA graph needs keys that stay where they are
                size = self.block_size
            padding = (0, 0, 0, size - keys.shape[2])
            keys, values = F.pad(keys, padding), F.pad(values, padding)
            self.layers[layer] = (keys, values)
        return keys, values
