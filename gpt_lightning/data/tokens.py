"""Tokens: a corpus encoded once into a memory-mapped .npy file, and found there ever after.

Three passes over the text, all in constant memory: one for its digest, one for the vocabulary
(where it is not given), one to encode. Later starts take the digest again, which is a second or two
for 2 GB: a file's size and times tell nearly always whether it has changed, and a run must never
train on what its text was before.

An entry of the cache is `tokens-KIND-KEY.npy` with a JSON note of its tokenizer; the key is a hash
of all that the ids depend on, so entries never change, and of two runs that build one at once
either may win. The note is written first: where the .npy is, the entry is complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_lightning.data.corpora import Corpus
from gpt_lightning.data.files import (
    cache_dir,
    progress,
    remove_orphans,
    shown,
    why,
    write_atomically,
)
from gpt_lightning.data.tokenizers import (
    KINDS,
    UNKNOWN,
    CharTokenizer,
    Tokenizer,
    choose,
    tokenizer_from_state,
    train_tokenizer,
)

FORMAT = 1  # changes whenever entries of the cache would be encoded or laid out otherwise
PIECE = 1 << 16  # bytes encoded at a time: their code points and ids stay in the processor's cache


@dataclass(frozen=True)
class TokenFile:
    """The ids of a corpus, and the tokenizer that they are of."""

    path: Path
    tokenizer: Tokenizer
    corpus_sha256: str

    def open(self) -> np.ndarray:
        """The ids, (N,) of `tokenizer.dtype`, as a read-only memory map."""
        return np.load(self.path, mmap_mode="r")


def prepare_tokens(
    corpus: Corpus,
    tokenizer: str = "char",
    unknown: str = "error",
    vocabulary: str | None = None,
    cache: Path | None = None,
) -> TokenFile:
    """The token file of a corpus, from the cache (`cache_dir()` unless given) or built now.

    A `vocabulary` (for "char") replaces the text's own distinct characters; `unknown` says what
    becomes of characters it lacks. Raises ValueError for a text that cannot be read or encoded, or
    that has no token, and if it changes meanwhile.
    """
    choose("--data.tokenizer", tokenizer, KINDS)
    choose("--data.unknown", unknown, UNKNOWN)
    given = vocabulary is not None
    if given and tokenizer != "char":
        raise ValueError(f"--data.vocabulary is for the char tokenizer, not for {tokenizer}")
    before = _stamps(corpus)
    with _bar(corpus, "digest") as bar:
        content = corpus.sha256(bar.update)
    parts = [FORMAT, content, tokenizer, vocabulary, unknown if given else None]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = Path(cache) if cache else cache_dir()
    entry = folder / f"tokens-{tokenizer}-{key[:32]}.npy"
    if found := _find(entry, unknown):
        return TokenFile(entry, found, content)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_orphans(folder, "tokens-")
        if given:
            coder = CharTokenizer(vocabulary, unknown)
        else:
            with _bar(corpus, "vocabulary") as bar:
                coder = train_tokenizer(tokenizer, corpus.chunks(PIECE, bar.update), unknown)
        _build(entry, corpus, coder)
    except OSError as error:
        raise ValueError(
            f"--data.corpus={shown(corpus.name)}: its token file {shown(entry)} cannot be made "
            f"({why(error)}); GPT_LIGHTNING_CACHE can name another folder"
        ) from error
    finally:
        # also on an error, which the change may have caused
        if _stamps(corpus) != before:
            entry.unlink(missing_ok=True)
            raise ValueError(
                f"--data.corpus={shown(corpus.name)} changed while it was read; run again"
            )
    return TokenFile(entry, coder, content)


def _stamps(corpus: Corpus) -> list[tuple[int, int]]:
    """What changes with the files of a corpus: size and time of each."""
    try:
        found = [path.stat() for path in corpus.paths]
    except OSError as error:
        where = f"{shown(corpus.name)}: {shown(error.filename)}"
        raise ValueError(f"--data.corpus={where} cannot be read ({why(error)})") from error
    return [(one.st_size, one.st_mtime_ns) for one in found]


def _bar(corpus: Corpus, title: str):
    """A progress bar for one pass over the bytes of a corpus."""
    return progress(sum(size for size, _ in _stamps(corpus)), title)


def _header(dtype: np.dtype, count: int) -> bytes:
    """The 128 bytes before the ids in a .npy file, of one size for every count."""
    fields = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    return b"\x93NUMPY\x01\x00\x76\x00" + f"{fields!r:<117}\n".encode()


def _build(entry: Path, corpus: Corpus, coder: Tokenizer) -> None:
    count = 0
    with write_atomically(entry) as file, _bar(corpus, "tokens") as bar:
        file.write(_header(coder.dtype, 0))
        for chunk in corpus.chunks(PIECE, bar.update):
            try:
                ids = coder.encode(chunk, offset=count)  # of characters: none is left out
            except ValueError as error:
                raise ValueError(f"--data.corpus={shown(corpus.name)}: {error}") from None
            count += len(ids)
            file.write(ids.data)
        if count == 0:
            raise ValueError(
                f"--data.corpus={shown(corpus.name)} has no character of the vocabulary"
            )
        file.seek(0)
        file.write(_header(coder.dtype, count))
        note = {"format": FORMAT, "tokens": count, "tokenizer": coder.state()}
        with write_atomically(entry.with_suffix(".json")) as side:
            side.write(json.dumps(note).encode())


def _find(entry: Path, unknown: str) -> Tokenizer | None:
    """The tokenizer of an entry, or None if there is none, or it is not as it was written."""
    try:
        note = json.loads(entry.with_suffix(".json").read_bytes())
        coder, count = tokenizer_from_state(note["tokenizer"], unknown), note["tokens"]
        header = _header(coder.dtype, count)
        with entry.open("rb") as file:
            whole = file.read(len(header)) == header
        size = len(header) + count * coder.dtype.itemsize
        return coder if whole and entry.stat().st_size == size else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
