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
        stop: the strings, at least one.

    Attributes:
        ended: whether a stop string has occurred. Later tokens add nothing.
    """

    def __init__(self, decode: Callable[[int | None], str], stop: Sequence[str]):
        self.decode, self.stop = decode, stop
        self.longest = max(map(len, stop))
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
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.longest = max(map(len, encoded))
        self.tails = [b""] * B
        contained = [any(string in token for string in encoded) for token in tokens]
        self.always = torch.tensor(contained)  # (V,)
        # for each beginning of a banned string the tokens that begin with the rest of it
        self.after: dict[bytes, torch.Tensor] = {}
        for string in encoded:
            for i in range(1, len(string)):
                completes = torch.tensor([token.startswith(string[i:]) for token in tokens])
                if completes.any():
                    before = self.after.get(string[:i], completes)
                    self.after[string[:i]] = before | completes

    def add(self, ids: list[int]) -> None:
        """Append one token to each text."""
        for row, token in enumerate(ids):
            tail = self.tails[row] + self.tokens[token]
            self.tails[row] = tail[max(0, len(tail) - self.longest + 1) :]

    def mask(self) -> torch.Tensor:
        """(B, V) bool: the tokens that must not be next.

        Raises:
            UserError: if no token is left.
        """
        mask = self.always.repeat(len(self.tails), 1)
        for row, tail in enumerate(self.tails):
            for beginning, completes in self.after.items():
                if tail.endswith(beginning):
                    mask[row] |= completes
        if mask.all(dim=1).any():
            raise UserError(f"ban={self.strings} leaves no token that could be next")
        return mask
