"""Causal attention for training, and the key/value cache for generation. Both GPTs use them.

Legend: B batch, H heads, T time, D head size, n new tokens, N tokens that the cache has memory for.
"""

import math

import torch
import torch.nn.functional as F

STEP = 32  # tokens by which the cache grows
FEW = 8  # samples; for so many at most, the cache on a CPU is in fp32
# The default GPT's rotary table has block_size rows, and no weight in a file tells their number, so
# this bounds the memory of a model from an untrusted file.
MAX_BLOCK_SIZE = 1 << 17


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

    The caller passes the whole window and the cache to the model. The model computes the tokens
    that `new_tokens` names, adds their keys and values to the cache and sets `length`. Each layer
    has keys and values (B, H, N, D), where N grows by `STEP`.

    Attributes:
        length: number of tokens whose keys and values are stored.
        position: (1,) where the only new token is, as a tensor; None: the new tokens are all after
            the first `length`. With it, shapes and addresses are the same for every token, as a
            CUDA graph needs; the window is then block_size long, and what follows the new token
            in it has no effect.
    """

    def __init__(self, block_size: int):
        self.block_size, self.length, self.size = block_size, 0, 0
        self.position: torch.Tensor | None = None
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def new_tokens(self, ids: torch.Tensor) -> slice | torch.Tensor:
        """The index of the new tokens on the time axis of the window ids (B, T)."""
        T = ids.shape[1]
        self.new = slice(self.length, T) if self.position is None else self.position
        # A CUDA graph needs keys that stay where they are.
        grown = self.block_size if ids.device.type == "cuda" else -(-T // STEP) * STEP
        self.size = max(self.size, min(grown, self.block_size))  # N
        positions = torch.arange(self.size, device=ids.device)
        self.future = positions > positions[self.new][:, None]  # (n, N)
        return self.new

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store k and v (B, H, n, D) of the new tokens; attend from q to all tokens so far."""
        keys, values = self._grown(layer, k)
        keys[:, :, self.new] = k.type_as(keys)
        values[:, :, self.new] = v.type_as(values)
        if self.length == 0:
            return causal_attention(q, k, v, scale)
        # Over all N, not up to the new tokens: for many samples on a CPU, products of contiguous
        # matrices are faster than those of slices, and than torch's fused attention.
        scores = (q * scale).type_as(keys) @ keys.mT  # (B, H, n, N)
        weights = scores.masked_fill_(self.future, -math.inf).softmax(dim=-1)
        return (weights @ values).type_as(k)

    def _grown(self, layer: int, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, with memory for at least `size` tokens."""
        if layer not in self.layers:
            B, H, _, D = k.shape
            # On a CPU, a product of a few rows takes several times as long in bf16.
            few = k.device.type == "cpu" and B <= FEW
            empty = k.new_zeros(B, H, 0, D, dtype=torch.float32 if few else k.dtype)
            self.layers[layer] = (empty, empty)
        keys, values = self.layers[layer]
        if self.size > keys.shape[2]:
            padding = (0, 0, 0, self.size - keys.shape[2])
            keys, values = F.pad(keys, padding), F.pad(values, padding)
            self.layers[layer] = (keys, values)
        return keys, values


class RecordedAttention(KVCache):
    """A cache for one call of a model, which keeps the attention weights of each layer.

    Attributes:
        weights: (B, H, T, T) fp32 of each layer.
    """

    def __init__(self, block_size: int):
        super().__init__(block_size)
        self.weights: list[torch.Tensor] = []

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        scores = (q @ k.mT * scale).float()
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        self.weights.append(scores.masked_fill(future, -math.inf).softmax(dim=-1))
        return self.weights[-1].type_as(v) @ v
