"""Corpora: the texts a model can be trained on, all of them local UTF-8 files in the end.

What `--data.corpus` accepts:

    playwright[:SEED[:CHARS]]   a play written on the spot, its entropy known (needs no network)
    tinyshakespeare             1.1 MB of Shakespeare, downloaded once, its checksum verified
    https://...                 any text file, downloaded once; `#sha256=HEX` verifies it, and
                                plain http:// needs that
    FILE                        a UTF-8 text file; `./tinyshakespeare` reaches a file of that name
    FOLDER                      every text file below it, sorted by path; hidden files and folders,
                                linked folders, and binary files (NUL in the first 8 KiB) are
                                passed over; a file without a line end at its end is given one
                                where another follows

Line ends: `\\r\\n` and a lone `\\r` become `\\n`. A byte-order mark at the start of a file is
dropped. Everything else is kept as it is.

Downloads and plays are kept in `cache_dir()`: $GPT_LIGHTNING_CACHE, else
$XDG_CACHE_HOME/gpt_lightning, else ~/.cache/gpt_lightning.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_lightning.data.downloads import download
from gpt_lightning.data.files import (
    cache_dir,
    file_sha256,
    progress,
    remove_orphans,
    shown,
    why,
    write_atomically,
)
from gpt_lightning.messages import nearest

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUILTIN = ("playwright", "tinyshakespeare")
MAX_CHARS = 10**10
HEAD = 8192  # bytes at the start of a file that tell text from binary
LINE = np.dtype([("end", "<i8"), ("nats", "<f8")])  # of a play: the offset after it, and its cost


@dataclass(frozen=True)
class Corpus:
    """A text, as the UTF-8 files whose concatenation it is."""

    name: str  # what identifies it for people; `find_corpus(name)` finds it again
    paths: tuple[Path, ...]
    floor_path: Path | None = None  # the LINEs of the text, where its entropy is known

    def chunks(
        self, size: int = 1 << 22, advance: Callable[[int], object] = lambda n: None
    ) -> Iterator[str]:
        """The text in order, in pieces made of about `size` bytes each; constant memory.

        `advance` is told how many bytes of the files each took, once it is dealt with. Raises
        ValueError naming file and byte offset where a file turns out not to be UTF-8 text, and one
        saying that the corpus is empty if there was no character in it.
        """
        last = ""
        for path in self.paths:
            first = True
            for text in _read_text(path, size, advance):
                if first and last and last != "\n":
                    yield "\n"
                first, last = False, text[-1]
                yield text
        if not last:
            raise ValueError(f"--data.corpus={shown(self.name)} is empty: it has no character")

    def text(self) -> str:
        """The whole text, for small corpora; errors as those of `chunks`."""
        return "".join(self.chunks())

    def sha256(self, advance: Callable[[int], object] = lambda n: None) -> str:
        """Hex digest of the content: of the file's bytes, or of the digests of several files.

        `advance` is told how many bytes are dealt with, piece by piece.
        """
        digests = [file_sha256(path, advance) for path in self.paths]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def floor(self, start: int, stop: int) -> float | None:
        """Nats per character that no model can beat on characters [start, stop), if known."""
        if self.floor_path is None:
            return None
        from gpt_lightning.data import playwright

        lines = np.memmap(self.floor_path, LINE, mode="r")
        return playwright.floor(lines["end"], lines["nats"], start, stop)


def find_corpus(name: str) -> Corpus:
    """The corpus of this name (see the module's docstring), fetched or written if need be.

    Raises ValueError with one line that says what is wrong with the name, the file or the
    download, and what to do about it.
    """
    try:
        if name.partition(":")[0] == "playwright":
            return _playwright(name)
        if name == "tinyshakespeare":
            return _tinyshakespeare()
        if re.match(r"https?://", name, re.IGNORECASE):
            return _from_url(name)
        return _from_path(name)
    except OSError as error:  # a full disk, a cache that cannot be written
        folder = cache_dir()
        where = Path(error.filename or folder)
        advice = "; GPT_LIGHTNING_CACHE can name another folder"
        advice = advice if where.is_relative_to(folder) else ""
        raise ValueError(
            f"--data.corpus={shown(name)}: {shown(where)} ({why(error)}){advice}"
        ) from error


# --- text files -----------------------------------------------------------------------------------


def _head(path: Path) -> bytes:
    """The first bytes of a file; ValueError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read ({why(error)})") from error


def _check_head(path: Path, head: bytes) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{shown(path)} looks like UTF-16 text; convert it to UTF-8")
    if (nul := head.find(b"\0")) >= 0:
        raise _binary(path, nul)


def _binary(path: Path, nul: int) -> ValueError:
    return ValueError(
        f"{shown(path)} looks binary (NUL byte at byte offset {nul}); a corpus is UTF-8 text"
    )


def _read_text(path: Path, size: int, advance: Callable[[int], object]) -> Iterator[str]:
    """The non-empty pieces of a file's text, line ends translated, byte-order mark dropped."""
    _check_head(path, _head(path))
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    data, at, more = b"", 0, True  # bytes not decoded yet, and where in the file they begin
    with path.open("rb", buffering=0) as file:
        while more:
            more = file.read(size)
            data += more
            nul = data.find(b"\0")
            try:
                text, used = codecs.utf_8_decode(data, "strict", not more)
            except UnicodeDecodeError as error:
                if not 0 <= nul < error.start:
                    raise ValueError(
                        f"{shown(path)} is not UTF-8 text: {error.reason} at byte offset "
                        f"{at + error.start}; convert it to UTF-8"
                    ) from None
            if nul >= 0:
                raise _binary(path, at + nul)
            if at == 0:
                text = text.removeprefix("\ufeff")
            data, at = data[used:], at + used
            if text := newlines.decode(text, not more):
                yield text
            advance(len(more))


def _has_text(head: bytes) -> bool:
    return b"\0" not in head and head not in (b"", codecs.BOM_UTF8)


def _from_path(name: str) -> Corpus:
    try:
        path = Path(os.path.abspath(Path(name).expanduser()))
        mode = path.stat().st_mode if name else None
    except (FileNotFoundError, NotADirectoryError, ValueError, RuntimeError):
        mode = None
    except OSError as error:
        raise ValueError(f"--data.corpus={shown(name)} cannot be read ({why(error)})") from error
    if mode is None:
        hint = nearest(name.partition(":")[0].lower(), BUILTIN)
        raise ValueError(
            f"--data.corpus={shown(name)} is not found: it takes playwright[:SEED[:CHARS]], "
            f"tinyshakespeare, an http:// or https:// URL, or the path of a file or folder{hint}"
        )
    if stat.S_ISDIR(mode):
        return _from_folder(path)
    if not stat.S_ISREG(mode):
        raise ValueError(f"--data.corpus={shown(path)} is neither a regular file nor a folder")
    head = _head(path)
    _check_head(path, head)
    if head in (b"", codecs.BOM_UTF8):
        raise ValueError(f"--data.corpus={shown(path)} is empty: it has no character")
    return Corpus(str(path), (path,))


def _from_folder(folder: Path) -> Corpus:
    def unreadable(error: OSError):
        raise ValueError(f"{shown(error.filename)} cannot be read ({why(error)})") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=unreadable):  # follows no linked folder
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file()]
    found.sort(key=lambda path: path.relative_to(folder).as_posix())
    texts = tuple(path for path in found if _has_text(_head(path)))
    if not texts:
        passed_over = f" ({len(found)} binary or empty files passed over)" if found else ""
        raise ValueError(f"--data.corpus={shown(folder)} has no text file in it{passed_over}")
    return Corpus(str(folder), texts)


