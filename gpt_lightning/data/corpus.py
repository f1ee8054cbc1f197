"""Corpora: a name becomes a text, read from local files.

`find_corpus` accepts these names:

    playwright[:SEED[:CHARS]]   the embedded corpus: generated plays of known entropy, no network
    tinyshakespeare             1.1 MB of Shakespeare, downloaded once, its checksum verified
    https://...                 a file, downloaded once; `#sha256=HEX` verifies it, and plain
                                http:// needs that; s3:// and others are read through fsspec
    FILE                        a file; `./tinyshakespeare` is a file of that name
    FOLDER                      every text file below it, sorted by path, except hidden files
                                and files written by runs
    GLOB                        the files that match, such as `texts/**/*.md`

Files are read in the formats of `documents`. Downloads and generated plays are kept in
`cache_dir()`.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
from filelock import FileLock

from gpt_lightning.data.documents import (
    JSON_LINES,
    RUN_FOLDERS,
    TABLES,
    TextFile,
    check_encoding,
    corpus_error,
    find_text_files,
    listed,
    read_documents,
    split_suffixes,
)
from gpt_lightning.errors import UserError, did_you_mean
from gpt_lightning.files import cache_dir, file_sha256, write_atomically

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
URL = r"[a-z][a-z0-9+.-]+://"
SECURE = r"https://|http://(localhost|127\.0\.0\.1|\[::1\])([:/]|$)"  # nobody can change the text
REMOTE = ("s3", "gs", "gcs", "az", "hf", "hdfs")  # read through fsspec and a package of its own
MAX_DOWNLOAD = 4 << 30  # bytes; the environment can set another limit
LARGE = 10_000_000  # characters of a play that take noticeable time to generate
TIMEOUT = 20  # seconds without an answer after which a download fails
LINE = np.dtype([("end", "<i8"), ("nats", "<f8")])  # of a play: the offset after it, its cost


@dataclass(frozen=True)
class Corpus:
    """A text, as the documents of files.

    Args:
        name: what `find_corpus` finds it by.
        files: the files in order.
        separator: stands between two documents. Without one, a document that does not end with a
            line end is given one if another document follows.
        floor_path: the cost of each line (array of `LINE`) if the entropy of the text is known.
        left_out: what a folder or archive holds that is not part of the text, each as
            `NAME (REASON)`.
    """

    name: str
    files: tuple[TextFile, ...]
    separator: str = ""
    floor_path: Path | None = None
    left_out: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files on disk, without repetition."""
        return tuple(dict.fromkeys(file.path for file in self.files))

    def chunks(self, size: int = 1 << 22) -> Iterator[str]:
        """The text in order, in pieces of about `size` characters; takes constant memory.

        Raises:
            UserError: if a file cannot be read as text, or there is no character at all.
        """
        return (text for _, text in self.counted_chunks(size))

    def counted_chunks(self, size: int) -> Iterator[tuple[int, str]]:
        """Pieces as of `chunks`, each with the number of documents that begin in it."""
        documents, parts, length, last = 0, [], 0, ""
        for begins, piece in read_documents(self.files, size):
            if parts and length + len(piece) > size:
                yield documents, "".join(parts)
                documents, parts, length = 0, [], 0
            if begins and last:
                parts.append(self.separator or ("" if last == "\n" else "\n"))
            parts.append(piece)
            documents, length, last = documents + begins, length + len(piece), piece[-1]
        if not last:
            raise corpus_error(self.name, " is empty")
        yield documents, "".join(parts)

    def sha256(self) -> str:
        """Hex digest of all that determines the text.

        It is that of the file's bytes, or, of several files, of their digests in order. How the
        files are read is part of it if that is not the default.
        """
        digests = [file_sha256(path) for path in self.paths]
        how = [(file.encoding, file.field, file.field and file.kind) for file in self.files]
        if self.separator or set(how) != {("utf-8", None, None)}:
            digests.append(json.dumps([self.separator, how]))
        elif len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def floor(self, start: int, stop: int) -> float | None:
        """Nats per character that no model can beat on characters [start, stop), if known.

        A line that the range cuts counts in proportion.
        """
        if self.floor_path is None:
            return None
        lines = np.fromfile(self.floor_path, LINE)
        ends, sums = np.append(0, lines["end"]), np.append(0, lines["nats"].cumsum())
        return float(np.diff(np.interp([start, stop], ends, sums))[0] / (stop - start))


