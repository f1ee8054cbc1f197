"""What `evaluate` shows beside its figures: the cost of each line, and the text in colors."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from gpt_lightning.data.tokenizers import Tokenizer
from gpt_lightning.data.windows import Span, first_tokens
from gpt_lightning.generation.scoring import Piece

SHOWN = 10_000  # tokens that are shown in colors
LIKELIEST = 5  # alternatives of each token
# Background of a cost below 1 bit, below 2, ..., 8 bits or more: a terminal's color, a page's.
COLORS = {231: "#ffffff", 230: "#ffffd7", 229: "#ffffaf", 228: "#ffff87", 222: "#ffd787",
          215: "#ffaf5f", 209: "#ff875f", 203: "#ff5f5f", 197: "#ff005f"}  # fmt: skip
LEVELS = [*map(str, range(len(COLORS) - 1)), f"{len(COLORS) - 1} or more"]  # bits


@dataclass
class Cell:
    """A part of the text that is whole tokens and whole characters: a character, or a word.

    Args:
        text: the decoded part.
        nats: its cost, without that of a token that is not predicted.
        predicted: whether all of it is predicted.
        likeliest: the most probable tokens in place of its first one, each with its probability.
    """

    text: str
    nats: float
    predicted: bool
    likeliest: list[tuple[str, float]]

    @property
    def level(self) -> int:
        """Whole bits per character, at most 8."""
        return min(len(COLORS) - 1, int(self.nats / len(self.text) / math.log(2)))


class TokenCosts:
    """The cost of each token of a text, recorded while its spans are scored.

    The first token of each span is not predicted.
    """

    def __init__(self, tokenizer: Tokenizer, ids: np.ndarray, spans: list[Span]):
        self.tokenizer, self.ids, self.spans = tokenizer, ids, spans
        self.labels = [label(token) for token in tokenizer.bytes_of_tokens()]
        self.nats: list[np.ndarray] = []
        self.likeliest: list[list[tuple[str, float]]] = []  # of the first SHOWN tokens

    def record(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the pieces and record their costs."""
        for piece in pieces:
            self.nats.append(piece.nats)
            first = piece.log_probs[: SHOWN - len(self.likeliest)]
            top = first.exp().topk(min(LIKELIEST, first.shape[1]))
            for ids, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                names = [self.labels[i] for i in ids]
                self.likeliest.append(list(zip(names, probabilities, strict=True)))
            yield piece

    def cells(self, most: float = math.inf) -> Iterator[Cell]:
        """The first `most` tokens of the text. Only the first SHOWN have alternatives."""
        nats_of_tokens = chain.from_iterable(piece.tolist() for piece in self.nats)
        costs = zip_longest(nats_of_tokens, self.likeliest, fillvalue=[])
        for start, stop in first_tokens(self.spans, most):
            tokens, decode = self.ids[start:stop].tolist(), self.tokenizer.stream_decoder()
            nats, predicted, likeliest = 0.0, False, []
            for i, token in enumerate([*tokens, None]):
                if 0 < i < len(tokens):
                    cost, alternatives = next(costs)
                    nats, likeliest = nats + cost, likeliest or alternatives
                if text := decode(token):
                    yield Cell(text, nats, predicted, likeliest if predicted else [])
                    nats, predicted, likeliest = 0.0, True, []

    def lines(self) -> Iterator[dict[str, Any]]:
        """Text, predicted characters and nats of each line, which includes its line end.

        The cost of a token is divided among its characters.
        """
        text, characters, nats = "", 0, 0.0
        for cell in self.cells():
            for character in cell.text:
                text += character
                characters += cell.predicted
                nats += cell.nats / len(cell.text)
                if character == "\n":
                    yield {"text": text, "characters": characters, "nats": nats}
                    text, characters, nats = "", 0, 0.0
        if text:
            yield {"text": text, "characters": characters, "nats": nats}


def label(token: bytes) -> str:
    """The text of a token, visible; a part of a character as the escapes of its bytes."""
    text = visible(token.decode("utf-8", "backslashreplace"))
    return {" ": "space", "\u21b5\n": "line end"}.get(text) or text.strip("\n")


def visible(text: str) -> str:
    """The text with an arrow before line ends and escapes for what cannot be seen.

    Control characters do not reach the terminal.
    """
    escapes = {c: "\u21b5\n" if c == "\n" else ascii(c)[1:-1] for c in text if not c.isprintable()}
    return "".join(escapes.get(c, c) for c in text)


def show(cells: Iterable[Cell]) -> None:
    """Print the text in the terminal's colors, with a legend."""
    print("bits: " + "".join(colored(f" {bits} ", i) for i, bits in enumerate(LEVELS)))
    print("".join(colored(visible(cell.text), cell.level) for cell in cells))


def colored(text: str, level: int) -> str:
    """The text on the background of a level; the lowest and line ends have the terminal's own."""
    if level == 0:
        return text
    color = f"\x1b[38;5;16;48;5;{list(COLORS)[level]}m"
    return "\n".join(line and f"{color}{line}\x1b[0m" for line in text.split("\n"))
