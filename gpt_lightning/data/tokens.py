"""The corpus as token ids in one memory-mapped file, built once and kept in the cache.

To build the file, `prepare_tokens` reads the text up to four times, in constant memory: to compute
its digest, to collect the vocabulary (unless one is given), to encode it, and to check that the
digest is unchanged. Later runs read the text once and compute its digest, so that a run never
trains on an earlier version of its text.
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
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    tokenizer_from_state,
)
from gpt_lightning.errors import UserError
from gpt_lightning.files import cache_dir, write_atomically

FORMAT = 3  # increases whenever the same text would be encoded or stored differently
PIECE = 1 << 16  # characters encoded at a time: their ids stay in the processor's cache
LARGE = 50_000_000  # bytes of text that take noticeable time to encode
MAX_CACHE = 10_000_000_000  # bytes of token files; a single one may be larger


@dataclass(frozen=True)
class TokenFile:
    """The ids of a corpus in a file, and the tokenizer that made them."""

    path: Path
    tokenizer: Tokenizer
    corpus_sha256: str

    def open(self) -> np.ndarray:
        """The ids, (N,) of `tokenizer.dtype`, as a read-only memory map."""
        return np.memmap(self.path, self.tokenizer.dtype, mode="r")


def prepare_tokens(
    corpus: Corpus,
    tokenizer: str = "char",
    unknown: str = "error",
    vocabulary: str | None = None,
    min_count: int = 1,
) -> TokenFile:
    """The token file of a corpus, from the cache or built now.

    Args:
        corpus: the text.
        tokenizer: kind of tokenizer, "char" or "byte".
        unknown: what happens to characters that the vocabulary lacks: "error", "drop", "replace".
        vocabulary: characters of the vocabulary ("char" only); those of the text by default.
        min_count: a vocabulary of the text has the characters that it contains this often.

    Raises:
        UserError: if the text cannot be read or encoded, has no token, or changes meanwhile.
    """
    if vocabulary is not None and tokenizer != "char":
        raise UserError(f"vocabulary is for the char tokenizer, not for {tokenizer}")
    with file_errors(corpus.name):
        digest = corpus.sha256()
        # The ids depend on these alone, so a file in the cache never changes.
        parts = json.dumps([FORMAT, digest, tokenizer, vocabulary, unknown, min_count])
        key = hashlib.sha256(parts.encode()).hexdigest()[:32]
        path = cache_dir() / f"tokens-{tokenizer}-{key}.bin"

        def build() -> None:
            coder: Tokenizer
            size = sum(file.stat().st_size for file in corpus.paths)
            if size >= LARGE:
                print(f"Encoding {size / 1e6:,.0f} MB of text once: {path} ...", file=sys.stderr)
            if tokenizer == "byte":
                coder = ByteTokenizer()
            elif vocabulary is None:
                coder = CharTokenizer.train(corpus.chunks(PIECE), unknown, min_count)
            else:
                coder = CharTokenizer(vocabulary, unknown)
            _encode(corpus, coder, path, digest)
            _remove_old(path, corpus, digest)

        make_once(path, build)
        entry = json.loads(path.with_suffix(".json").read_bytes())
        with contextlib.suppress(OSError):  # a cache that others may only read
            os.utime(path)  # for `_remove_old`
    return TokenFile(path, tokenizer_from_state(entry["tokenizer"], unknown), digest)


def _encode(corpus: Corpus, coder: Tokenizer, path: Path, digest: str) -> None:
    """Write the ids of the corpus to `path`, and the tokenizer's state to a .json file beside."""
    with write_atomically(path) as file:
        for chunk in corpus.chunks(PIECE):
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
            state_file.write(json.dumps(entry).encode())


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
