"""The lecture's models: the bigram table, and the GPT that it grows into.

Read it top-down with the lecture notes open. Heads are computed side by side by one fused call;
`tests/lecture_oracle.py` keeps the lecture's list of heads, to which this is equal.

Legend: B batch, T time (at most block_size), C channels (n_embd), H heads, D head size (C / H),
V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class LectureConfig:
    """The lecture's GPT in numbers.

    Args:
        vocab_size: V, distinct tokens; follows from the text.
        block_size: T, the longest context.
        n_layer: blocks, one after the other.
        n_head: attention heads in each block.
        n_embd: C, channels; a multiple of n_head.
        dropout: share of activations dropped in training, at the lecture's three places.
        bias: biases in the projections, the feed-forward and the norms. Queries, keys and values
            never have one, the head always does, as in the lecture.
        init_std: standard deviation of the initial weights: 0.02 is what the lecture's author
            recommends after it; null leaves torch's own initialisation, as the lecture typed it.

    Raises:
        ValueError: in one line that names the flag, for sizes that cannot be.
    """

    vocab_size: int
    block_size: int
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True
    init_std: float | None = 0.02

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"--model.{name}={getattr(self, name)} must be at least 1")
        if self.n_layer < 0:
            raise ValueError(f"--model.n_layer={self.n_layer} must be at least 0")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"--model.n_embd={self.n_embd} is not divisible by --model.n_head={self.n_head}: "
                "each head takes an equal share of the channels"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--model.dropout={self.dropout} must lie in [0, 1)")
        if self.init_std is not None and not 0 <= self.init_std < float("inf"):
            raise ValueError(f"--model.init_std={self.init_std} must be 0 or more")


class MultiHeadAttention(nn.Module):
    """Masked self-attention: every position gathers from itself and those before it."""

    def __init__(self, config: LectureConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        dropout = self.dropout if self.training else 0.0
        # softmax(q k^T / sqrt(D), masked) v, with dropout on the softmax
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out = out.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return F.dropout(self.proj(out), self.dropout, self.training)  # (B, T, C)


class FeedForward(nn.Module):
    """Each position thinks for itself about what it gathered: four times as wide inside."""

    def __init__(self, config: LectureConfig):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias),
            nn.ReLU(),
            nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # (B, T, C)


class Block(nn.Module):
    """Communication, then computation, each behind a norm and around a residual connection."""

    def __init__(self, config: LectureConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.sa = MultiHeadAttention(config)
        self.ln2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.ffwd = FeedForward(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.sa(self.ln1(x))
        x = x + self.ffwd(self.ln2(x))
        return x  # (B, T, C)


class LectureGPT(nn.Module):
    """The lecture's final GPT: token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: LectureConfig):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        if config.init_std is not None:
            self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        T = ids.shape[1]
        assert self.config.block_size >= T, f"{T} tokens, block_size {self.config.block_size}"
        positions = torch.arange(T, device=ids.device)
        x = self.token_embedding_table(ids) + self.position_embedding_table(positions)  # (B, T, C)
        x = self.blocks(x)
        x = self.ln_f(x)
        return self.lm_head(x)  # (B, T, V)


class Bigram(nn.Module):
    """The lecture's baseline: each token looks up the logits of the next one, and nothing else.

    Of the config it uses `vocab_size` and `block_size` (the window that data comes in), no more.
    """

    def __init__(self, config: LectureConfig):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.vocab_size)
        if config.init_std is not None:
            nn.init.normal_(self.token_embedding_table.weight, std=config.init_std)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.token_embedding_table(ids)  # (B, T, V)
