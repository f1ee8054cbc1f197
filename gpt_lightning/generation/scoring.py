"""What a text costs a model: token ids in, nats of each token out.

A model predicts a token from at most `block_size` tokens before it, so the text is cut into
windows. They do not overlap by default, as in validation. A stride below `block_size` moves a
window by fewer tokens and scores only the new ones: they have more context, and cost more time.

Legend: B windows, T tokens of a window, N predicted tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from gpt_lightning.data.tokenizers import Tokenizer
from gpt_lightning.data.windows import Span, exact_windows, windows_without_gradients
from gpt_lightning.errors import UserError, at_least
from gpt_lightning.generation.sampling import NOT_FINITE


class Piece(NamedTuple):
    """The next N tokens of a text and what they cost."""

    targets: np.ndarray  # (N,) token ids
    nats: np.ndarray  # (N,) fp32
    log_probs: torch.Tensor  # (N, V) fp32, on the model's device


@dataclass(frozen=True)
class Score:
    """The cost of a text, whose first token is not predicted.

    Args:
        nats: cost of all predicted tokens.
        tokens: number of predicted tokens.
        characters: number of characters that begin in them.
        bytes: their length in UTF-8.
    """

    nats: float
    tokens: int
    characters: int
    bytes: int

    @property
    def nats_per_character(self) -> float:
        return self.nats / self.characters

    @property
    def bits_per_character(self) -> float:
        return self.nats_per_character / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    @property
    def perplexity(self) -> float:
        """Of a token: a model that chooses among this many at random has the same cost."""
        return math.exp(self.nats / self.tokens)


@torch.inference_mode()
def predictions(
    model: nn.Module,
    ids: np.ndarray,
    spans: list[Span],
    stride: int | None = None,
    batch_size: int | None = None,
) -> Iterator[Piece]:
    """Predict each token of the spans, except the first of each, in order and in constant memory.

    Args:
        model: ids (B, T) -> logits (B, T, V), in eval mode.
        ids: token ids of a text, of any integer type; may be memory-mapped.
        spans: the parts of the text that are scored.
        stride: distance of neighboring windows, from 1 to `block_size`, the default.
        batch_size: B, windows that are computed at once; chosen from the sizes by default.

    Raises:
        UserError: for a stride or batch size out of range, or if a cost is not finite.
    """
    config: Any = model.config
    block_size, device = config.block_size, next(model.parameters()).device
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"stride={stride} must be from 1 to the model's block_size={block_size}")
    if batch_size is None:
        batch_size = windows_without_gradients(block_size, config.vocab_size, device.type)
    at_least(1, batch_size=batch_size)
    for starts, length, skipped in exact_windows(spans, block_size, stride, batch_size):
        block = ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)  # (B, T + 1)
        x = torch.from_numpy(block[:, :-1]).to(device)
        targets = block[:, skipped + 1 :].ravel()  # (N,)
        log_probs = model(x)[:, skipped:].flatten(0, 1).float().log_softmax(dim=-1)  # (N, V)
        y = torch.from_numpy(targets).to(device)
        nats = -log_probs.gather(1, y[:, None])[:, 0].cpu().numpy()
        if not np.isfinite(nats).all():
            raise UserError(NOT_FINITE)
        yield Piece(targets, nats, log_probs)


def total(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Score:
    """The sum of the costs, in float64.

    Raises:
        UserError: if no character is predicted.
    """
    sizes = np.array([len(token) for token in tokenizer.bytes_of_tokens()])
    nats, tokens, characters, size = 0.0, 0, 0, 0
    for piece in pieces:
        nats += float(piece.nats.sum(dtype=np.float64))
        tokens += len(piece.targets)
        characters += tokenizer.count_characters(piece.targets)
        size += int(sizes[piece.targets].sum())
    if characters == 0:
        raise UserError("the text has fewer than two tokens; the first is not predicted")
    return Score(nats, tokens, characters, size)
