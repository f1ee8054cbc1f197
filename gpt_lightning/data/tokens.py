"""The corpus as token ids in one memory-mapped .npy file, built once and kept in the cache.

To build the file, `prepare_tokens` reads the text up to four times, in constant memory: to compute
its digest, to collect the vocabulary (unless one is given), to encode it, and to check that the
digest is unchanged. Later runs read the text once and compute its digest, so that a run never
trains on an earlier version of its text.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_lightning.data.corpus import Corpus, corpus_error, file_errors, lock, progress
from gpt_lightning.data.tokenizers import (
    KINDS,
    UNKNOWN,
    CharTokenizer,
    Tokenizer,
    choose,
    tokenizer_from_state,
    train_tokenizer,
)
from gpt_lightning.errors import UserError
from gpt_lightning.files import cache_dir, write_atomically

FORMAT = 1  # increases whenever the same text would be encoded or stored differently
PIECE = 1 << 16  # bytes encoded at a time: their ids stay in the processor's cache


@dataclass(frozen=True)
class TokenFile:
    """The ids of a corpus in a .npy file, and the tokenizer that made them."""

    path: Path
    tokenizer: Tokenizer
    corpus_sha256: str

    def open(self) -> np.ndarray:
        """The ids, (N,) of `tokenizer.dtype`, as a read-only memory map."""
        return np.load(self.path, mmap_mode="r")


def prepare_tokens(
    corpus: Corpus, tokenizer: str = "char", unknown: str = "error", vocabulary: str | None = None
) -> TokenFile:
    """The token file of a corpus, from the cache or built now.

    Args:
        corpus: the text.
        tokenizer: kind of tokenizer, "char" or "byte".
        unknown: what happens to characters that the vocabulary lacks: "error", "drop", "replace".
        vocabulary: characters of the vocabulary ("char" only); those of the text by default.

    Raises:
        UserError: if the text cannot be read or encoded, has no token, or changes meanwhile.
    """
    choose("tokenizer", tokenizer, KINDS)
    choose("unknown", unknown, UNKNOWN)
    if vocabulary is not None and tokenizer != "char":
        raise UserError(f"vocabulary is for the char tokenizer, not for {tokenizer}")
    with file_errors(corpus.name):
        digest = corpus.sha256()
        policy = None if vocabulary is None else unknown  # else no character is unknown
        # The ids depend on these alone, so a file in the cache never changes.
        parts = json.dumps([FORMAT, digest, tokenizer, vocabulary, policy])
        key = hashlib.sha256(parts.encode()).hexdigest()[:32]
        path = cache_dir() / f"tokens-{tokenizer}-{key}.npy"
        coder = _find(path, unknown)
        if coder is None:
            with lock(path):  # another process may be building it
                coder = _find(path, unknown) or _build(
                    path, corpus, digest, tokenizer, unknown, vocabulary
                )
    return TokenFile(path, coder, digest)


def _find(path: Path, unknown: str) -> Tokenizer | None:
    """The tokenizer of a file in the cache, or None if there is no such file or it is damaged."""
    try:
        note = json.loads(path.with_suffix(".json").read_bytes())
        coder, ids = tokenizer_from_state(note["tokenizer"], unknown), np.load(path, mmap_mode="r")
        return coder if (ids.dtype, len(ids)) == (coder.dtype, note["tokens"]) else None
    except (OSError, ValueError, LookupError, TypeError, EOFError):
        return None


def _build(
    path: Path, corpus: Corpus, digest: str, kind: str, unknown: str, vocabulary: str | None
) -> Tokenizer:
    """Encode the corpus into `path`, with a note of its tokenizer and origin beside it."""
    size = sum(path.stat().st_size for path in corpus.paths)
    coder: Tokenizer
    if vocabulary is not None:
        coder = CharTokenizer(vocabulary, unknown)
    else:
        with progress(size, "vocabulary") as bar:
            coder = train_tokenizer(kind, corpus.chunks(PIECE, bar.update), unknown)
    count = 0
    with write_atomically(path) as file, progress(size, "tokens") as bar:
        _write_header(file, coder.dtype, 0)
        for chunk in corpus.chunks(PIECE, bar.update):
            try:
                # raises only if no character was dropped, so count is the position in the text
                ids = coder.encode(chunk, offset=count)
            except UserError as error:
                raise corpus_error(corpus.name, f": {error}") from None
            count += len(ids)
            file.write(ids.data)
        if count == 0:
            raise corpus_error(corpus.name, " has no character of the vocabulary")
        if corpus.sha256() != digest:
            raise corpus_error(corpus.name, " changed while it was read; run again")
        file.seek(0)
        _write_header(file, coder.dtype, count)  # of the same size: numpy leaves room for growth
        note = {"corpus": corpus.name, "sha256": digest, "tokens": count}
        with write_atomically(path.with_suffix(".json")) as note_file:
            note_file.write(json.dumps({**note, "tokenizer": coder.state()}).encode())
    _remove_outdated(corpus.name, digest)
    return coder


def _write_header(file, dtype: np.dtype, count: int) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def _remove_outdated(name: str, digest: str) -> None:
    """Remove the token files of what the corpus of this name was before it changed."""
    for note_path in cache_dir().glob("tokens-*.json"):
        # not a damaged note, nor, on Windows, a file that another run has open
        with contextlib.suppress(OSError, ValueError, LookupError):
            note = json.loads(note_path.read_bytes())
            if note["corpus"] == name and note["sha256"] != digest:
                for path in cache_dir().glob(f"*{note_path.stem}.*"):
                    path.unlink()
