"""The corpus as token ids in one memory-mapped file, built once and kept in the cache.

To build the file, `prepare_tokens` reads the text up to five times: to compute its digest, to
collect the vocabulary (characters, then words), to encode it, and to check that the digest is
unchanged. Memory is constant, except while `bpe` is trained. Later runs read the text once and
compute its digest, so that a run never trains on an earlier version of its text.
"""

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_lightning.data.corpus import Corpus, corpus_error, file_errors, make_once
from gpt_lightning.data.tokenizers import (
    REPLACEMENT,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    build_tokenizer,
    character_counts,
    tokenizer_from_state,
)
from gpt_lightning.errors import UserError
from gpt_lightning.files import cache_dir, write_atomically

FORMAT = 4  # increases whenever the same text would be encoded or stored differently
PIECE = 1 << 16  # characters encoded at a time: their ids stay in the processor's cache
MAX_VOCAB_SIZE = 1000  # of words and bpe (docs/tokenizers.md has the measurements)
LARGEST_VOCAB_SIZE = 1 << 16  # ids of two bytes; a checkpoint's tokenizer has a largest size
LARGE = 50_000_000  # bytes of text that take noticeable time to encode
MAX_CACHE = 10_000_000_000  # bytes of token files; a single one may be larger


@dataclass(frozen=True)
class TokenFile:
    """The ids of a corpus in a file, and the tokenizer that made them.

    Args:
        path: the file.
        tokenizer: has the policy for unknown characters that was asked for.
        corpus_sha256: digest of the text.
        rare: (number of different characters, number of their occurrences) that `min_count` left
            out of the vocabulary.
        once: number of characters of the vocabulary that occur once in the text.
        documents, characters: of the text.
    """

    path: Path
    tokenizer: Tokenizer
    corpus_sha256: str
    rare: tuple[int, int] = (0, 0)
    once: int = 0
    documents: int = 1
    characters: int = 0

    def open(self) -> np.ndarray:
        """The ids, (N,) of `tokenizer.dtype`, as a read-only memory map."""
        return np.memmap(self.path, self.tokenizer.dtype, mode="r")


def prepare_tokens(
    corpus: Corpus,
    tokenizer: str = "char",
    unknown: str | None = None,
    vocabulary: str | None = None,
    min_count: int = 1,
    max_vocab_size: int | None = None,
    vocabulary_corpus: Corpus | None = None,
) -> TokenFile:
    """The token file of a corpus, from the cache or built now.

    Args:
        corpus: the text.
        tokenizer: kind of tokenizer: "char", "byte", "word" or "bpe".
        unknown: what happens to characters that the vocabulary lacks: "error", "drop", "replace".
            None: "replace" if `min_count` is above 1, else "error".
        vocabulary: as in the state of the tokenizer; made from the text by default.
        min_count: a vocabulary of the text has the characters that it contains this often. If
            others are replaced, it has U+FFFD for them.
        max_vocab_size: largest number of tokens ("word" and "bpe" only); 1,000 by default.
        vocabulary_corpus: the text that the vocabulary is made from; `corpus` by default.

    Raises:
        UserError: if the text cannot be read or encoded, has no token, or changes meanwhile, or if
            a setting does not fit the kind of tokenizer.
    """
    _check_settings(tokenizer, vocabulary, min_count, max_vocab_size, vocabulary_corpus)
    unknown = unknown or ("replace" if min_count > 1 else "error")
    size = max_vocab_size or MAX_VOCAB_SIZE
    source = vocabulary_corpus or corpus
    with file_errors(corpus.name):
        digest = corpus.sha256()
        other = vocabulary_corpus.sha256() if vocabulary_corpus else None
        # The ids depend on these alone, so a file in the cache never changes.
        parts = [FORMAT, digest, tokenizer, vocabulary, unknown, min_count, size, other]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        path = cache_dir() / f"tokens-{tokenizer}-{key}.bin"

        def build() -> None:
            bytes_of_text = sum(file.stat().st_size for file in corpus.paths)
            if bytes_of_text >= LARGE:
                announced = f"Encoding {bytes_of_text / 1e6:,.0f} MB of text once: {path} ..."
                print(announced, file=sys.stderr)
            counts: dict = {}
            if vocabulary is None:
                coder, counts = _train(source, tokenizer, unknown, min_count, size)
            else:
                coder = build_tokenizer(tokenizer, vocabulary, unknown)
            _encode(corpus, coder, path, digest, counts if source is corpus else {})
            _remove_old(path, corpus, digest)

        make_once(path, build)
        entry = json.loads(path.with_suffix(".json").read_bytes())
        with contextlib.suppress(OSError):  # a cache that others may only read
            os.utime(path)  # for `_remove_old`
    coder = tokenizer_from_state(entry["tokenizer"], unknown)
    counts = entry["counts"]
    return TokenFile(
        path,
        coder,
        digest,
        tuple(counts.get("rare", (0, 0))),
        counts.get("once", 0),
        counts.get("documents", 1),
        counts.get("characters", 0),
    )


