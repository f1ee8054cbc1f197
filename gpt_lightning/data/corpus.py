"""Corpora: a name becomes a text, stored in local UTF-8 files.

`find_corpus` accepts these names:

    playwright[:SEED[:CHARS]]   the embedded corpus: generated plays of known entropy, no network
    tinyshakespeare             1.1 MB of Shakespeare, downloaded once, its checksum verified
    https://...                 a text file, downloaded once; `#sha256=HEX` verifies it, and plain
                                http:// needs that
    FILE                        a UTF-8 text file; `./tinyshakespeare` is a file of that name
    FOLDER                      every text file below it, sorted by path, except hidden files
                                and files written by runs

Line ends `\\r\\n` and `\\r` become `\\n`. A byte-order mark at the start of a file is dropped.
Downloads and generated plays are kept in `cache_dir()`.
"""

import codecs
import contextlib
import hashlib
import os
import re
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
from filelock import FileLock

from gpt_lightning.errors import UserError, did_you_mean
from gpt_lightning.files import cache_dir, file_sha256, write_atomically

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SECURE = r"https://|http://(localhost|127\.0\.0\.1|\[::1\])([:/]|$)"  # nobody can change the text
MAX_DOWNLOAD = 4 << 30  # bytes; the environment can set another limit
LARGE = 10_000_000  # characters of a play that take noticeable time to generate
TIMEOUT = 20  # seconds without an answer after which a download fails
RUN_FOLDERS = ("lightning_logs", "checkpoints")  # a folder corpus leaves them out
LINE = np.dtype([("end", "<i8"), ("nats", "<f8")])  # of a play: the offset after it, its cost


@dataclass(frozen=True)
class Corpus:
    """A text, as the UTF-8 files whose concatenation it is.

    Args:
        name: what `find_corpus` finds it by.
        paths: the files in order. A file that does not end with a line end is given one if
            another file follows.
        floor_path: the cost of each line (array of `LINE`) if the entropy of the text is known.
        left_out: what a folder holds that is not part of the text, each as `NAME (REASON)`.
    """

    name: str
    paths: tuple[Path, ...]
    floor_path: Path | None = None
    left_out: tuple[str, ...] = ()

    def chunks(self, size: int = 1 << 22) -> Iterator[str]:
        """The text in order, in pieces of about `size` characters; takes constant memory.

        Raises:
            UserError: if a file is not UTF-8 text, or there is no character at all.
        """
        last = ""
        for path in self.paths:
            separator = "" if last in ("", "\n") else "\n"
            with path.open(encoding="utf-8-sig") as file:
                try:
                    while text := file.read(size):
                        yield separator + text
                        separator, last = "", text[-1]
                except UnicodeDecodeError as error:
                    message = f" is not UTF-8 text ({error.reason}); convert it to UTF-8"
                    raise corpus_error(path, message) from None
        if not last:
            raise corpus_error(self.name, " is empty")

    def sha256(self) -> str:
        """Hex digest of the file's bytes, or, of several files, of their digests in order."""
        digests = [file_sha256(path) for path in self.paths]
        if len(digests) == 1:
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


def find_corpus(name: str) -> Corpus:
    """The corpus of this name (see the module's docstring), downloaded or generated if need be.

    Raises:
        UserError: if there is no such corpus, or it cannot be read or downloaded.
    """
    with file_errors(name):
        if name.partition(":")[0] == "playwright":
            return _playwright(name)
        if name == "tinyshakespeare":
            path = cache_dir() / "tinyshakespeare.txt"
            _download(name, TINYSHAKESPEARE_URL, path, TINYSHAKESPEARE_SHA256)
            return Corpus(name, (path,))
        if re.match("https?://", name, re.IGNORECASE):
            return _from_url(name)
        return _from_path(name)


def corpus_error(name: object, message: str) -> UserError:
    """The error whose message is `corpus=NAME` and `message`."""
    return UserError(f"corpus={name}{message}")


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names the corpus and the file."""
    try:
        yield
    except OSError as error:
        path = error.filename or cache_dir()
        raise corpus_error(name, f": {path}: {error.strerror or error}") from error


def listed(before: str, names: Sequence[str], most: int = 5) -> str:
    """`before` and the first `most` of `names`, with the number of others; "" without names."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{before}{', '.join(names[:most])}{more}" if names else ""


