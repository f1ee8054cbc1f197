"""The lecture's models in the lecture's own form: one small module per head, softmax by hand.

In the order of the lecture, from the bigram table to its last listing; `LADDER` at the end has the
rungs built from them.

Frozen: `gpt_lightning.model.lecture` must stay equal to this, so only a misreading of the lecture
is a reason to change it. The package never imports it, and it does not import the package. Two of
the package's choices are followed so that weights can be copied: `bias`, and scores divided by the
square root of the head size (the notes' listing has the number of channels; their formula has the
head size).

Legend: B batch, T time (at most block_size), C channels (n_embd), D head size, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class BigramLanguageModel(nn.Module):
    """The lecture's first model: the next token's logits are a row of a table."""

    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None):
        logits = self.token_embedding_table(idx)  # (B, T, V)
        return logits, next_token_loss(logits, targets)


def next_token_loss(logits, targets):
    if targets is None:
        return None
    B, T, V = logits.shape
    return F.cross_entropy(logits.view(B * T, V), targets.view(B * T))


class EmbeddingLanguageModel(nn.Module):
    """Tokens and positions are embedded, and a linear head reads them."""

    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets=None):
        tok_emb = self.token_embedding_table(idx)  # (B, T, C)
        pos_emb = self.position_embedding_table(torch.arange(idx.shape[1]))  # (T, C)
        x = self.between(tok_emb + pos_emb)  # (B, T, C)
        logits = self.lm_head(x)  # (B, T, V)
        return logits, next_token_loss(logits, targets)

    def between(self, x):
        """What later models put between embedding and head: nothing here."""
        return x


class UnscaledHead(nn.Module):
    """One head of masked self-attention, as it is first written."""

    def __init__(self, n_embd, head_size, block_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        T = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)  # (B, T, D)
        wei = q @ k.transpose(1, 2)  # (B, T, T)
        wei = wei.masked_fill(self.tril[:T, :T] == 0, -math.inf)
        wei = F.softmax(wei, dim=-1)
        return wei @ v  # (B, T, D)


class Head(nn.Module):
    """One head of scaled masked self-attention; its dropout comes last in the lecture."""

    def __init__(self, n_embd, head_size, block_size, dropout=0.0):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        T = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)  # (B, T, D)
        wei = q @ k.transpose(1, 2) / math.sqrt(k.shape[-1])  # (B, T, T)
        wei = wei.masked_fill(self.tril[:T, :T] == 0, -math.inf)
        wei = self.dropout(F.softmax(wei, dim=-1))
        return wei @ v  # (B, T, D)


class OneHeadLanguageModel(EmbeddingLanguageModel):
    """One head of n_embd channels between embedding and linear head."""

    def __init__(self, vocab_size, block_size, n_embd, head):
        super().__init__(vocab_size, block_size, n_embd)
        self.sa_head = head

    def between(self, x):
        return self.sa_head(x)


class HeadsSideBySide(nn.Module):
    """Multi-head attention as it is first written: no projection yet."""

    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        size = n_embd // n_head
        self.heads = nn.ModuleList([Head(n_embd, size, block_size) for _ in range(n_head)])

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, C)


class FourHeadsLanguageModel(EmbeddingLanguageModel):
    """Four heads of a quarter of the channels each."""

    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__(vocab_size, block_size, n_embd)
        self.sa_heads = HeadsSideBySide(n_embd, 4, block_size)

    def between(self, x):
        return self.sa_heads(x)


class LinearReLU(nn.Module):
    """The feed-forward as it is first written: one layer, applied to each position alone."""

    def __init__(self, n_embd):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_embd, n_embd), nn.ReLU())

    def forward(self, x):
        return self.net(x)


class FeedForwardLanguageModel(EmbeddingLanguageModel):
    """Four heads, and then the feed-forward."""

    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__(vocab_size, block_size, n_embd)
        self.sa_heads = HeadsSideBySide(n_embd, 4, block_size)
        self.ffwd = LinearReLU(n_embd)

    def between(self, x):
        x = self.sa_heads(x)
        return self.ffwd(x)


class PlainBlock(nn.Module):
    """Communication, then computation, each replacing its input."""

    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.sa = HeadsSideBySide(n_embd, n_head, block_size)
        self.ffwd = LinearReLU(n_embd)

    def forward(self, x):
        x = self.sa(x)
        x = self.ffwd(x)
        return x


class ResidualBlock(nn.Module):
    """Attention and feed-forward (of any rung), each added to its input."""

    def __init__(self, sa, ffwd):
        super().__init__()
        self.sa = sa
        self.ffwd = ffwd

    def forward(self, x):
        x = x + self.sa(x)
        x = x + self.ffwd(x)
        return x


class BlocksLanguageModel(EmbeddingLanguageModel):
    """A sequence of blocks, without a final norm."""

    def __init__(self, vocab_size, block_size, n_embd, blocks):
        super().__init__(vocab_size, block_size, n_embd)
        self.blocks = nn.Sequential(*blocks)

    def between(self, x):
        return self.blocks(x)


class MultiHeadAttention(nn.Module):
    """Concatenated heads and a projection."""

    def __init__(self, n_embd, n_head, block_size, dropout=0.0, bias=True):
        super().__init__()
        size = n_embd // n_head
        self.heads = nn.ModuleList([Head(n_embd, size, block_size, dropout) for _ in range(n_head)])
        self.proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        out = torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, C)
        return self.dropout(self.proj(out))


class LinearReLULinear(nn.Module):
    """The feed-forward with a projection after it."""

    def __init__(self, n_embd):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, n_embd),
            nn.ReLU(),
            nn.Linear(n_embd, n_embd),
        )

    def forward(self, x):
        return self.net(x)


class FeedForward(nn.Module):
    """The same, four times as wide inside."""

    def __init__(self, n_embd, dropout=0.0, bias=True):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd, bias=bias),
            nn.ReLU(),
            nn.Linear(4 * n_embd, n_embd, bias=bias),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    """The final block: a LayerNorm before communication and before computation."""

    def __init__(self, n_embd, n_head, block_size, dropout, bias):
        super().__init__()
        self.sa = MultiHeadAttention(n_embd, n_head, block_size, dropout, bias)
        self.ffwd = FeedForward(n_embd, dropout, bias)
        self.ln1 = nn.LayerNorm(n_embd, bias=bias)
        self.ln2 = nn.LayerNorm(n_embd, bias=bias)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class GPTLanguageModel(nn.Module):
    """The lecture's last listing: idx (B, T), targets (B, T) -> logits (B, T, V), loss."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, dropout=0.0, bias=True):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        blocks = [Block(n_embd, n_head, block_size, dropout, bias) for _ in range(n_layer)]
        self.blocks = nn.Sequential(*blocks)
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets=None):
        pos = self.position_embedding_table(torch.arange(idx.shape[1]))  # (T, C)
        x = self.token_embedding_table(idx) + pos  # (B, T, C)
        logits = self.lm_head(self.ln_f(self.blocks(x)))  # (B, T, V)
        return logits, next_token_loss(logits, targets)