# --- playwright -----------------------------------------------------------------------------------


def _playwright(name: str) -> Corpus:
    from gpt_lightning.data import playwright

    numbers = name.split(":")[1:]
    if len(numbers) > 2:
        raise ValueError(f"--data.corpus={shown(name)} should be playwright[:SEED[:CHARS]]")
    seed, chars = playwright.DEFAULT_SEED, playwright.DEFAULT_CHARS
    if numbers:
        seed = _whole(name, "SEED", numbers[0], 0, 2**63 - 1)
    if len(numbers) == 2:
        chars = _whole(name, "CHARS", numbers[1], 1, MAX_CHARS)

    folder = cache_dir()
    stem = f"playwright-v{playwright.GRAMMAR_VERSION}-{seed}-{chars}"
    text_path, floor_path, note_path = (folder / (stem + end) for end in (".txt", ".nats", ".json"))
    if not _is_whole_play(text_path, floor_path, note_path):
        remove_orphans(folder, "playwright-")
        digests = hashlib.sha256(), hashlib.sha256()
        # the text comes last: where it is, all is
        with (
            write_atomically(text_path) as text_file,
            write_atomically(note_path) as note,
            write_atomically(floor_path) as floor_file,
            progress(chars, "play") as bar,
        ):
            for text, ends, nats in playwright.write_pieces(seed, chars):
                lines = np.empty(len(ends), LINE)
                lines["end"], lines["nats"] = ends, nats
                for digest, file, data in zip(
                    digests, (text_file, floor_file), (text.encode("ascii"), lines), strict=True
                ):
                    digest.update(data)
                    file.write(data)
                bar.update(len(text))
            note.write(json.dumps([digest.hexdigest() for digest in digests]).encode())
    return Corpus(f"playwright:{seed}:{chars}", (text_path,), floor_path)


