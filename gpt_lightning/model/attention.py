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

    A CPU writes many rows faster by attending to all of that room, with what is not filled yet
    masked: in bf16 a whole tensor is multiplied in a third to a half of the time of a slice.
    For few rows it keeps fp32, whatever the model is in: one token's attention to a slice takes
    three to seven times as long in bf16.

    Args:
        config: the model's: n_layer, n_head, n_embd, block_size.
        batch_size: B.
        device, dtype: of the model.

    Attributes:
        start: tokens before the present step.
        length: N, tokens with it, the same in every row.
        mask: (n, room) 0, or minus infinity where a token must not look; None where none is needed.
        last: (B, n) the last ids, for a model whose embedding looks back so far.
    """

    def __init__(self, config, batch_size: int, device: torch.device, dtype: torch.dtype):
        self.whole = device.type == "cpu" and batch_size > FEW
        if device.type == "cpu" and not self.whole:
            dtype = torch.float32
        self.block_size, self.room = config.block_size, 0
        self.kind = {"device": device, "dtype": dtype}
        shape = (batch_size, config.n_head, 0, config.n_embd // config.n_head)
        self.keys, self.values = (
            [torch.empty(shape, **self.kind) for _ in range(config.n_layer)] for _ in range(2)
        )
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
            # zeros: where the mask puts a weight of 0, it is multiplied all the same
            self.keys, self.values = (
                [F.pad(layer, (0, 0, 0, room - self.room)) for layer in part]
                for part in (self.keys, self.values)
            )
            self.room = room
        self.mask = None
        if self.whole or (n > 1 and self.start > 0):
            ahead = torch.full((n, self.room), -math.inf, **self.kind).triu(self.start + 1)
            self.mask = ahead if self.whole else ahead[:, : self.length]
        return self.start, self.length

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Take in the new tokens' k and v (B, H, n, D), and attend from q to all so far.

        Returns:
            (B, H, n, D), each new token's gathering from itself and those before it.
        """
        B, H, n, D = q.shape
        keys, values = self.keys[layer], self.values[layer]  # (B, H, room, D)
        keys[:, :, self.start : self.length] = k
        values[:, :, self.start : self.length] = v
        q = q.type_as(keys)
        if self.whole:
            keys, values = keys.view(B * H, -1, D), values.view(B * H, -1, D)
            weights = torch.baddbmm(self.mask, q.reshape(B * H, n, D), keys.mT, alpha=scale)
            out = (weights.softmax(dim=-1) @ values).view(B, H, n, D)
        else:
            out = F.scaled_dot_product_attention(
                q,
                keys[:, :, : self.length],
                values[:, :, : self.length],
                attn_mask=self.mask,
                is_causal=n > 1 and self.start == 0,
                scale=scale,
            )
        return out.type_as(k)
