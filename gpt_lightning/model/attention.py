"""What both models share of attention: the causal one of training, and the cached one of writing.

Legend: B batch, T time (block_size), H heads, D head size, N tokens so far, n new ones.
"""

import math

import torch
import torch.nn.functional as F

STEP = 64  # tokens by which the cache grows
FEW = 8  # rows, up to which a CPU reads slices of the cache, in fp32


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(scale q k^T) v, where no position looks ahead: (B, H, T, D), as each of q, k, v.

    `dropout` is the share of the softmax's weights that is dropped.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout
        )
    # torch's fused kernel for bf16 on CPUs takes three to five times as long as this
    B, H, T, D = q.shape
    q, k, v = (part.reshape(B * H, T, D) for part in (q, k, v))
    ahead = q.new_full((T, T), -math.inf).triu(1)
    weights = torch.baddbmm(ahead, q, k.mT, alpha=scale).softmax(dim=-1)  # (B * H, T, T)
    return (F.dropout(weights, dropout, dropout > 0) @ v).view(B, H, T, D)


class KVCache:
    """Keys and values of the tokens so far, kept so that a new token costs one token's work.

    There is room for a window of at most `block_size` tokens, filled from the left; it grows by
    `STEP` tokens at a time.

    A CPU takes both of attention's products for many rows as weighted sums of the cache's rows: a
    score is a sum over channels, so there the keys lie transposed. `embedding_bag` reads each
    row once, as it lies, in half of a matrix product's time, which rearranges them first.
    For few rows the cache is fp32, whatever the model is in: one token's attention to it takes
    three to seven times as long in bf16.

    Args:
        config: the model's: n_layer, n_head, n_embd, block_size.
        batch_size: B.
        device, dtype: of the model.

    Attributes:
        start: tokens before the present step.
        length: N, tokens with it, the same in every row.
        mask: (n, N) 0, or minus infinity where a token must not look; None where none is needed.
        channels, tokens: (B * H, D) and (B * H, N), the rows that a new token's products add up, of
            all keys and of all values, where a CPU writes many rows.
        last: (B, n) the last ids, for a model whose embedding looks back so far.
    """

    def __init__(self, config, batch_size: int, device: torch.device, dtype: torch.dtype):
        self.many = device.type == "cpu" and batch_size > FEW
        if device.type == "cpu" and not self.many:
            dtype = torch.float32
        self.block_size, self.room = config.block_size, 0
        self.kind = {"device": device, "dtype": dtype}
        B, H, D = batch_size, config.n_head, config.n_embd // config.n_head
        key_shape = (B, H, D, 0) if self.many else (B, H, 0, D)
        self.keys = [torch.empty(key_shape, **self.kind) for _ in range(config.n_layer)]
        self.values = [torch.empty((B, H, 0, D), **self.kind) for _ in range(config.n_layer)]
        self.channels = torch.arange(B * H * D).view(B * H, D)
        self.clear()

    def clear(self) -> None:
        """Forget all tokens; the room stays."""
        self.start = self.length = 0
        self.mask: torch.Tensor | None = None
        self.last: torch.Tensor | None = None

    def extend(self, n: int) -> tuple[int, int]:
        """Make room for the next n tokens, which each layer's `attend` then fills.

        Returns:
            their first position, and that after their last.
        """
        self.start, self.length = self.length, self.length + n
        if self.length > self.room:
            room = min(-(-self.length // STEP) * STEP, self.block_size)
            more = (0, 0, 0, room - self.room)
            self.keys = [F.pad(keys, more[2:] if self.many else more) for keys in self.keys]
            self.values = [F.pad(values, more) for values in self.values]
            self.room = room
        self.mask = None
        if n > 1 and self.start > 0:
            self.mask = torch.full((n, self.length), -math.inf, **self.kind).triu(self.start + 1)
        elif self.many:
            first = torch.arange(0, self.channels.shape[0] * self.room, self.room)
            self.tokens = first[:, None] + torch.arange(self.length)
        return self.start, self.length

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Take in the new tokens' k and v (B, H, n, D), and attend from q to all so far.

        Returns:
            (B, H, n, D), each new token's gathering from itself and those before it.
        """
        B, H, n, D = q.shape
        keys, values = self.keys[layer], self.values[layer]  # values: (B, H, room, D)
        seen = keys.mT if self.many else keys  # (B, H, room, D)
        seen[:, :, self.start : self.length] = k
        values[:, :, self.start : self.length] = v
        if self.start == 0:
            return causal_attention(q, k, v, scale)
        q = q.type_as(keys)
        if self.many and n == 1:
            q = q.reshape(B * H, D) * scale
            scores = weighted_sums(keys.view(-1, self.room), self.channels, q)[:, : self.length]
            out = weighted_sums(values.view(-1, D), self.tokens, scores.softmax(dim=-1))
            out = out.view(B, H, n, D)
        else:
            seen, values = seen[:, :, : self.length], values[:, :, : self.length]
            out = F.scaled_dot_product_attention(q, seen, values, attn_mask=self.mask, scale=scale)
        return out.type_as(k)


def weighted_sums(table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of each of b groups of r rows of a table (_, C) their weighted sum, (b, C).

    `rows` and `weights`: (b, r).
    """
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