def find_corpus(
    name: str, *, field: str | None = None, encoding: str = "utf-8", separator: str = ""
) -> Corpus:
    """The corpus of this name (see the module's docstring), downloaded or generated if need be.

    Args:
        field: of files with rows (.jsonl, .ndjson, .csv, .tsv), the field that is text; each row
            is a document. Without it they are read as plain text.
        encoding: of the files: a codec of Python, or "auto" to detect that of each file.
        separator: the text between two documents; see `Corpus`.

    Raises:
        UserError: if there is no such corpus, or it cannot be read or downloaded.
    """
    encoding = check_encoding(encoding)
    with file_errors(name):
        if name.partition(":")[0] == "playwright":
            return _playwright(name)
        if name == "tinyshakespeare":
            path = cache_dir() / "tinyshakespeare.txt"
            _download(name, TINYSHAKESPEARE_URL, path, TINYSHAKESPEARE_SHA256)
            return Corpus(name, (TextFile(path),))
        if re.match(URL, name, re.IGNORECASE):
            paths = [_from_url(name)]
        else:
            path = Path(os.path.abspath(os.path.expanduser(name)))
            name, paths = str(path), _local_files(name, path)
        files, reasons = find_text_files(paths, encoding, field)
    folder = name if os.path.isdir(name) else os.path.commonpath([path.parent for path in paths])
    left_out = tuple(f"{os.path.relpath(file, folder)} ({why})" for file, why in reasons.items())
    if not files:
        raise corpus_error(name, " has no text in it" + listed(": ", left_out))
    for found in sorted({file.encoding for file in files}) if encoding == "auto" else ():
        names = [str(file) for file in files if file.encoding == found]
        print(listed(f"encoding=auto found {found}: ", names), file=sys.stderr)
    return Corpus(name, tuple(files), separator, left_out=left_out)


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names the corpus and the file."""
    try:
        yield
    except OSError as error:
        path = error.filename or cache_dir()
        raise corpus_error(name, f": {path}: {error.strerror or error}") from error


def make_once(path: Path, make: Callable[[], object]) -> None:
    """Call `make` if `path` does not exist; of several processes, one calls and the others wait."""
    if not path.exists():
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                make()


# --- files and folders ----------------------------------------------------------------------------


def _local_files(name: str, path: Path) -> list[Path]:
    """The files that `name`, whose absolute path is `path`, stands for, sorted."""
    if name and path.is_dir():
        return _below(path)
    if name and path.exists():
        return [path]
    if paths := _matching(path):
        return paths
    raise corpus_error(
        name,
        " is not found: it is playwright[:SEED[:CHARS]], tinyshakespeare, an https:// or s3:// "
        "URL, the path of a file or folder, or a pattern such as texts/**/*.md"
        + did_you_mean(name.lower(), ["playwright", "tinyshakespeare"]),
    )


def _below(folder: Path) -> list[Path]:
    paths: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=_raise):  # does not follow links
        folders[:] = [name for name in folders if name[0] != "." and name not in RUN_FOLDERS]
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        paths += [Path(root, name) for name in [*names, *links] if name[0] != "."]
    return sorted(paths, key=Path.as_posix)


def _raise(error: OSError) -> NoReturn:
    raise error  # os.walk passes over a folder that it cannot read


def _matching(pattern: Path) -> list[Path]:
    """The files that a pattern matches, except hidden ones and those below folders as above."""
    paths = []
    for path in map(Path, glob.glob(str(pattern), recursive=True)):
        found = [folder for folder in path.parents if folder not in pattern.parents]
        if not path.is_dir() and not any(f.name in RUN_FOLDERS or f.is_symlink() for f in found):
            paths.append(path)
    return sorted(paths, key=Path.as_posix)


# --- the embedded corpus --------------------------------------------------------------------------


def _playwright(name: str) -> Corpus:
    from gpt_lightning.data import playwright

    match = re.fullmatch("playwright(?::([0-9]{1,19})(?::([0-9]{1,10}))?)?", name)
    seed = int(match and match[1] or playwright.DEFAULT_SEED)
    chars = int(match and match[2] or playwright.DEFAULT_CHARS)
    if not match or not chars:
        raise corpus_error(
            name,
            " must be playwright[:SEED[:CHARS]] with positive whole numbers, as in "
            "playwright:1337:1000000; SEED has at most 19 digits, CHARS at most 10",
        )
    path = cache_dir() / f"playwright-v{playwright.GRAMMAR_VERSION}-{seed}-{chars}.txt"
    floor_path = path.with_suffix(".nats")

    def generate() -> None:
        if chars >= LARGE:
            print(f"Generating {chars:,} characters: {path} ...", file=sys.stderr)
        end = 0
        # The text file appears last: if it exists, both are complete.
        with write_atomically(path) as text_file, write_atomically(floor_path) as floor_file:
            lines = playwright.write_lines(seed)
            while end < chars:
                line, nats = next(lines)
                end += len(line)
                text_file.write(line.encode("ascii"))
                floor_file.write(np.array((end, nats), LINE).tobytes())

    make_once(path, generate)
    return Corpus(f"playwright:{seed}:{chars}", (TextFile(path),), floor_path=floor_path)


# --- downloads ------------------------------------------------------------------------------------


def _from_url(name: str) -> Path:
    url, _, fragment = name.partition("#")
    digest = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
    if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
        raise corpus_error(name, ": #sha256= must be followed by 64 hex digits")
    if re.match("[^/]*//[^/?]*@", url):  # the name would be written to logs and checkpoints
        raise corpus_error("URL", ": a URL with a user name or a password is not accepted")
    protocol = url.partition("://")[0].lower()
    if protocol not in ("http", "https", *REMOTE):
        raise corpus_error(name, f": URLs begin with one of {'://, '.join(('https', *REMOTE))}://")
    if protocol == "http" and not digest and not re.match(SECURE, url, re.IGNORECASE):
        advice = "plain http can be changed on the way; use https:// or add #sha256=HEX"
        raise corpus_error(name, f": {advice}")
    kind, compression = split_suffixes(url.partition("?")[0])
    if kind not in (".zip", *JSON_LINES, *TABLES):
        kind = ".txt"
    # The checksum is part of the file's name, so a text that fails it is used by no other name.
    path = cache_dir() / f"url-{hashlib.sha256(name.encode()).hexdigest()}{kind}{compression}"
    _download(name, url, path, digest)
    return path


def _download(name: str, url: str, path: Path, digest: str | None) -> None:
    """Make sure that `path` holds the text of `url`, with this SHA-256 if one is given."""
    make_once(path, lambda: _fetch(name, url, path, digest))
    if digest and (actual := file_sha256(path)) != digest:
        mismatch = f"{path} has the SHA-256 {actual[:12]}... instead of {digest[:12]}..."
        raise corpus_error(name, f": {mismatch}; delete the file and run again")


def _fetch(name: str, url: str, path: Path, digest: str | None) -> None:
    print(f"Downloading {url} to {path} ...", file=sys.stderr)
    limit = os.environ.get("GPT_LIGHTNING_MAX_DOWNLOAD", str(MAX_DOWNLOAD))
    if not limit.isdecimal():
        raise UserError(f"GPT_LIGHTNING_MAX_DOWNLOAD={limit} must be a number of bytes")
    try:
        with write_atomically(path) as file:
            for block in _blocks(url, digest):
                file.write(block)
                if file.tell() > int(limit):
                    raise OSError(f"larger than GPT_LIGHTNING_MAX_DOWNLOAD={limit} bytes")
    except Exception as error:  # each package behind fsspec has types of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]  # may quote the server
        advice = f"run again, or save the file as {path}"
        raise corpus_error(name, f": download failed ({reason}); {advice}") from error


def _blocks(url: str, digest: str | None) -> Iterator[bytes]:
    """The content of a URL."""
    if not url.lower().startswith("http"):
        import fsspec

        with fsspec.open(url, "rb") as source:
            yield from iter(lambda: source.read(1 << 20), b"")
        return
    url = quote(url, safe=string.punctuation)  # spaces and the like
    with urlopen(url, timeout=TIMEOUT) as source:
        if not digest and not re.match(SECURE, source.url, re.IGNORECASE):
            raise OSError(f"redirected to {source.url}, which others can change")
        size = 0
        while block := source.read(1 << 20):
            size += len(block)
            yield block
        if size != int(source.headers.get("Content-Length", size)):
            raise OSError("the connection ended early")
