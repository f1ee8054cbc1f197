"""Words as tokens; rare words are spelled."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from gpt_lightning.data.tokenizers import CharTokenizer, sum_of_lengths
from gpt_lightning.errors import UserError

WORDS = re.compile(r"\w+|\s+|[^\w\s]")  # every character of a text is in exactly one match
MAX_COUNTED = 1_000_000  # different words that are counted at a time
LONGEST = 40  # characters of a word in a vocabulary


class WordTokenizer:
    """One token per word, run of white space or punctuation mark; other words are spelled.

    The vocabulary has words and single characters. A word that it lacks becomes its characters, so
    only a character that it lacks is unknown.

    Args:
        vocabulary: a JSON list of distinct strings; the id of a token is its index.
        unknown: what `encode` does with an unknown character, as in `CharTokenizer`.

    Raises:
        UserError: if the vocabulary is not such a list, or has no single character.
    """

    kind = "word"

    def __init__(self, vocabulary: str, unknown: str = "error"):
        try:
            tokens = json.loads(vocabulary)
        except (TypeError, ValueError, RecursionError):
            tokens = None
        is_words = isinstance(tokens, list) and all(isinstance(t, str) and t for t in tokens)
        if not is_words or len(set(tokens)) < len(tokens):
            raise UserError(
                f"vocabulary={str(vocabulary)[:60]!r} must be a JSON list of distinct words"
            )
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._characters = CharTokenizer("".join(t for t in tokens if len(t) == 1), unknown)
        self._tokens: list[str] = tokens
        self._lengths = np.array([len(token) for token in tokens])
        self.unknown = unknown
        self.vocab_size = len(tokens)
        self.dtype = np.min_scalar_type(self.vocab_size - 1)

    @classmethod
    def train(
        cls, chunks: Iterable[str], characters: str, size: int, unknown: str = "error"
    ) -> WordTokenizer:
        """The tokenizer of these characters and of a text's most frequent words.

        Args:
            chunks: the text. Words with other characters, or that occur once, are left out.
            characters: the distinct characters of the vocabulary.
            size: largest number of tokens, characters included.

        Raises:
            UserError: if there are more characters than `size`.
        """
        if len(characters) > size:
            raise UserError(
                f"max_vocab_size={size} is less than the {len(characters):,} characters of the "
                "text, which are tokens too; give a larger one, or min_count to leave out rare "
                "characters"
            )
        counts: Counter[str] = Counter()
        for chunk in chunks:
            counts.update(WORDS.findall(chunk))
            if len(counts) > MAX_COUNTED:  # bounds the memory
                counts = Counter({word: n for word, n in counts.items() if n > 1})
        known = set(characters)
        words = [w for w, n in counts.items() if n > 1 and 1 < len(w) <= LONGEST]
        words = [word for word in words if known.issuperset(word)]
        words.sort(key=lambda word: (-counts[word], word))
        return cls(json.dumps([*characters, *words[: size - len(characters)]]), unknown)

    @property
    def vocabulary(self) -> str:
        return json.dumps(self._tokens)

    def with_characters(self, characters: str) -> WordTokenizer:
        """The tokenizer that also knows these characters; new ones follow its vocabulary."""
        new = sorted(set(characters) - self._ids.keys())
        return WordTokenizer(json.dumps([*self._tokens, *new]), self.unknown)

    def encode(self, text: str) -> np.ndarray:
        text = self._characters.decode(self._characters.encode(text))  # has known characters only
        tokens: list[int] = []
        for word in WORDS.findall(text):
            if word in self._ids:
                tokens.append(self._ids[word])
            else:
                tokens += map(self._ids.__getitem__, word)
        return np.array(tokens, self.dtype)

    def decode(self, ids) -> str:
        return "".join([self._tokens[i] for i in np.asarray(ids).tolist()])

    def stream_decoder(self) -> Callable[[int | None], str]:
        return lambda token: "" if token is None else self._tokens[token]

    def count_characters(self, ids) -> int:
        return sum_of_lengths(self._lengths, ids)

    def bytes_of_tokens(self) -> list[bytes]:
        return [token.encode("utf-8", "surrogatepass") for token in self._tokens]

    def state(self) -> dict:
        return {"kind": self.kind, "vocabulary": self.vocabulary}