# The lecture's rungs by config name, built from vocab_size, block_size and n_embd.
LADDER = {
    "01_bigram": lambda V, T, C: BigramLanguageModel(V),
    "02_embedding": EmbeddingLanguageModel,
    "03_one_head": lambda V, T, C: OneHeadLanguageModel(V, T, C, UnscaledHead(C, C, T)),
    "04_scaled": lambda V, T, C: OneHeadLanguageModel(V, T, C, Head(C, C, T)),
    "05_four_heads": FourHeadsLanguageModel,
    "06_feed_forward": FeedForwardLanguageModel,
    "07_three_blocks": lambda V, T, C: BlocksLanguageModel(
        V, T, C, [PlainBlock(C, 4, T) for _ in range(3)]
    ),
    "08_residual": lambda V, T, C: BlocksLanguageModel(
        V, T, C, [ResidualBlock(HeadsSideBySide(C, 4, T), LinearReLU(C)) for _ in range(3)]
    ),
    "09_projections": lambda V, T, C: BlocksLanguageModel(
        V, T, C, [ResidualBlock(MultiHeadAttention(C, 4, T), LinearReLULinear(C)) for _ in range(3)]
    ),
    "10_wide_feed_forward": lambda V, T, C: BlocksLanguageModel(
        V, T, C, [ResidualBlock(MultiHeadAttention(C, 4, T), FeedForward(C)) for _ in range(3)]
    ),
    "11_layer_norm": lambda V, T, C: GPTLanguageModel(V, T, 3, 4, C),
    "12_dropout": lambda V, T, C: GPTLanguageModel(V, T, 3, 4, C, dropout=0.2),
    "13_scaled_up_gpu": lambda V, T, C: GPTLanguageModel(V, T, 6, 6, C, dropout=0.2),
}


def oracle_of(model):
    """The oracle with the shape and the weights of a `LectureGPT`."""
    c = model.config
    oracle = GPTLanguageModel(
        c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd, c.dropout, c.bias
    )
    copy_named(from_model(model.state_dict(), c.n_head), oracle)
    return oracle.train(model.training)


def from_model(named, n_head):
    """Tensors by our names (weights or gradients) -> the same tensors by the oracle's names.

    Our qkv.weight (3C, C) holds the rows of q, k and v in this order, each with D rows per head;
    each head of the oracle has three matrices (D, C).
    """
    found = {}
    for name, tensor in named.items():
        if not name.endswith("sa.qkv.weight"):
            found[name] = tensor
            continue
        D = tensor.shape[1] // n_head
        rows = iter(tensor.split(D))  # 3 * n_head pieces (D, C)
        for part in ("query", "key", "value"):
            for head in range(n_head):
                new = name.replace("qkv.weight", f"heads.{head}.{part}.weight")
                found[new] = next(rows)
    return found


def from_rung(oracle, named, n_head):
    """`from_model` for any rung: before the lecture has blocks, our first block is the model."""
    found = from_model(named, n_head)
    if hasattr(oracle, "blocks"):
        return found
    heads = "blocks.0.sa.heads.0." if hasattr(oracle, "sa_head") else "blocks.0.sa."
    place = "sa_head." if hasattr(oracle, "sa_head") else "sa_heads."
    return {n.replace(heads, place).replace("blocks.0.", ""): t for n, t in found.items()}


def copy_named(named, oracle):
    """Copy into the oracle's parameters; the names must be the same."""
    own = dict(oracle.named_parameters())
    assert own.keys() == named.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            assert parameter.shape == named[name].shape
            parameter.copy_(named[name])
