"""The lecture's models: the bigram table, and the GPT that it grows into.

Read it top-down with the lecture notes open. As it stands it is the lecture's final GPT; the last
switches of `LectureConfig` take its ideas away one by one, down to the first rung of the ladder in
`configs/lecture/`. `tests/lecture_oracle.py` keeps every rung written out as the lecture has it, a
list of heads and all, to which this is equal.

Legend: B batch, T time (at most block_size), C channels (n_embd), H heads, D head size (C / H),
V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gpt_lightning.model.attention import KVCache, causal_attention


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
        scaled: scores are divided by the root of the head size.
        ffwd: width of the feed-forward in multiples of n_embd; 0 leaves it out.
        residual: attention and feed-forward add to what was there, and do not replace it.
        proj: output projections behind the heads and behind the feed-forward's ReLU.
        norm: LayerNorm before attention and feed-forward, and before the head.
        fused: attention in one fused call; false writes it out as the lecture does.

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
    scaled: bool = True
    ffwd: int = 4
    residual: bool = True
    proj: bool = True
    norm: bool = True
    fused: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"--model.{name}={getattr(self, name)} must be at least 1")
        for name in ("n_layer", "ffwd"):
            if getattr(self, name) < 0:
                raise ValueError(f"--model.{name}={getattr(self, name)} must be at least 0")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"--model.n_embd={self.n_embd} is not divisible by --model.n_head={self.n_head}: "
                "each head takes an equal share of the channels"
            )
        if self.ffwd > 1 and not self.proj:
            raise ValueError(
                f"--model.ffwd={self.ffwd} needs --model.proj=true, which brings that width back "
                "to n_embd; without it the feed-forward can be 1 wide"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--model.dropout={self.dropout} must lie in [0, 1)")
        if self.init_std is not None and not 0 <= self.init_std < float("inf"):
            raise ValueError(f"--model.init_std={self.init_std} must be 0 or more")


class MultiHeadAttention(nn.Module):
    """Masked self-attention: every position gathers from itself and those before it."""

    def __init__(self, config: LectureConfig, layer: int = 0):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.dropout, self.fused = config.dropout, config.fused
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scaled else 1.0
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Identity()
        if config.proj:
            self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of all heads, (B, H, T, D) each."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        return qkv.permute(2, 0, 3, 1, 4).unbind()

    def weights(self, q: torch.Tensor, k: torch.Tensor, causal: bool = True) -> torch.Tensor:
        """What each position takes of each, (B, H, T, T): every row sums to 1.

        Without the mask (`causal=False`) this is an encoder's attention.
        """
        wei = q @ k.transpose(-2, -1) * self.scale  # (B, H, T, T)
        if causal:
            future = torch.ones_like(wei, dtype=torch.bool).triu(1)
            wei = wei.masked_fill(future, -math.inf)
        return F.softmax(wei, dim=-1)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        q, k, v = self.heads(x)
        if cache is not None:  # in generation: x are the new tokens only
            out = cache.attend(self.layer, q, k, v, self.scale)
        elif self.fused:  # the same as below in one call
            out = causal_attention(q, k, v, self.scale, self.dropout * self.training)
        else:
            out = F.dropout(self.weights(q, k), self.dropout, self.training) @ v
        out = out.transpose(1, 2).reshape(x.shape)  # heads side by side again: (B, T, C)
        return F.dropout(self.proj(out), self.dropout, self.training)


class FeedForward(nn.Module):
    """Each position thinks for itself about what it gathered: four times as wide inside."""

    def __init__(self, config: LectureConfig):
        super().__init__()
        width = config.ffwd * config.n_embd
        layers = [nn.Linear(config.n_embd, width, bias=config.bias), nn.ReLU()]
        if config.proj:
            layers.append(nn.Linear(width, config.n_embd, bias=config.bias))
        self.net = nn.Sequential(*layers, nn.Dropout(config.dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # (B, T, C)


class Block(nn.Module):
    """Communication, then computation, each behind a norm and around a residual connection."""

    def __init__(self, config: LectureConfig, layer: int):
        super().__init__()
        self.residual = config.residual
        self.ln1 = layer_norm(config)
        self.sa = MultiHeadAttention(config, layer)
        if config.ffwd:
            self.ln2 = layer_norm(config)
            self.ffwd = FeedForward(config)
        else:
            self.ffwd = None

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        x = self.sa(self.ln1(x), cache) + (x if self.residual else 0)
        if self.ffwd is not None:
            x = self.ffwd(self.ln2(x)) + (x if self.residual else 0)
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
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = layer_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        if config.init_std is not None:
            self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits of ids (B, T), which in generation go on from what the cache has seen."""
        start, stop = cache.extend(ids.shape[1]) if cache else (0, ids.shape[1])
        assert self.config.block_size >= stop, f"{stop} tokens, block_size {self.config.block_size}"
        positions = torch.arange(start, stop, device=ids.device)
        x = self.token_embedding_table(ids) + self.position_embedding_table(positions)  # (B, T, C)
        for block in self.blocks:
            x = block(x, cache)
        return self.lm_head(self.ln_f(x))  # (B, T, V)


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

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        return self.token_embedding_table(ids)  # (B, T, V)

    @torch.no_grad()
    def count(self, pieces: Iterable[torch.Tensor], smoothing: float = 1.0) -> "Bigram":
        """Fill the table by counting which token follows which: what training has to arrive at.

        Args:
            pieces: token ids (N,) of each uninterrupted piece of text.
            smoothing: added to each of the V * V counts, so that a pair which never occurred
                costs much and not everything (Laplace's rule at 1).
        """
        V = self.config.vocab_size
        counts = torch.zeros(V * V, dtype=torch.float64)
        for ids in pieces:
            counts += torch.bincount(ids[:-1].long() * V + ids[1:].long(), minlength=V * V)
        counts = counts.view(V, V) + smoothing
        self.token_embedding_table.weight.copy_((counts / counts.sum(1, keepdim=True)).log())
        return self
