"""Tokenizers: text to token ids and back, one character or one UTF-8 byte per token.

Both classes have the same interface and need only numpy, so that generation starts quickly.
`state()` is what a checkpoint stores; `tokenizer_from_state` makes the same tokenizer from it.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpt_lightning.errors import UserError, did_you_mean

KINDS = ("char", "byte")
UNKNOWN = ("error", "drop", "replace")
REPLACEMENTS = "\N{REPLACEMENT CHARACTER}? \n"


def choose(field: str, value: str, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`, else a UserError that suggests the nearest."""
    if value in choices:
        return value
    hint = did_you_mean(str(value).lower(), choices)
    message = f"{field}={value!r} must be one of {', '.join(choices)}{hint}"
    raise UserError(message)


def _code_points(text: str) -> np.ndarray:
    """(T,) uint32: the code points of `text`, lone surrogates included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _check_ids(ids, vocab_size: int) -> np.ndarray:
    """`ids` as a flat integer array; ValueError for an id outside the vocabulary."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"a token id is outside the vocabulary of {vocab_size} tokens")
    return ids


class CharTokenizer:
    """One token per character (code point) of a fixed vocabulary.

    Args:
        vocabulary: the distinct characters; the id of a character is its index.
        unknown: what `encode` does with any other character: "error" raises, "drop" leaves it
            out, "replace" uses the first of U+FFFD, "?", " ", "\\n" that is in the vocabulary.

    Raises:
        UserError: if the vocabulary is empty or a character is in it twice.
    """

    kind = "char"

    def __init__(self, vocabulary: str, unknown: str = "error"):
        if not isinstance(vocabulary, str) or not vocabulary:
            message = f"vocabulary={vocabulary!r} must be a string of at least one character"
            raise UserError(message)
        codes = _code_points(vocabulary)
        values, counts = np.unique(codes, return_counts=True)
        if counts.max() > 1:
            twice = chr(int(values[counts.argmax()]))
            message = f"vocabulary has the character {twice!r} more than once"
            raise UserError(message)
        self.vocabulary = vocabulary
        self.unknown = choose("unknown", unknown, UNKNOWN)
        self.vocab_size = len(vocabulary)
        self._codes = codes
        # id of each code point; the last entry is for all code points beyond the table
        self._table = np.full(int(codes.max()) + 2, -1, np.int32)
        self._table[codes] = np.arange(self.vocab_size)

    @classmethod
    def train(cls, chunks: Iterable[str], unknown: str = "error") -> CharTokenizer:
        """The tokenizer of the sorted distinct characters of a text, given in chunks."""
        seen = np.zeros(0x110000, bool)
        for chunk in chunks:
            codes = _code_points(chunk)
            if not seen.take(codes).all():  # rarely true, and cheaper than to set them all
                seen[codes] = True
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())), unknown)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str, offset: int = 0) -> np.ndarray:
        """The ids of `text`: (T,) of `dtype`.

        `offset` is the position of `text` in a longer text, for the error message.

        Raises:
            UserError: for an unknown character, unless it is dropped or replaced.
        """
        ids = self._table.take(_code_points(text), mode="clip")
        is_unknown = ids < 0
        if is_unknown.any():
            replacements = [c for c in REPLACEMENTS if c in self.vocabulary]
            if self.unknown == "drop":
                ids = ids[~is_unknown]
            elif self.unknown == "replace" and replacements:
                ids[is_unknown] = self.vocabulary.index(replacements[0])
            else:
                raise self._unknown_error(text, int(is_unknown.argmax()), offset)
        return ids.astype(self.dtype)

    def _unknown_error(self, text: str, at: int, offset: int) -> UserError:
        name = unicodedata.name(text[at], "")
        return UserError(
            f"the character {text[at]!r} (U+{ord(text[at]):04X}{name and ' ' + name}) at position "
            f"{offset + at} is not in the vocabulary of {self.vocab_size} characters; unknown=drop "
            "leaves such characters out, unknown=replace replaces them with U+FFFD, '?', ' ' or "
            "'\\n' if the vocabulary has one of these"
        )

    def decode(self, ids) -> str:
        """The text of `ids` (array or list); ValueError for an id outside the vocabulary."""
        codes = self._codes[_check_ids(ids, self.vocab_size)]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def stream_decoder(self) -> Callable[[int | None], str]:
        """A function from one id to its text; None marks the end of the text."""
        return lambda token: "" if token is None else self.vocabulary[token]

    def count_characters(self, ids) -> int:
        """The number of characters in the text of `ids`."""
        return len(ids)

    def state(self) -> dict:
        """Plain types, from which `tokenizer_from_state` makes the tokenizer again."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class ByteTokenizer:
    """One token per UTF-8 byte: a vocabulary of 256, and no unknown characters."""

    kind = "byte"
    vocab_size = 256
    dtype = np.dtype(np.uint8)

    def encode(self, text: str, offset: int = 0) -> np.ndarray:
        """The UTF-8 bytes of `text`, (T,) uint8; lone surrogates take three bytes as well."""
        return np.frombuffer(bytearray(text.encode("utf-8", "surrogatepass")), np.uint8)

    def decode(self, ids) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError if not bytes."""
        ids = _check_ids(ids, self.vocab_size)
        return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def stream_decoder(self) -> Callable[[int | None], str]:
        """A function from one id to the text that it completes, or "" within a character.

        Called with None it returns what is left at the end of the text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: (
            decoder.decode(b"", True) if token is None else decoder.decode(bytes([token]))
        )

    def count_characters(self, ids) -> int:
        """The number of characters that begin in `ids`: all bytes but continuation bytes."""
        piece = 1 << 22  # so that a memory map of any size takes constant memory
        return sum(
            int(np.count_nonzero((np.asarray(ids[at : at + piece]) & 0xC0) != 0x80))
            for at in range(0, len(ids), piece)
        )

    def state(self) -> dict:
        """Plain types, from which `tokenizer_from_state` makes the tokenizer again."""
        return {"kind": self.kind}


Tokenizer = CharTokenizer | ByteTokenizer


def tokenizer_from_state(state: dict, unknown: str = "error") -> Tokenizer:
    """The tokenizer with this `state()`; UserError if it is not the state of one."""
    kind = state.get("kind") if isinstance(state, dict) else None
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer(state.get("vocabulary", ""), unknown)
    raise UserError(f"not the state of a tokenizer: {str(state)[:60]!r}")
