"""Tokenizers: text to token ids and back, one character or one UTF-8 byte per token.

Both classes have the same small interface; numpy and the standard library are all they need, so
that a command which only samples from a model starts quickly. `state()` is what a checkpoint
keeps, `tokenizer_from_state` makes the same tokenizer from it again.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpt_lightning.messages import nearest

KINDS = ("char", "byte")
UNKNOWN = ("error", "drop", "replace")
REPLACEMENTS = "\N{REPLACEMENT CHARACTER}? \n"


def choose(flag: str, value: str, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`, else a ValueError that names `flag` and the nearest."""
    if value in choices:
        return value
    hint = nearest(str(value).lower(), choices)
    raise ValueError(f"{flag}={value!r} is not one of {', '.join(choices)}{hint}")


def _code_points(text: str) -> np.ndarray:
    """(T,) uint32: the code points of `text`, lone surrogates included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _checked(ids, vocab_size: int) -> np.ndarray:
    """`ids` as a flat integer array; ValueError for an id outside the vocabulary."""
    ids = np.asarray(ids).reshape(-1)
    if ids.size == 0:
        return ids.astype(np.uint8)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token ids are whole numbers, not {ids.dtype}")
    for bound in (ids.min(), ids.max()):
        if not 0 <= bound < vocab_size:
            raise ValueError(f"token id {bound} is not in the vocabulary of {vocab_size} tokens")
    return ids


class CharTokenizer:
    """One token per character (code point) of a fixed vocabulary.

    `vocabulary` holds the distinct characters, the id of each being its place in it. `unknown`
    says what `encode` does with any other character: "error" raises ValueError, "drop" leaves it
    out, "replace" puts the first of U+FFFD, "?", " ", "\\n" that the vocabulary has.
    """

    kind = "char"

    def __init__(self, vocabulary: str, unknown: str = "error"):
        if not isinstance(vocabulary, str):
            raise ValueError(f"a vocabulary is a string, not {type(vocabulary).__name__}")
        if not vocabulary:
            raise ValueError("a vocabulary needs at least one character, this one is empty")
        codes = _code_points(vocabulary)
        values, counts = np.unique(codes, return_counts=True)
        if counts.max() > 1:
            twice = chr(int(values[counts.argmax()]))
            raise ValueError(f"the vocabulary has the character {twice!r} more than once")
        self.vocabulary = vocabulary
        self.unknown = choose("unknown", unknown, UNKNOWN)
        self.vocab_size = len(vocabulary)
        self._codes = codes
        # id of each code point; the last entry stands for all beyond the table
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
        """The tokenizer of the sorted distinct characters of `chunks`; ValueError if none."""
        choose("unknown", unknown, UNKNOWN)
        known, seen = b"", np.zeros(0x110000, bool)
        for chunk in chunks:
            if chunk.isascii():
                # strip what is known, learn from what is left: one pass for nearly every chunk
                rest = chunk.encode("ascii")
                while rest := rest.translate(None, known):
                    known += bytes(set(rest[:4096]))
            else:
                codes = _code_points(chunk)
                if not seen.take(codes).all():  # seldom, and cheaper than to set them all
                    seen[codes] = True
        seen[list(known)] = True
        if not seen.any():
            raise ValueError("there is no character to make a vocabulary of: the text is empty")
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())), unknown)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str, offset: int = 0) -> np.ndarray:
        """The ids of `text`: (T,) of `dtype`.

        `offset` is the position of `text` in a longer text, for the message of the ValueError
        raised for an unknown character.
        """
        if text.isascii():
            raw = bytearray(text, "ascii")  # not bytes: the array shall be writable
            if self._ascii_table and not raw.translate(None, self._ascii):
                return np.frombuffer(raw.translate(self._ascii_table), np.uint8)
            codes = np.frombuffer(raw, np.uint8)
        else:
            codes = _code_points(text)
        ids = self._table.take(codes, mode="clip")
        if ids.size and ids.min() < 0:
            ids = self._without_unknown(ids, text, offset)
        return ids.astype(self.dtype)

    def _without_unknown(self, ids: np.ndarray, text: str, offset: int) -> np.ndarray:
        if self.unknown == "drop":
            return ids[ids >= 0]
        if self.unknown == "replace":
            stand_in = next((c for c in REPLACEMENTS if c in self.vocabulary), None)
            if stand_in is not None:
                return np.where(ids < 0, self.vocabulary.index(stand_in), ids)
            advice = (
                "and there is nothing to replace it by (none of U+FFFD, '?', ' ', '\\n' is in the "
                "vocabulary either); use unknown=drop to leave such characters out"
            )
        else:
            advice = "use unknown=drop to leave such characters out, or unknown=replace"
        at = int(np.argmax(ids < 0))
        name = unicodedata.name(text[at], "")
        raise ValueError(
            f"the character {text[at]!r} (U+{ord(text[at]):04X}{name and ' ' + name}) at position "
            f"{offset + at} is not in the vocabulary of {self.vocab_size} characters; {advice}"
        )

    def decode(self, ids) -> str:
        """The text of `ids` (array or list); ValueError for an id outside the vocabulary."""
        codes = self._codes[_checked(ids, self.vocab_size)]
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def stream_decoder(self) -> Callable[[int | None], str]:
        """A function that takes id after id and returns the text of each; None ends the text."""

        def decode(token: int | None) -> str:
            if token is None:
                return ""
            # one at a time, `decode` is some forty times as slow; it words the error
            known = 0 <= token < self.vocab_size
            return self.vocabulary[token] if known else self.decode([token])

        return decode

    def count_characters(self, ids) -> int:
        """The number of characters that `ids` stand for: one each."""
        return len(ids)

    def state(self) -> dict:
        """What `tokenizer_from_state` needs, in plain types."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class ByteTokenizer:
    """One token per UTF-8 byte: 256 of them, and no text has an unknown one."""

    kind = "byte"
    vocab_size = 256
    dtype = np.dtype(np.uint8)

    def encode(self, text: str, offset: int = 0) -> np.ndarray:
        """The UTF-8 bytes of `text`, (T,) uint8; lone surrogates take three bytes as well."""
        return np.frombuffer(bytearray(text.encode("utf-8", "surrogatepass")), np.uint8)

    def decode(self, ids) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError if not bytes."""
        ids = _checked(ids, self.vocab_size)
        return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def stream_decoder(self) -> Callable[[int | None], str]:
        """A function that takes id after id and returns "" until a character is whole.

        Called with None it returns what is left at the end of the text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: (
            decoder.decode(b"", True) if token is None else decoder.decode(bytes([token]))
        )

    def count_characters(self, ids) -> int:
        """The number of characters that begin in `ids`: bytes that continue none."""
        piece = 1 << 22  # a memory map of any size is counted in constant memory
        return sum(
            int(np.count_nonzero((np.asarray(ids[at : at + piece]) & 0xC0) != 0x80))
            for at in range(0, len(ids), piece)
        )

    def state(self) -> dict:
        """What `tokenizer_from_state` needs, in plain types."""
        return {"kind": self.kind}


Tokenizer = CharTokenizer | ByteTokenizer


def tokenizer_from_state(state: dict, unknown: str = "error") -> Tokenizer:
    """The tokenizer whose `state()` this is; ValueError if it cannot be one's."""
    kind = state.get("kind") if isinstance(state, dict) else None
    if kind == "byte":
        choose("unknown", unknown, UNKNOWN)
        return ByteTokenizer()
    if kind == "char" and isinstance(state.get("vocabulary"), str):
        return CharTokenizer(state["vocabulary"], unknown)
    raise ValueError(
        'this is no state of a tokenizer: it should be {"kind": "char", "vocabulary": "..."} '
        f'or {{"kind": "byte"}}, not {str(state)[:60]!r}'
    )


def train_tokenizer(kind: str, chunks: Iterable[str], unknown: str = "error") -> Tokenizer:
    """A tokenizer of this kind for the text in `chunks`, which "byte" does not read.

    Raises ValueError for an unknown kind or policy, and for a text without a character.
    """
    choose("--data.tokenizer", kind, KINDS)
    choose("--data.unknown", unknown, UNKNOWN)
    return ByteTokenizer() if kind == "byte" else CharTokenizer.train(chunks, unknown)
