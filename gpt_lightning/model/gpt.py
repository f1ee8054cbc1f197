"""The modern GPT: the lecture's, with what has been learned since, where it pays at this size.

From token ids to logits, top-down:

1. a token's embedding, plus one for each n-gram that ends with it: the pair with the token before
   it, the triple with the two before it, and so on;
2. blocks of attention (rotary positions, normalised queries and keys, value embeddings) and
   feed-forward (squared ReLU), each reading a normalised stream and adding to it, nothing at first:
   their last matrices begin at zero;
3. a head of its own, zero at first too.

No biases, no learned norms, no position table. What was tried besides and does not pay is in
docs/experiments.md, with its figures.

Legend: B batch, T time (at most block_size), C channels (n_embd), H heads, D head size (C / H),
V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gpt_lightning.model.attention import KVCache, causal_attention

# Rows of an embedding at most, where n-grams share them: of pairs, and of longer ones. A prime for
# these: the row is a remainder, which with a power of two would know the last bytes alone.
PAIRS, NGRAMS = 1 << 15, 16_381


@dataclass
class GPTConfig:
    """The modern GPT in numbers.

    Args:
        vocab_size: V, distinct tokens; follows from the text.
        block_size: T, the longest context.
        n_layer: blocks, one after the other.
        n_head: attention heads in each block.
        n_embd: C, channels; a multiple of 2 n_head.
        dropout: share of channels dropped in training, of what each layer adds to the stream; in a
            window the same ones at all positions.
        n_gram: up to so many tokens in a row have an embedding together, from 2 to 16.

    Raises:
        ValueError: in one line that names the flag, for sizes that cannot be.
    """

    vocab_size: int
    block_size: int
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    n_gram: int = 3

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"--model.{name}={getattr(self, name)} must be at least 1")
        if not 2 <= self.n_gram <= 16:
            raise ValueError(f"--model.n_gram={self.n_gram} must lie in [2, 16]")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"--model.n_embd={self.n_embd} is not divisible by twice "
                f"--model.n_head={self.n_head}: each head takes an equal and even share"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--model.dropout={self.dropout} must lie in [0, 1)")


def norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weights: RMSNorm comes to the same loss, and torch takes three to seven
    times as long for it on a CPU."""
    return F.layer_norm(x, (x.shape[-1],)).type_as(x)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Turn pairs of channels of x (..., T, 1, H, D) by angles that grow with the position.

    A score then depends on how far apart two tokens are (rotary positions, Su et al. 2021).
    """
    left, right = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat([right, left], dim=-1) * rotary[1]


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # a value that each token has for itself (Zhou et al. 2024, "Value residual learning")
        self.value_embedding = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor, rotary: torch.Tensor, cache: KVCache | None
    ) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        # normalised queries and keys: scores stay bounded (Henry et al. 2020, "QK-norm")
        q, k = rotate(norm(qkv[:, :, :2]), rotary).permute(2, 0, 3, 1, 4)
        own = self.value_embedding(ids).view(B, T, self.n_head, -1)
        v = (qkv[:, :, 2] + own.type_as(qkv)).transpose(1, 2)
        scale = q.shape[-1] ** -0.5
        if cache is None:
            out = causal_attention(q, k, v, scale)  # (B, H, T, D)
        else:
            out = cache.attend(self.layer, q, k, v, scale)
        return self.proj(out.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Squared ReLU, four times as wide inside (So et al. 2021, "Primer")."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    """Attention, then feed-forward, each added to the stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x, ids, rotary, cache):
        x = x + self.drop(self.attn(norm(x), ids, rotary, cache))
        return x + self.drop(self.mlp(norm(x)))

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout with one mask for all positions of a window, a tenth of the work on a CPU."""
        if not self.training or self.dropout == 0:
            return x
        return x * F.dropout(torch.ones_like(x[:, :1]), self.dropout)


class GPT(nn.Module):
    """The modern GPT: token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        self.token_embedding = nn.Embedding(V, C)
        # n-grams of the input (Huang et al. 2025, "Over-tokenized transformer")
        self.pair_embedding = nn.Embedding(min(V**2, PAIRS), C)
        self.ngram_embeddings = nn.ModuleList(  # of triples, ...
            nn.Embedding(min(V**n, NGRAMS), C) for n in range(3, config.n_gram + 1)
        )
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.lm_head = nn.Linear(C, V, bias=False)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        for module in (self.pair_embedding, *self.ngram_embeddings, self.lm_head):
            nn.init.zeros_(module.weight)
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)

    def forward(
        self, ids: torch.Tensor, cache: KVCache | None = None, with_features: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits of ids (B, T), which in generation go on from what the cache has seen.

        `with_features` adds what the head reads, (B, T, C).
        """
        start, stop = cache.extend(ids.shape[1]) if cache else (0, ids.shape[1])
        assert self.config.block_size >= stop, f"{stop} tokens, block_size {self.config.block_size}"
        x = norm(self.embed(ids, cache))  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # the stream too, or every layer would copy its input and its result
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rotary = self.rotary[:, start:stop].type_as(x)
        for block in self.blocks:
            x = block(x, ids, rotary, cache)
        x = norm(x)
        logits = self.lm_head(x)  # (B, T, V)
        return (logits, x) if with_features else logits

    def embed(self, ids: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """Each token alone, and in each n-gram that it ends, (B, T, C).

        Before the first one stands itself.
        """
        (B, T), behind = ids.shape, self.config.n_gram - 1
        last = cache.last if cache is not None else None
        known = torch.cat([ids[:, :1].expand(B, behind) if last is None else last, ids], dim=1)
        if cache is not None:
            cache.last = known[:, T:]
        x, number = self.token_embedding(ids), ids
        for n, table in enumerate([self.pair_embedding, *self.ngram_embeddings], start=1):
            # the n-gram as a number whose digits are its tokens, less what leaves no remainder
            digit = self.config.vocab_size**n % (PAIRS * NGRAMS)
            number = number + known[:, behind - n : behind - n + T] * digit
            x = x + table(number % table.num_embeddings)
        return x


def rotary_table(config: GPTConfig) -> torch.Tensor:
    """Cosines, and sines with their signs, (2, T, 1, 1, D): wavelengths from 2 pi to 10,000 times
    that."""
    half = config.n_embd // config.n_head // 2
    angles = torch.outer(
        torch.arange(config.block_size), 10_000.0 ** (-torch.arange(half) / half)
    )  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
    return table[:, :, None, None]
