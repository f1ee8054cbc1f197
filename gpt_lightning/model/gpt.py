"""The modern GPT: the lecture's GPT with later improvements that lower the loss at this size.

Tokens and n-grams are embedded, blocks of attention and feed-forward add to the residual stream,
and a linear head reads it. There are no biases, no learned norms and no position embeddings.
docs/experiments.md has the figures, also of what was tried and rejected.

Legend: B batch, T time (at most block_size), C channels (n_embd), H heads, D head size (C / H),
V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gpt_lightning.errors import UserError, at_least
from gpt_lightning.model.attention import MAX_BLOCK_SIZE, KVCache, causal_attention

# Largest numbers of rows of the n-gram embeddings; n-grams share rows beyond that. Those of longer
# n-grams have a prime number of rows: the row is a remainder, and a remainder by a power of two
# would depend on the n-gram's last bytes only.
PAIR_ROWS, NGRAM_ROWS = 1 << 15, 16_381
MULTI_TOKEN_WEIGHT = 0.3  # of the first multi-token head's loss; head n has a weight of 0.3 / n


@dataclass
class GPTConfig:
    """Settings of the modern GPT.

    Args:
        n_layer: number of blocks.
        n_head: attention heads in each block.
        n_embd: C, channels; a multiple of 2 n_head.
        dropout: fraction of the channels that is dropped in training from what each layer adds to
            the residual stream, the same channels at all positions of a window.
        n_gram: length of the longest n-grams that have embeddings, from 2 to 16.
        ngram_base: an n-gram is a number whose digits in this base are its tokens; 0: vocab_size.
            A model whose vocabulary has grown keeps the base of its first vocabulary, so that
            n-grams keep their rows.
        multi_token_heads: number of extra heads that predict further tokens after the next one,
            in training only (Gloeckle et al. 2024, "Better & Faster Large Language Models via
            Multi-token Prediction").
        vocab_size: V, number of distinct tokens; 0: filled in from the data.
        block_size: T, length of the context in tokens, at most 131,072; 0: filled in from the data.

    Raises:
        UserError: for a value out of range.
    """

    name: ClassVar[str] = "gpt"

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    n_gram: int = 3
    ngram_base: int = 0
    multi_token_heads: int = 1
    vocab_size: int = 0
    block_size: int = 0

    def __post_init__(self):
        at_least(1, n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)
        at_least(0, ngram_base=self.ngram_base, multi_token_heads=self.multi_token_heads)
        at_least(0, vocab_size=self.vocab_size, block_size=self.block_size)
        if self.block_size > MAX_BLOCK_SIZE:
            raise UserError(f"block_size={self.block_size} must be at most {MAX_BLOCK_SIZE}")
        if not 2 <= self.n_gram <= 16:
            raise UserError(f"n_gram={self.n_gram} must be between 2 and 16")
        if self.n_embd % (2 * self.n_head):
            raise UserError(
                f"n_embd={self.n_embd} must be a multiple of twice n_head={self.n_head}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be in [0, 1)")


def norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weights. RMSNorm reaches the same loss and is slower on a CPU."""
    return F.layer_norm(x, (x.shape[-1],)).type_as(x)


def rotary_table(config: GPTConfig) -> torch.Tensor:
    """Cosines and signed sines (2, T, 1, 1, D) of the rotary angles.

    Wavelengths grow from 2 pi to 10,000 times that (Su et al. 2021, "RoFormer").
    """
    half = config.n_embd // config.n_head // 2
    # on the CPU also for a model on the "meta" device, where these functions import for a second
    positions, channels = (torch.arange(n, device="cpu") for n in (config.block_size, half))
    angles = torch.outer(positions, 10_000.0 ** (-channels / half))  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
    return table[:, :, None, None]


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels of x (B, T, 2, H, D) by angles proportional to the position.

    The score of a query and a key then depends on the distance between their tokens.
    """
    left, right = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat([right, left], dim=-1) * rotary[1]


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # a part of the value that depends on the token alone (Zhou et al. 2024, "Value residual
        # learning")
        self.value_embedding = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor, rotary: torch.Tensor, cache: KVCache | None
    ) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        # normalized queries and keys keep the scores bounded (Henry et al. 2020, "QK-norm")
        q, k = rotate(norm(qkv[:, :, :2]), rotary).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        value_embedding = self.value_embedding(ids).view(B, T, self.n_head, -1)
        v = (qkv[:, :, 2] + value_embedding.type_as(qkv)).transpose(1, 2)  # (B, H, T, D)
        scale = q.shape[-1] ** -0.5
        if cache is None:
            out = causal_attention(q, k, v, scale)  # (B, H, T, D)
        else:
            out = cache.attend(self.layer, q, k, v, scale)
        return self.proj(out.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two linear layers with a squared ReLU between them (So et al. 2021, "Primer")."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.fc(x))  # (B, T, 4C)
        return self.proj(hidden * hidden)  # (B, T, C); autocast on CUDA makes `square` fp32


class Block(nn.Module):
    """Attention, then feed-forward; both read the normalized residual stream and add to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.dropout = config.dropout

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor, rotary: torch.Tensor, cache: KVCache | None
    ) -> torch.Tensor:
        x = x + self.drop(self.attn(norm(x), ids, rotary, cache))
        return x + self.drop(self.mlp(norm(x)))  # (B, T, C)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout with one mask (B, 1, C) for all positions: a tenth of the work on a CPU."""
        if not self.training or self.dropout == 0:
            return x
        return x * F.dropout(torch.ones_like(x[:, :1]), self.dropout)


