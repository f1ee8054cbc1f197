"""The corpus as token ids in one memory-mapped file, built once and kept in the cache.

To build the file, `prepare_tokens` reads the text up to five times: to compute its digest, to
collect the vocabulary (characters, then words), to encode it, and to check that the digest is
unchanged. Memory is constant, except while `bpe` is trained. Later runs only compute the digest, so
that a run never trains on an earlier version of its text.
"""

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gpt_lightning.data.corpus import Corpus, corpus_error, file_errors, make_once
from gpt_lightning.data.tokenizers import (
    REPLACEMENT,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    character_counts,
    count_unknown,
    tokenizer_from_state,
)
from gpt_lightning.data.windows import Span
from gpt_lightning.errors import UserError
from gpt_lightning.files import cache_dir, write_atomically

FORMAT = 6  # increases whenever the same text would be encoded or stored differently
PIECE = 1 << 16  # characters encoded at a time: their ids stay in the processor's cache
MAX_VOCAB_SIZE = 1000  # of words and bpe (docs/tokenizers.md has the measurements)
LARGEST_VOCAB_SIZE = 1 << 16  # ids of two bytes; a checkpoint's tokenizer has a largest size
LARGE = 50_000_000  # bytes of text that take noticeable time to encode
MAX_CACHE = 10_000_000_000  # bytes of token files; a single one may be larger


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of `TextDataModule` that decide how a text becomes tokens.

    Raises:
        UserError: for a setting that this kind of tokenizer does not have.
    """

    kind: str = "char"
    unknown: str = "error"
    vocabulary: str | None = None
    min_count: int = 1
    max_vocab_size: int | None = None

    def __post_init__(self):
        for name, given, kinds in (
            ("vocabulary", self.vocabulary is not None, ("char", "word", "bpe")),
            ("min_count", self.min_count > 1, ("char", "word")),
            ("max_vocab_size", self.max_vocab_size is not None, ("word", "bpe")),
        ):
            if given and self.kind not in kinds:
                raise UserError(
                    f"{name}={str(getattr(self, name))[:60]} is for the tokenizers "
                    f"{', '.join(kinds)}, not for tokenizer={self.kind}; drop it"
                )
        if (size := self.max_vocab_size or 0) > LARGEST_VOCAB_SIZE:
            raise UserError(f"max_vocab_size={size} must be at most {LARGEST_VOCAB_SIZE}")

    def train(self, text: Corpus) -> tuple[Tokenizer, dict[str, int]]:
        """A tokenizer with the vocabulary of a text, and the counts of `TokenFile`."""
        size = self.max_vocab_size or MAX_VOCAB_SIZE
        if self.kind == "byte":
            return ByteTokenizer(), {}
        if self.kind == "bpe":
            from gpt_lightning.data.bpe import BPETokenizer

            return BPETokenizer.train(text.chunks(PIECE), size), {}
        counts = character_counts(text.chunks(PIECE), max(2, self.min_count))
        frequent = {character for character, count in counts.items() if count >= self.min_count}
        if not frequent:
            raise UserError(f"min_count={self.min_count} is more often than any character occurs")
        if len(frequent) < len(counts) and self.unknown == "replace":
            frequent.add(REPLACEMENT)
        characters = "".join(sorted(frequent))
        told = {"once": list(counts.values()).count(1)}
        if self.kind == "char":
            return CharTokenizer(characters, self.unknown), told
        from gpt_lightning.data.words import WordTokenizer

        return WordTokenizer.train(text.chunks(PIECE), characters, size, self.unknown), told


@dataclass(frozen=True)
class TokenFile:
    """The ids of a corpus in a file, and the tokenizer that made them.

    Args:
        path: the file.
        corpus_sha256: digest of the text.
        tokenizer: has the policy for unknown characters that was asked for.
        documents, characters: of the text.
        unknown: number of characters of the text that were replaced or dropped.
        once: number of characters that occur once in the text.
    """

    path: Path
    corpus: Corpus
    corpus_sha256: str
    tokenizer: Tokenizer
    documents: int
    characters: int
    unknown: int = 0
    once: int = 0

    @cached_property
    def ids(self) -> np.ndarray:
        """(N,) of `tokenizer.dtype`, a read-only memory map."""
        return np.memmap(self.path, self.tokenizer.dtype, mode="r")

    def __getstate__(self) -> dict:
        """What another process receives: the path of the ids, not the ids."""
        return {name: value for name, value in vars(self).items() if name != "ids"}


def prepare_tokens(
    corpus: Corpus, settings: TokenizerSettings, vocabulary_corpus: Corpus | None = None
) -> TokenFile:
    """The token file of a corpus, from the cache or built now.

    Args:
        vocabulary_corpus: the text that the vocabulary is made from; `corpus` by default.

    Raises:
        UserError: if the text cannot be read or encoded, has no token, or changes meanwhile.
    """
    with file_errors(corpus.name):
        digest = corpus.sha256()
        other = vocabulary_corpus.sha256() if vocabulary_corpus else None
        # The ids depend on these alone, so a file in the cache never changes.
        key = hashlib.sha256(json.dumps([FORMAT, digest, *astuple(settings), other]).encode())
        path = cache_dir() / f"tokens-{settings.kind}-{key.hexdigest()[:32]}.bin"

        def build() -> None:
            size = sum(file.stat().st_size for file in corpus.paths)
            if size >= LARGE:
                print(f"Encoding {size / 1e6:,.0f} MB of text once: {path} ...", file=sys.stderr)
            if settings.vocabulary is None:
                tokenizer, counts = settings.train(vocabulary_corpus or corpus)
            else:
                state = {"kind": settings.kind, "vocabulary": settings.vocabulary}
                tokenizer, counts = tokenizer_from_state(state, settings.unknown), {}
            _encode(corpus, tokenizer, path, digest, {} if vocabulary_corpus else counts)
            _remove_old(path, corpus, digest)

        make_once(path, build)
        entry = json.loads(path.with_suffix(".json").read_bytes())
        with contextlib.suppress(OSError):  # a cache that others may only read
            os.utime(path)  # for `_remove_old`
    tokenizer = tokenizer_from_state(entry["tokenizer"], settings.unknown)
    return TokenFile(path, corpus, digest, tokenizer, **entry["counts"])


def floor_of_spans(
    corpus: Corpus, tokenizer: Tokenizer, ids: np.ndarray, spans: list[Span]
) -> float | None:
    """Nats per character that no model can beat on these spans, if known.

    The first token of each span is not predicted.
    """
    if corpus.floor_path is None:
        return None
    count = tokenizer.count_characters
    characters = [[count(ids[:n]) for n in (start + 1, stop)] for start, stop in spans]
    floors = np.array([corpus.floor(*span) for span in characters], float)
    return float(np.average(floors, weights=[stop - start for start, stop in characters]))


def _encode(
    corpus: Corpus, tokenizer: Tokenizer, path: Path, digest: str, counts: dict[str, int]
) -> None:
    """Write the ids of the corpus to `path`, and the tokenizer's state to a .json file beside.

    A word is cut where a piece of the text ends, which is once in `PIECE` characters.
    """
    with write_atomically(path) as file:
        documents = characters = unknown = 0
        for begun, chunk in corpus.counted_chunks(PIECE):
            documents, characters = documents + begun, characters + len(chunk)
            unknown += count_unknown(chunk, tokenizer)
            try:
                file.write(tokenizer.encode(chunk).data)
            except UserError as error:
                raise corpus_error(corpus.name, f": {error}") from None
        if file.tell() == 0:
            raise corpus_error(corpus.name, " has no character of the vocabulary")
        if corpus.sha256() != digest:
            raise corpus_error(corpus.name, " changed while it was read; run again")
        # The ids appear last: if they exist, both files are complete.
        with write_atomically(path.with_suffix(".json")) as state_file:
            counts |= {"documents": documents, "characters": characters, "unknown": unknown}
            entry = {"tokenizer": tokenizer.state(), "counts": counts}
            entry |= {"source": _source(corpus), "sha256": digest}  # for `_remove_old`
            state_file.write(json.dumps(entry).encode())


def _source(corpus: Corpus) -> list:
    """Name of a corpus and how its files are read, in types of JSON."""
    how = {(file.encoding, file.field or "") for file in corpus.files}
    return [corpus.name, corpus.separator, *map(list, sorted(how))]


def _remove_old(new: Path, corpus: Corpus, digest: str) -> None:
    """Delete token files of other versions of the text, and the longest unused beyond MAX_CACHE.

    A run that has mapped a deleted file keeps its map. (Windows does not delete a mapped file.)
    """
    kept = 0  # bytes
    with contextlib.suppress(OSError, ValueError):  # the next new file is another chance
        paths = new.parent.glob("tokens-*.bin")
        for path in sorted(paths, key=lambda p: (p == new, p.stat().st_mtime), reverse=True):
            state = path.with_suffix(".json")
            entry = json.loads(state.read_bytes())
            outdated = entry.get("source") == _source(corpus) and entry.get("sha256") != digest
            size = path.stat().st_size
            if outdated or (kept and kept + size > MAX_CACHE):
                path.unlink()
                state.unlink()
            else:
                kept += size