def _whole(name: str, part: str, text: str, low: int, high: int) -> int:
    """The number written in `text`, between `low` and `high`; ValueError if there is none."""
    if re.fullmatch("[0-9]{1,19}", text) and low <= int(text) <= high:
        return int(text)
    raise ValueError(
        f"--data.corpus={shown(name)}: {part} must be a whole number from {low} to {high}, as in "
        f"playwright:1337:1000000, not {text!r}"
    )


def _is_whole_play(text_path: Path, floor_path: Path, note_path: Path) -> bool:
    try:
        digests = json.loads(note_path.read_bytes())
        paths = text_path, floor_path
        with progress(sum(path.stat().st_size for path in paths), "digest") as bar:
            return digests == [file_sha256(path, bar.update) for path in paths]
    except (OSError, ValueError):
        return False


# --- downloads ------------------------------------------------------------------------------------


def _tinyshakespeare() -> Corpus:
    target = cache_dir() / "tinyshakespeare.txt"
    download(
        "tinyshakespeare",
        TINYSHAKESPEARE_URL,
        target,
        TINYSHAKESPEARE_SHA256,
        f"put the file at {shown(target)} and run again (or use --data.corpus=FILE)",
    )
    return Corpus("tinyshakespeare", (target,))


def _from_url(name: str) -> Corpus:
    url, _, fragment = name.partition("#")
    digest = None
    if fragment.startswith("sha256="):
        digest = fragment.removeprefix("sha256=").lower()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"--data.corpus={shown(name)}: after #sha256= come 64 hex digits")
    try:
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname:
            raise ValueError("it names no host")
    except ValueError as error:
        raise ValueError(f"--data.corpus={shown(name)} is no proper URL: {error}") from None
    if "@" in parts.netloc:  # which would end up in logs and checkpoints; not repeated here either
        raise ValueError("--data.corpus: a URL with a user name or password in it is not accepted")
    # the name in the cache owes nothing to the path in the URL
    target = cache_dir() / f"url-{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()}.txt"
    path, query = (urllib.parse.quote(part, safe="/%:=&?~+!$,;'@()*[]") for part in parts[2:4])
    download(
        name,
        urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, "")),
        target,
        digest,
        "check the URL and run again (it goes on where it stopped), or use --data.corpus=FILE",
    )
    return Corpus(name, (target,))