class GPT(nn.Module):
    """The modern GPT: token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        self.ngram_base = config.ngram_base or V
        self.token_embedding = nn.Embedding(V, C)
        # pairs, triples, ... of input tokens (Huang et al. 2025, "Over-tokenized transformer")
        self.pair_embedding = nn.Embedding(min(self.ngram_base**2, PAIR_ROWS), C)
        self.ngram_embeddings = nn.ModuleList(
            nn.Embedding(min(self.ngram_base**n, NGRAM_ROWS), C)
            for n in range(3, config.n_gram + 1)
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = nn.Linear(C, V, bias=False)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self.multi_token_heads = nn.ModuleList(
            nn.Linear(C, V, bias=False) for _ in range(config.multi_token_heads)
        )
        # All heads, and all layers whose output is added to the token embeddings, start at zero, so
        # that the initial predictions are uniform.
        zeros = [self.pair_embedding, *self.ngram_embeddings, self.lm_head, *self.multi_token_heads]
        zeros += [layer.proj for block in self.blocks for layer in (block.attn, block.mlp)]
        for module in zeros:
            nn.init.zeros_(module.weight)

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits of the next token for ids (B, T); with a cache, those of the new tokens.

        With targets (B, T), the next tokens, returns logits and `multi_token_loss`.
        """
        T, block_size = ids.shape[1], self.config.block_size
        assert block_size >= T, f"{T} tokens, block_size {block_size}"
        new = slice(T) if cache is None else cache.new_tokens(ids)
        x = norm(self.embed(ids, new))  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream too: otherwise every layer converts its input and its output
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rotary = self.rotary[:, new].type_as(x)
        for block in self.blocks:
            x = block(x, ids[:, new], rotary, cache)
        if cache is not None:
            cache.length = T
        x = norm(x)
        logits = self.lm_head(x)  # (B, T, V)
        return logits if targets is None else (logits, self.multi_token_loss(x, targets))

    def embed(self, ids: torch.Tensor, new: slice | torch.Tensor) -> torch.Tensor:
        """Sum of the embeddings of each token and of the n-grams that end with it.

        Args:
            ids: (B, T); n-grams that begin before the window are filled up with its first token.
            new: index of the positions to embed.

        Returns:
            (B, n, C) for n positions.
        """
        longest = self.config.n_gram - 1
        padded = torch.cat([ids[:, :1].expand(-1, longest), ids], dim=1)
        ngram = ids[:, new]  # as a number whose digits, base `ngram_base`, are its tokens
        x = self.token_embedding(ngram)
        for n, table in enumerate([self.pair_embedding, *self.ngram_embeddings], start=1):
            token = padded[:, longest - n :][:, new]  # n positions earlier
            # the factor is reduced so that it does not overflow; the remainder stays the same
            ngram = ngram + token * (self.ngram_base**n % (PAIR_ROWS * NGRAM_ROWS))
            x = x + table(ngram % table.num_embeddings)
        return x

    def multi_token_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the multi-token heads' cross-entropies, in nats per token and in fp32.

        Args:
            x: (B, T, C) what the heads read.
            targets: (B, T) the next tokens; head n predicts the n-th token after them.
        """
        loss = x.new_zeros((), dtype=torch.float32)
        for n, head in enumerate(self.multi_token_heads, start=1):
            if n < targets.shape[1]:
                logits = head(x[:, :-n]).flatten(0, 1).float()  # (B * (T - n), V)
                cross_entropy = F.cross_entropy(logits, targets[:, n:].flatten())
                loss = loss + MULTI_TOKEN_WEIGHT / n * cross_entropy
        return loss
