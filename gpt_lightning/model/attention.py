"""What both models share of attention: the causal one of training, and the cached one of writing.

Legend: B batch, T time (block_size), H heads, D head size, N tokens so far, n new ones.
"""

import math

import torch
import torch.nn.functional as F


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

    There is room for a window of `block_size` tokens, allocated once and filled from the left.
    On a CPU it is in fp32, whatever the model is in: torch's attention of one token to all takes
    three to seven times as long in bf16.

    Args:
        config: the model's: n_layer, n_head, n_embd, block_size.
        batch_size: B.
        device, dtype: of the model.

    Attributes:
        length: N, the same in every row. The model raises it at the end of its forward.
        last: (B, 1) the last id, for a model whose embedding looks one token back.
    """

    def __init__(self, config, batch_size: int, device: torch.device, dtype: torch.dtype):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        if device.type == "cpu":
            dtype = torch.float32
        self.keys, self.values = (
            [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
            for _ in range(2)
        )
        self.length = 0
        self.last: torch.Tensor | None = None

    def clear(self) -> None:
        """Forget all tokens; the room stays."""
        self.length, self.last = 0, None

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Take in the new tokens' k and v (B, H, n, D), and attend from q to all so far.

        Returns:
            (B, H, n, D), each new token's gathering from itself and those before it.
        """
        n, stop = q.shape[2], self.length + q.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : stop] = k
        values[:, :, self.length : stop] = v
        mask = None
        if n > 1 and self.length > 0:
            mask = torch.ones(n, stop, dtype=torch.bool, device=q.device).tril(self.length)
        out = F.scaled_dot_product_attention(
            q.type_as(keys),
            keys[:, :, :stop],
            values[:, :, :stop],
            attn_mask=mask,
            is_causal=n > 1 and mask is None,
            scale=scale,
        )
        return out.type_as(q)
