"""What `evaluate` shows beside its figures: the cost of each line, and the text in colors."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gpt_lightning.data.tokenizers import Tokenizer
from gpt_lightning.data.windows import Span
from gpt_lightning.generation.scoring import Piece

LIMIT = 10_000  # tokens that are shown in colors
LIKELIEST = 5  # alternatives of each token
LEVELS = 9  # colors: costs below 1 bit, below 2, ..., 8 bits or more
# ANSI 256 colors behind black text, for the levels from 1; level 0 has the terminal's own colors
TERMINAL_COLORS = (230, 229, 228, 222, 215, 209, 203, 197)


@dataclass
class Cell:
    """A part of the text that is whole tokens and whole characters: a character, or a word.

    Args:
        text: of it.
        nats: its cost, 0 for a token that is not predicted.
        predicted: whether all of it is predicted.
        likeliest: the most probable tokens in place of its first one, each with its probability.
    """

    text: str
    nats: float
    predicted: bool
    likeliest: list[tuple[str, float]]

    @property
    def level(self) -> int:
        """0 for a cost below 1 bit per character, ..., 8 for 8 bits or more."""
        return min(LEVELS - 1, int(self.nats / len(self.text) / math.log(2)))


class TokenCosts:
    """The cost of each token of a text, kept while it is scored.

    Args:
        tokenizer: of the text.
        ids: the text.
        spans: the parts that are scored; the first token of each is not predicted.
    """

    def __init__(self, tokenizer: Tokenizer, ids: np.ndarray, spans: list[Span]):
        self.tokenizer, self.ids, self.spans = tokenizer, ids, spans
        self.nats: list[float] = []
        self.likeliest: list[tuple[list[int], list[float]]] = []  # of the first LIMIT tokens

    def kept(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces; their costs are kept."""
        for piece in pieces:
            self.nats += piece.nats.tolist()
            first = piece.log_probs[: LIMIT - len(self.likeliest)]
            top = first.exp().topk(min(LIKELIEST, first.shape[1]))
            self.likeliest += zip(top.indices.tolist(), top.values.tolist(), strict=True)
            yield piece

    def cells(self, most: float = math.inf) -> Iterator[Cell]:
        """The text, up to the cell that has `most` tokens before its end.

        Only the first LIMIT tokens have their alternatives.
        """
        done = 0  # predicted tokens
        for start, stop in self.spans:
            decode, nats, predicted, first = self.tokenizer.stream_decoder(), 0.0, False, done
            for i, token in enumerate(self.ids[start:stop].tolist()):
                if i > 0:
                    nats += self.nats[done]
                    done += 1
                if text := decode(token):
                    yield Cell(text, nats, predicted, self.alternatives(first, predicted))
                    nats, predicted, first = 0.0, True, done
                    if done >= most:
                        return
            if text := decode(None):
                yield Cell(text, nats, predicted, self.alternatives(first, predicted))

    def alternatives(self, first: int, predicted: bool) -> list[tuple[str, float]]:
        if not predicted or first >= len(self.likeliest):
            return []
        ids, probabilities = self.likeliest[first]
        return list(zip(map(self.label, ids), probabilities, strict=True))

    def label(self, token: int) -> str:
        """The text of a token, visible."""
        text = self.tokenizer.decode([token])
        if "\ufffd" in text and self.tokenizer.kind in ("byte", "bpe"):
            return f"token {token}"  # a part of a character
        return {" ": "space", "\n": "line end"}.get(text) or visible(text).strip("\n")

    def first_cells(self) -> tuple[list[Cell], str]:
        """The cells of about the first LIMIT tokens, and a note if there are more."""
        note = f"The first {LIMIT:,} tokens are shown." if len(self.nats) > LIMIT else ""
        return list(self.cells(LIMIT)), note

    def lines(self) -> Iterator[str]:
        """A JSON object for each line: its number, text, predicted characters and nats.

        The line end belongs to its line. The cost of a token is divided among its characters.
        """
        number, text, characters, nats = 1, "", 0, 0.0
        for cell in self.cells():
            for character in cell.text:
                text += character
                characters += cell.predicted
                nats += cell.nats / len(cell.text)
                if character == "\n":
                    yield json_line(number, text, characters, nats)
                    number, text, characters, nats = number + 1, "", 0, 0.0
        if text:
            yield json_line(number, text, characters, nats)


def json_line(number: int, text: str, characters: int, nats: float) -> str:
    line = {"line": number, "text": text.removesuffix("\n"), "characters": characters, "nats": nats}
    return json.dumps(line, ensure_ascii=False) + "\n"


def visible(text: str) -> str:
    """The text with an arrow before line ends and escapes for what cannot be seen.

    Control characters do not reach the terminal.
    """
    escapes = {c: "\u21b5\n" if c == "\n" else ascii(c)[1:-1] for c in text if not c.isprintable()}
    return "".join(escapes.get(c, c) for c in text)


def show(cells: list[Cell], note: str) -> None:
    """Print the text in the terminal's colors, with a legend."""
    reason = "" if sys.stdout.isatty() else "standard output is not a terminal"
    if os.environ.get("NO_COLOR"):
        reason = "NO_COLOR is set"
    if reason:
        print(f"--show prints colors only: {reason}; --html=FILE writes a page", file=sys.stderr)
        return
    steps = [f" {level} " for level in range(LEVELS - 1)] + [f" {LEVELS - 1} or more "]
    print("bits: " + "".join(colored(text, level) for level, text in enumerate(steps)))
    print("".join(colored(visible(cell.text), cell.level) for cell in cells))
    print(f"{note}\n" if note else "")


def colored(text: str, level: int) -> str:
    """The text on the background of a level; a line end keeps the terminal's background."""
    if level == 0:
        return text
    color = f"\x1b[38;5;16;48;5;{TERMINAL_COLORS[level - 1]}m"
    return "\n".join(line and f"{color}{line}\x1b[0m" for line in text.split("\n"))
