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
    ids = np.asarray(ids).reshape(-1)
    if ids.size == 0:
        return ids.astype(np.uint8)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token ids must be integers, not {ids.dtype}")
    for bound in (ids.min(), ids.max()):
        if not 0 <= bound < vocab_size:
            raise ValueError(f"token id {bound} is outside the vocabulary of {vocab_size} tokens")
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
        # the same for bytes.translate, which is several times as fast for ASCII text
        self._ascii = bytes(int(code) for code in codes if code < 128)
        self._ascii_table = None
        if self.dtype == np.uint8:
            ids = self._table.take(np.arange(256), mode="clip")
            self._ascii_table = np.maximum(ids, 0).astype(np.uint8).tobytes()

    @classmethod
    def train(cls, chunks: Iterable[str], unknown: str = "error") -> CharTokenizer:
        """The tokenizer of the sorted distinct characters of a text, given in chunks."""
        ascii_seen, seen = b"", np.zeros(0x110000, bool)
        for chunk in chunks:
            if chunk.isascii():
                # delete the known characters, learn from the rest: one fast pass for most chunks
                rest = chunk.encode("ascii")
                while rest := rest.translate(None, ascii_seen):
                    ascii_seen += bytes(set(rest[:4096]))
            else:
                codes = _code_points(chunk)
                if not seen.take(codes).all():  # rarely true, and cheaper than to set them all
                    seen[codes] = True
        seen[list(ascii_seen)] = True
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
        if text.isascii():
            raw = bytearray(text, "ascii")  # not bytes: the array must be writable
            if self._ascii_table and not raw.translate(None, self._ascii):
                return np.frombuffer(raw.translate(self._ascii_table), np.uint8)
            codes = np.frombuffer(raw, np.uint8)
        else:
            codes = _code_points(text)
        ids = self._table.take(codes, mode="clip")
        if ids.size and ids.min() < 0:
            ids = self._handle_unknown(ids, text, offset)
        return ids.astype(self.dtype)

    def _handle_unknown(self, ids: np.ndarray, text: str, offset: int) -> np.ndarray:
        if self.unknown == "drop":
            return ids[ids >= 0]
        advice = "unknown=drop leaves such characters out, unknown=replace replaces them"
        if self.unknown == "replace":
            replacement = next((c for c in REPLACEMENTS if c in self.vocabulary), None)
            if replacement is not None:
                return np.where(ids < 0, self.vocabulary.index(replacement), ids)
            advice = (
                "it cannot be replaced, because none of U+FFFD, '?', ' ', '\\n' is in the "
                "vocabulary either; unknown=drop leaves such characters out"
            )
        at = int(np.argmax(ids < 0))
        name = unicodedata.name(text[at], "")
        raise UserError(
            f"the character {text[at]!r} (U+{ord(text[at]):04X}{name and ' ' + name}) at position "
            f"{offset + at} is not in the vocabulary of {self.vocab_size} characters; {advice}"
        )

    def decode(self, ids) -> str:
        """The text of `ids` (array or list); ValueError for an id outside the vocabulary."""
        codes = self._codes[_check_ids(ids, self.vocab_size)]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def stream_decoder(self) -> Callable[[int | None], str]:
        """A function from one id to its text; None marks the end of the text."""

        def decode(token: int | None) -> str:
            if token is None:
                return ""
            # `decode` takes forty times as long for a single id; it raises the error
            known = 0 <= token < self.vocab_size
            return self.vocabulary[token] if known else self.decode([token])

        return decode

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
    raise UserError(
        'not the state of a tokenizer: expected {"kind": "char", "vocabulary": "..."} or '
        f'{{"kind": "byte"}}, got {str(state)[:60]!r}'
    )


def train_tokenizer(kind: str, chunks: Iterable[str], unknown: str = "error") -> Tokenizer:
    """A tokenizer of this kind for the text in `chunks`, which "byte" does not read."""
    choose("tokenizer", kind, KINDS)
    return ByteTokenizer() if kind == "byte" else CharTokenizer.train(chunks, unknown)
