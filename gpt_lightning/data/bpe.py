"""Byte pair encoding: the most frequent sequences of UTF-8 bytes as tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import ModuleType

import numpy as np

from gpt_lightning.data.tokenizers import ByteTokenizer
from gpt_lightning.errors import UserError


def _byte_characters() -> list[str]:
    """GPT-2's visible character for each byte: itself if it is one in Latin-1, else from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()


def _import_tokenizers() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            'tokenizer=bpe needs the package tokenizers: pip install -e ".[bpe]"'
        ) from None
    return tokenizers


class BPETokenizer(ByteTokenizer):
    """Byte pair encoding of UTF-8 bytes, as GPT-2's: no unknown characters.

    Ids 0 to 255 are the bytes; each merge of two tokens makes a further one.

    Args:
        vocabulary: one merge a line, two tokens with a space between them, in GPT-2's spelling of
            bytes (the lines of its merges.txt).

    Raises:
        UserError: if a line is not a merge of two tokens that are bytes or made by lines before
            it, or if the package tokenizers is missing.
    """

    kind = "bpe"

    def __init__(self, vocabulary: str):
        tokenizers = _import_tokenizers()
        ids = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
        merges = []
        for line in vocabulary.splitlines() if isinstance(vocabulary, str) else [""]:
            left, _, right = line.partition(" ")
            if left not in ids or right not in ids:
                raise UserError(f"vocabulary: {line[:60]!r} is not a merge of two earlier tokens")
            merges.append((left, right))
            ids.setdefault(left + right, len(ids))  # two merges may make the same token
        self.vocabulary = vocabulary
        self.vocab_size = len(ids)
        self.dtype = np.min_scalar_type(self.vocab_size - 1)
        self._encoder = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
        self._encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        byte_of = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
        super().__init__([bytes(map(byte_of.__getitem__, token)) for token in ids])

    @classmethod
    def train(cls, chunks: Iterable[str], size: int) -> BPETokenizer:
        """The tokenizer that merges the most frequent pairs of a text, given in chunks.

        Args:
            size: largest number of tokens, the 256 bytes included.

        Raises:
            UserError: if `size` is below 256, or the package tokenizers is missing.
        """
        if size < 256:
            raise UserError(f"max_vocab_size={size} must be at least 256, the bytes, for bpe")
        tokenizers = _import_tokenizers()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=BYTE_CHARACTERS,
            max_token_length=40,
            show_progress=False,
        )
        model.train_from_iterator(chunks, trainer)
        merges = json.loads(model.to_str())["model"]["merges"]
        return cls("\n".join(map(" ".join, merges)))

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`: (T,) of `dtype`. Lone surrogates, which no file has, become "?"."""
        text = text.encode("utf-8", "replace").decode()
        return np.array(self._encoder.encode(text).ids, self.dtype)

    def state(self) -> dict:
        return {"kind": self.kind, "vocabulary": self.vocabulary}
