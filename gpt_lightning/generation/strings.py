"""Strings that end a text, and strings that must not occur in it.

Both are matched with the decoded text: the tokens of a string depend on the text around it.
"""

from collections.abc import Callable, Sequence

import torch

from gpt_lightning.errors import UserError


class StopStrings:
    """Decodes the tokens of one text up to the first string that ends it.

    Args:
        decode: a tokenizer's `stream_decoder()`.
        stop: the strings; without any, the text does not end.

    Attributes:
        ended: whether a stop string has occurred. Later tokens add nothing.
    """

    def __init__(self, decode: Callable[[int | None], str], stop: Sequence[str]):
        self.decode, self.stop = decode, stop
        self.longest = max(map(len, stop), default=0)
        self.tail, self.ended = "", False

    def __call__(self, token: int | None) -> str:
        """The text that one more token adds; None marks the end of the text."""
        if self.ended:
            return ""
        piece = self.decode(token)
        text = self.tail + piece
        ends = [text.find(string) + len(string) for string in self.stop if string in text]
        if ends:
            self.ended = True
            return piece[: len(piece) + min(ends) - len(text)]
        self.tail = text[max(0, len(text) - self.longest + 1) :]
        return piece


class BannedStrings:
    """Finds the tokens that would complete a banned string in one of B texts.

    Args:
        strings: the banned strings, at least one.
        tokens: the UTF-8 bytes of each of the V tokens.
        B: number of texts, which are empty at first.
    """

    def __init__(self, strings: Sequence[str], tokens: list[bytes], B: int):
        self.strings, self.tokens = strings, tokens
        self.encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.ends = [b""] * B  # of each text the longest end that is the start of a banned string
        self.after: dict[bytes, torch.Tensor] = {}  # (V,) bool: the banned tokens after an end

    def add(self, ids: list[int]) -> None:
        """Append one token to each text."""
        for row, token in enumerate(ids):
            end = self.ends[row] + self.tokens[token]
            while not any(string.startswith(end) for string in self.encoded):
                end = end[1:]
            self.ends[row] = end

    def mask(self) -> torch.Tensor:
        """(B, V) bool: the tokens that must not be next.

        Raises:
            UserError: if no token is left.
        """
        for end in self.ends:
            if end not in self.after:
                texts = [end + token for token in self.tokens]
                banned = [any(string in text for string in self.encoded) for text in texts]
                if all(banned):
                    raise UserError(f"ban={self.strings} leaves no token that could be next")
                self.after[end] = torch.tensor(banned)
        return torch.stack([self.after[end] for end in self.ends])