def make_once(path: Path, make: Callable[[], object]) -> None:
    """Call `make` if `path` does not exist; of several processes, one calls and the others wait."""
    if not path.exists():
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                make()


# --- files and folders ----------------------------------------------------------------------------


def _from_path(name: str) -> Corpus:
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if not name or not path.exists():
        raise corpus_error(
            name,
            " is not found: it is playwright[:SEED[:CHARS]], tinyshakespeare, an https:// URL, or "
            "the path of a file or folder"
            + did_you_mean(name.lower(), ["playwright", "tinyshakespeare"]),
        )
    if path.is_dir():
        return _from_folder(path)
    if reason := _not_text(path):
        raise corpus_error(path, f" is not a UTF-8 text file: it is {reason}")
    return Corpus(str(path), (path,))


def _from_folder(folder: Path) -> Corpus:
    paths: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=_raise):  # does not follow links
        folders[:] = [name for name in folders if name[0] != "." and name not in RUN_FOLDERS]
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        paths += [Path(root, name) for name in [*names, *links] if name[0] != "."]
    paths.sort(key=Path.as_posix)
    reasons = {path: _not_text(path) for path in paths}
    texts = tuple(path for path in paths if not reasons[path])
    left_out = [f"{path.relative_to(folder)} ({r})" for path, r in reasons.items() if r]
    if not texts:
        raise corpus_error(folder, " has no text file in it" + listed("; left out: ", left_out))
    return Corpus(str(folder), texts, left_out=tuple(left_out))


def _raise(error: OSError) -> NoReturn:
    raise error  # os.walk passes over a folder that it cannot read


def _not_text(path: Path) -> str:
    """Why this is not a UTF-8 text file, as far as its first bytes tell; "" if it is one."""
    if path.is_dir():
        return "a link to a folder"
    if not path.is_file():
        return "not a regular file"
    with path.open("rb") as file:
        head = file.read(8192)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16; convert it to UTF-8"
    return "empty" if not head else "binary" if b"\0" in head else ""


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
    return Corpus(f"playwright:{seed}:{chars}", (path,), floor_path)


# --- downloads ------------------------------------------------------------------------------------


def _from_url(name: str) -> Corpus:
    url, _, fragment = name.partition("#")
    digest = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
    if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
        raise corpus_error(name, ": #sha256= must be followed by 64 hex digits")
    if re.match("[^/]*//[^/?]*@", url):  # the name would be written to logs and checkpoints
        raise corpus_error("URL", ": a URL with a user name or a password is not accepted")
    if not digest and not re.match(SECURE, url, re.IGNORECASE):
        advice = "plain http can be changed on the way; use https:// or add #sha256=HEX"
        raise corpus_error(name, f": {advice}")
    # The checksum is part of the file's name, so a text that fails it is used by no other name.
    path = cache_dir() / f"url-{hashlib.sha256(name.encode()).hexdigest()}.txt"
    _download(name, url, path, digest)
    return Corpus(name, (path,))


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
    url = quote(url, safe=string.punctuation)  # spaces and the like
    try:
        with urlopen(url, timeout=TIMEOUT) as source, write_atomically(path) as file:
            if not digest and not re.match(SECURE, source.url, re.IGNORECASE):
                raise OSError(f"redirected to {source.url}, which others can change")
            while block := source.read(1 << 20):
                file.write(block)
                if file.tell() > int(limit):
                    raise OSError(f"larger than GPT_LIGHTNING_MAX_DOWNLOAD={limit} bytes")
            if file.tell() != int(source.headers.get("Content-Length", file.tell())):
                raise OSError("the connection ended early")
    except (OSError, HTTPException) as error:
        reason = f"{type(error).__name__}: {error}"[:300]  # may quote the server
        advice = f"run again, or save the file as {path}"
        raise corpus_error(name, f": download failed ({reason}); {advice}") from error