def _check_settings(
    tokenizer: str,
    vocabulary: str | None,
    min_count: int,
    max_vocab_size: int | None,
    vocabulary_corpus: Corpus | None,
) -> None:
    """Raise a UserError for a setting that this kind of tokenizer does not have."""
    trained = ("char", "word", "bpe")
    for name, value, kinds in (
        ("vocabulary", vocabulary, trained),
        ("vocabulary_corpus", vocabulary_corpus and vocabulary_corpus.name, trained),
        ("min_count", None if min_count == 1 else min_count, ("char", "word")),
        ("max_vocab_size", max_vocab_size, ("word", "bpe")),
    ):
        if value is not None and tokenizer not in kinds:
            raise UserError(
                f"{name}={str(value)[:60]} is for the tokenizers {', '.join(kinds)}, not for "
                f"tokenizer={tokenizer}; drop it"
            )
    if max_vocab_size is not None and max_vocab_size > LARGEST_VOCAB_SIZE:
        raise UserError(f"max_vocab_size={max_vocab_size} must be at most {LARGEST_VOCAB_SIZE}")


def _train(
    source: Corpus, kind: str, unknown: str, min_count: int, size: int
) -> tuple[Tokenizer, dict]:
    """A tokenizer whose vocabulary is that of a text, and the `counts` of `TokenFile`."""
    if kind == "byte":
        return ByteTokenizer(), {}
    if kind == "bpe":
        from gpt_lightning.data.bpe import BPETokenizer

        return BPETokenizer.train(source.chunks(PIECE), size), {}
    counts = character_counts(source.chunks(PIECE), max(2, min_count))
    rare = [count for count in counts.values() if count < min_count]
    frequent = {character for character, count in counts.items() if count >= min_count}
    if not frequent:
        raise UserError(f"min_count={min_count} is more often than any character occurs")
    if rare and unknown == "replace":
        frequent.add(REPLACEMENT)
    characters = "".join(sorted(frequent))
    once = sum(counts.get(character) == 1 for character in frequent)
    told = {"rare": [len(rare), sum(rare)], "once": once}
    if kind == "char":
        return CharTokenizer(characters, unknown), told
    from gpt_lightning.data.words import WordTokenizer

    return WordTokenizer.train(source.chunks(PIECE), characters, size, unknown), told


def _encode(corpus: Corpus, coder: Tokenizer, path: Path, digest: str, counts: dict) -> None:
    """Write the ids of the corpus to `path`, and the tokenizer's state to a .json file beside.

    A word is cut where a piece of the text ends, which is once in `PIECE` characters.
    """
    with write_atomically(path) as file:
        documents = characters = 0
        for begun, chunk in corpus.counted_chunks(PIECE):
            documents, characters = documents + begun, characters + len(chunk)
            try:
                file.write(coder.encode(chunk).data)
            except UserError as error:
                raise corpus_error(corpus.name, f": {error}") from None
        if file.tell() == 0:
            raise corpus_error(corpus.name, " has no character of the vocabulary")
        if corpus.sha256() != digest:
            raise corpus_error(corpus.name, " changed while it was read; run again")
        # The ids appear last: if they exist, both files are complete.
        with write_atomically(path.with_suffix(".json")) as state_file:
            entry = {"tokenizer": coder.state(), "corpus": corpus.name, "sha256": digest}
            counts = counts | {"documents": documents, "characters": characters}
            state_file.write(json.dumps(entry | {"counts": counts}).encode())


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
            outdated = entry.get("corpus") == corpus.name and entry.get("sha256") != digest
            size = path.stat().st_size
            if outdated or (kept and kept + size > MAX_CACHE):
                path.unlink()
                state.unlink()
            else:
                kept += size
