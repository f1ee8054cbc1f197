"""The lecture's models: the bigram model and the GPT.

With its defaults, `LectureGPT` is the lecture's final GPT. Each switch of `LectureConfig` turns off
one of its ideas, so that the configs in `configs/lecture/` describe every model of the lecture.
The tests check that each equals the lecture's own code in `tests/lecture_oracle.py`.

Legend: B batch, T time (at most block_size), C channels (n_embd), H heads, D head size (C / H),
V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gpt_lightning.errors import UserError, at_least, one_of
from gpt_lightning.model.attention import MAX_BLOCK_SIZE, KVCache, causal_attention

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


@dataclass
class LectureConfig:
    """Settings of the lecture's GPT.

    Args:
        n_layer: number of blocks.
        n_head: attention heads in each block.
        n_embd: C, channels; a multiple of n_head.
        dropout: fraction of activations dropped in training, in the lecture's three places.
        bias: use biases in the projections, the feed-forward and the norms. The head always has
            one.
        qkv_bias: use biases for queries, keys and values, as GPT-2 does; the lecture does not.
        init_std: standard deviation of the initial weights. 0.02 is what the lecture's author
            recommends after it; null uses torch's own initialization, as the lecture's code does.
        scaled: divide attention scores by the square root of the head size.
        ffwd: width of the feed-forward in multiples of n_embd; 0 removes it.
        residual: add the output of attention and feed-forward to their input.
        proj: linear layers after the attention heads and after the feed-forward's ReLU.
        norm: LayerNorm before attention, before the feed-forward and before the head.
        activation: of the feed-forward: relu, as in the lecture, gelu (nanoGPT) or gelu_tanh
            (GPT-2's approximation of it).
        fused: compute attention in one fused call; false computes it step by step as the lecture.
        vocab_size: V, number of distinct tokens; 0: filled in from the data.
        block_size: T, length of the context in tokens; 0: filled in from the data.

    Raises:
        UserError: for a value out of range.
    """

    name: ClassVar[str] = "lecture"

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True
    qkv_bias: bool = False
    init_std: float | None = 0.02
    scaled: bool = True
    ffwd: int = 4
    residual: bool = True
    proj: bool = True
    norm: bool = True
    activation: str = "relu"
    fused: bool = True
    vocab_size: int = 0
    block_size: int = 0

    def __post_init__(self):
        at_least(1, n_head=self.n_head, n_embd=self.n_embd)
        at_least(0, n_layer=self.n_layer, ffwd=self.ffwd)
        at_least(0, vocab_size=self.vocab_size, block_size=self.block_size)
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.ffwd > 1 and not self.proj:
            raise UserError(
                f"ffwd={self.ffwd} requires proj=true, the layer that reduces the feed-forward to "
                "n_embd channels again; without it, ffwd can be 0 or 1"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be in [0, 1)")
        one_of(ACTIVATIONS, activation=self.activation)
        check_init_std(self.init_std)


@dataclass
class BigramConfig:
    """Settings of the lecture's bigram model.

    Args:
        init_std: standard deviation of the initial weights; null uses torch's own initialization.
        vocab_size: V, number of distinct tokens; 0: filled in from the data.
        block_size: T, length of the windows of data, at most 131,072; 0: filled in from the data.
    """

    name: ClassVar[str] = "bigram"

    init_std: float | None = 0.02
    vocab_size: int = 0
    block_size: int = 0

    def __post_init__(self):
        at_least(0, vocab_size=self.vocab_size, block_size=self.block_size)
        if self.block_size > MAX_BLOCK_SIZE:
            raise UserError(f"block_size={self.block_size} must be at most {MAX_BLOCK_SIZE}")
        check_init_std(self.init_std)


def check_init_std(init_std: float | None) -> None:
    if init_std is not None and not 0 <= init_std < math.inf:
        raise UserError(f"init_std={init_std} must be 0 or a positive number")


class MultiHeadAttention(nn.Module):
    """Masked self-attention: every position gathers from itself and those before it."""

    def __init__(self, config: LectureConfig, layer: int = 0):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.dropout, self.fused = config.dropout, config.fused
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scaled else 1.0
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.proj: nn.Module = nn.Identity()
        if config.proj:
            self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of all heads, (B, H, T, D) each."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        return qkv.permute(2, 0, 3, 1, 4).unbind()

    def weights(self, q: torch.Tensor, k: torch.Tensor, causal: bool = True) -> torch.Tensor:
        """Attention weights (B, H, T, T); without a mask if not `causal`, as in an encoder."""
        wei = q @ k.transpose(-2, -1) * self.scale  # (B, H, T, T)
        if causal:
            future = torch.ones_like(wei, dtype=torch.bool).triu(1)
            wei = wei.masked_fill(future, -math.inf)
        return F.softmax(wei, dim=-1)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        q, k, v = self.heads(x)
        if cache is not None:  # in generation: x has the new tokens only
            out = cache.attend(self.layer, q, k, v, self.scale)
        elif self.fused:  # the same as the next branch, in one call
            out = causal_attention(q, k, v, self.scale, self.dropout * self.training)
        else:
            out = F.dropout(self.weights(q, k), self.dropout, self.training) @ v
        out = out.transpose(1, 2).reshape(x.shape)  # concatenate the heads: (B, T, C)
        return F.dropout(self.proj(out), self.dropout, self.training)


class FeedForward(nn.Module):
    """A small network that is applied to each position alone, `ffwd` times as wide inside."""

    def __init__(self, config: LectureConfig):
        super().__init__()
        width = config.ffwd * config.n_embd
        layers: list[nn.Module] = [nn.Linear(config.n_embd, width, bias=config.bias)]
        layers.append(ACTIVATIONS[config.activation]())
        if config.proj:
            layers.append(nn.Linear(width, config.n_embd, bias=config.bias))
        self.net = nn.Sequential(*layers, nn.Dropout(config.dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # (B, T, C)


class Block(nn.Module):
    """Communication, then computation, each after a norm and inside a residual connection."""

    def __init__(self, config: LectureConfig, layer: int):
        super().__init__()
        self.residual = config.residual
        self.ln1 = layer_norm(config)
        self.sa = MultiHeadAttention(config, layer)
        self.ffwd = None
        if config.ffwd:
            self.ln2 = layer_norm(config)
            self.ffwd = FeedForward(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        out = self.sa(self.ln1(x), cache)
        x = x + out if self.residual else out
        if self.ffwd is not None:
            out = self.ffwd(self.ln2(x))
            x = x + out if self.residual else out
        return x  # (B, T, C)


def layer_norm(config: LectureConfig) -> nn.Module:
    return nn.LayerNorm(config.n_embd, bias=config.bias) if config.norm else nn.Identity()


class LectureGPT(nn.Module):
    """The lecture's final GPT: token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: LectureConfig):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = layer_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        if config.init_std is not None:
            self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits of the next token for ids (B, T); with a cache, those of the new tokens."""
        T = ids.shape[1]
        new = slice(T) if cache is None else cache.new_tokens(ids)
        positions = torch.arange(T, device=ids.device)[new]
        x = self.token_embedding_table(ids[:, new]) + self.position_embedding_table(positions)
        for block in self.blocks:
            x = block(x, cache)  # (B, T, C)
        if cache is not None:
            cache.length = T
        return self.lm_head(self.ln_f(x))  # (B, T, V)


class Bigram(nn.Module):
    """The lecture's baseline: a table of the next token's logits for each token."""

    def __init__(self, config: BigramConfig):
        super().__init__()
        self.config = config
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.vocab_size)
        if config.init_std is not None:
            nn.init.normal_(self.token_embedding_table.weight, std=config.init_std)

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        if cache is not None:
            ids = ids[:, cache.new_tokens(ids)]
            cache.length += ids.shape[1]
        return self.token_embedding_table(ids)  # (B, T, V)

    @torch.no_grad()
    def count(self, pieces: Iterable[torch.Tensor], smoothing: float = 1.0) -> "Bigram":
        """Fill the table with the log probabilities of counted pairs, the optimum of training.

        `pieces` are the token ids (N,) of contiguous texts. `smoothing` is added to each count, so
        that a pair that never occurs has a finite loss.
        """
        V = self.config.vocab_size
        counts = torch.zeros(V * V, dtype=torch.float64)
        for ids in pieces:
            counts += torch.bincount(ids[:-1].long() * V + ids[1:].long(), minlength=V * V)
        counts = counts.view(V, V) + smoothing
        self.token_embedding_table.weight.copy_((counts / counts.sum(1, keepdim=True)).log())
        return self
