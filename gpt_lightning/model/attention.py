"""Causal attention for training, and the key/value cache for generation. Both GPTs use them.

Legend: B batch, H heads, T time, D head size, N tokens so far, n new tokens.
"""

import math

import torch
import torch.nn.functional as F


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(scale q k^T) v, where no position attends to a later one.

    Args:
        q, k, v: (B, H, T, D) each.
        scale: factor of the scores.
        dropout: fraction of the attention weights to drop.

    Returns:
        (B, H, T, D)
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
    """Keys and values of the tokens so far, so that a new token costs one token's work.

    A model fills it: with a cache, it computes only the tokens of a window that come after the
    first `length`. Every layer's keys and values are (B, H, block_size, D), allocated at first use.

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
        B, H, n, D = k.shape
        if layer not in self.layers:
            # On a CPU, attention of a single token takes several times as long in bf16.
            dtype = torch.float32 if k.device.type == "cpu" else k.dtype
            new = k.new_empty(2, B, H, self.block_size, D, dtype=dtype)
            self.layers[layer] = (new[0], new[1])
        keys, values = self.layers[layer]
        start, stop = self.length, self.length + n
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        if start == 0:
            return causal_attention(q, k, v, scale)
        mask = None
        if n > 1:
            mask = torch.ones(n, stop, dtype=torch.bool, device=k.device).tril(start)
        q, keys, values = q.type_as(keys), keys[:, :, :stop], values[:, :, :stop]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        return out.type_as(k)
