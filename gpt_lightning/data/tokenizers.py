"""Tokenizers: text to token ids and back; a token is a character, a byte, a word or a subword.

Characters and bytes are here, words in `words`, subwords in `bpe`, which alone needs the package
tokenizers. A checkpoint stores `state()`; `tokenizer_from_state` makes the same tokenizer again. A
checkpoint may come from anyone, so every constructor checks its vocabulary.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from gpt_lightning.errors import UserError, one_of

KINDS = ("char", "byte", "word", "bpe")
UNKNOWN = ("error", "drop", "replace")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
REPLACEMENTS = f"{REPLACEMENT}? \n"
PIECE = 1 << 22  # tokens whose characters are counted at a time, in constant memory


class Tokenizer(Protocol):
    """What each tokenizer has."""

    kind: str  # one of KINDS
    vocab_size: int
    dtype: np.dtype  # the smallest unsigned integer type that holds the ids

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`: (T,) of `dtype`; UserError for an unknown character."""

    def decode(self, ids) -> str:
        """The text of `ids` (array or list)."""

    def stream_decoder(self) -> Callable[[int | None], str]:
        """A function from one id to the text that it completes; None marks the end of the text."""

    def count_characters(self, ids) -> int:
        """The number of characters that begin in `ids`; takes constant memory."""

    def bytes_of_tokens(self) -> list[bytes]:
        """The UTF-8 bytes of each token."""

    def state(self) -> dict:
        """Plain types, from which `tokenizer_from_state` makes the tokenizer again."""


def _code_points(text: str) -> np.ndarray:
    """(T,) uint32: the code points of `text`, lone surrogates included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def sum_of_lengths(lengths: np.ndarray, ids: np.ndarray) -> int:
    """The sum over `ids`, which may be a memory map, of the length (V,) of each token."""
    pieces = (ids[start : start + PIECE] for start in range(0, len(ids), PIECE))
    return sum(int(lengths.take(piece).sum()) for piece in pieces)


def character_counts(chunks: Iterable[str], most: int) -> dict[str, int]:
    """How often each character of a text occurs, up to `most`, in the order of code points."""
    counts = np.zeros(0x110000, np.uint32)
    for chunk in chunks:
        codes = _code_points(chunk)
        if (counts.take(codes) < most).any():  # rarely true, and cheaper than to count
            found = np.bincount(codes)
            counts[: len(found)] = np.minimum(counts[: len(found)] + found, most)
    return {chr(code): int(counts[code]) for code in np.flatnonzero(counts).tolist()}


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
        if not isinstance(vocabulary, str) or not 0 < len(vocabulary) == len(set(vocabulary)):
            shown = str(vocabulary)[:60]
            raise UserError(f"vocabulary={shown!r} must be a string of distinct characters")
        self.vocabulary = vocabulary
        one_of(UNKNOWN, unknown=unknown)
        self.unknown = unknown
        self.vocab_size = len(vocabulary)
        self.dtype = np.min_scalar_type(self.vocab_size - 1)
        self._codes = _code_points(vocabulary)
        # id of each code point; the last entry is for all code points beyond the table
        self._table = np.full(int(self._codes.max()) + 2, -1, np.int32)
        self._table[self._codes] = np.arange(self.vocab_size)

    @classmethod
    def train(cls, chunks: Iterable[str], unknown: str = "error") -> CharTokenizer:
        """The tokenizer of the sorted distinct characters of a text, given in chunks."""
        return cls("".join(character_counts(chunks, 1)), unknown)

    def with_characters(self, characters: str) -> CharTokenizer:
        """The tokenizer that also knows these characters; new ones follow its vocabulary."""
        new = sorted(set(characters) - set(self.vocabulary))
        return CharTokenizer(self.vocabulary + "".join(new), self.unknown)

    def encode(self, text: str) -> np.ndarray:
        ids = self._table.take(_code_points(text), mode="clip")
        is_unknown = ids < 0
        if is_unknown.any():
            replacements = [c for c in REPLACEMENTS if c in self.vocabulary]
            if self.unknown == "drop":
                ids = ids[~is_unknown]
            elif self.unknown == "replace" and replacements:
                ids[is_unknown] = self.vocabulary.index(replacements[0])
            else:
                at = int(is_unknown.argmax())
                raise UserError(
                    f"the character {text[at]!r} (U+{ord(text[at]):04X}) in "
                    f"{text[max(0, at - 10) : at + 10]!r} is not in the vocabulary of "
                    f"{self.vocab_size} characters; unknown=drop leaves such characters out, "
                    "unknown=replace replaces them with U+FFFD, '?', ' ' or '\\n' if the "
                    "vocabulary has one of these"
                )
        return ids.astype(self.dtype)

    def decode(self, ids) -> str:
        codes = self._codes[np.asarray(ids, np.int64)]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def stream_decoder(self) -> Callable[[int | None], str]:
        return lambda token: "" if token is None else self.vocabulary[token]

    def count_characters(self, ids) -> int:
        return len(ids)

    def bytes_of_tokens(self) -> list[bytes]:
        return [character.encode("utf-8", "surrogatepass") for character in self.vocabulary]

    def state(self) -> dict:
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class ByteTokenizer:
    """One token per UTF-8 byte: a vocabulary of 256, and no unknown characters."""

    kind = "byte"
    vocab_size = 256
    dtype = np.dtype(np.uint8)

    def __init__(self, tokens: list[bytes] | None = None):
        self._tokens = tokens or [bytes([byte]) for byte in range(256)]
        # all bytes begin a character but those that continue one
        self._lengths = np.array([sum(b & 0xC0 != 0x80 for b in token) for token in self._tokens])

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, (T,) uint8; lone surrogates take three bytes as well."""
        return np.frombuffer(bytearray(text.encode("utf-8", "surrogatepass")), np.uint8)

    def decode(self, ids) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        tokens = [self._tokens[i] for i in np.asarray(ids).tolist()]
        return b"".join(tokens).decode("utf-8", "replace")

    def stream_decoder(self) -> Callable[[int | None], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: (
            decoder.decode(b"", True) if token is None else decoder.decode(self._tokens[token])
        )

    def count_characters(self, ids) -> int:
        return sum_of_lengths(self._lengths, ids)

    def bytes_of_tokens(self) -> list[bytes]:
        return self._tokens

    def state(self) -> dict:
        return {"kind": self.kind}


def tokenizer_from_state(state: dict, unknown: str = "error") -> Tokenizer:
    """The tokenizer with this `state()`; UserError if it is not the state of one."""
    kind = state.get("kind") if isinstance(state, dict) else None
    if kind not in KINDS:
        raise UserError(f"not the state of a tokenizer: {str(state)[:60]!r}")
    vocabulary = state.get("vocabulary", "")
    if kind == "word":
        from gpt_lightning.data.words import WordTokenizer

        return WordTokenizer(vocabulary, unknown)
    if kind == "bpe":
        from gpt_lightning.data.bpe import BPETokenizer

        return BPETokenizer(vocabulary)
    return ByteTokenizer() if kind == "byte" else CharTokenizer(vocabulary, unknown)


def count_unknown(text: str, tokenizer: Tokenizer) -> int:
    """The number of characters of `text` that `tokenizer` replaces or drops."""
    if getattr(tokenizer, "unknown", "error") == "error":
        return 0
    known = tokenizer_from_state(tokenizer.state(), "drop")
    return len(text) - known.count_characters(known.encode(text))
