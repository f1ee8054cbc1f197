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
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock

from gpt_lightning.errors import UserError, did_you_mean
from gpt_lightning.files import cache_dir, file_sha256, write_atomically

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUILTIN = ("playwright", "tinyshakespeare")
MAX_CHARS = 10**10  # of a generated play
TIMEOUT = 20  # seconds without an answer after which a download fails
RUN_FOLDERS = ("lightning_logs", "checkpoints")  # a folder corpus leaves them out
HEAD = 8192  # bytes at the start of a file that distinguish text from binary data
LINE = np.dtype([("end", "<i8"), ("nats", "<f8")])  # of a play: the offset after it, its cost


@dataclass(frozen=True)
class Corpus:
    """A text, as the UTF-8 files whose concatenation it is.

    Args:
        name: what `find_corpus` finds it by.
        paths: the files in order. A file that does not end with a line end is given one if
            another file follows.
        floor_path: the cost of each line (array of `LINE`) if the entropy of the text is known.
        left_out: what a folder corpus leaves out, as (path, reason).
    """

    name: str
    paths: tuple[Path, ...]
    floor_path: Path | None = None
    left_out: tuple[tuple[Path, str], ...] = ()

    def chunks(
        self, size: int = 1 << 22, advance: Callable[[int], object] = lambda n: None
    ) -> Iterator[str]:
        """The text in order, in pieces of about `size` bytes; takes constant memory.

        `advance` is called with the number of bytes read for each piece.

        Raises:
            UserError: if a file is not UTF-8 text (with file and byte offset), or there is no
                character at all.
        """
        last = ""
        for path in self.paths:
            is_first_piece = True
            for text in _read_text(path, size, advance):
                if is_first_piece and last not in ("", "\n"):
                    yield "\n"
                is_first_piece, last = False, text[-1]
                yield text
        if not last:
            raise corpus_error(self.name, " is empty")

    def text(self) -> str:
        """The whole text, for small corpora; raises like `chunks`."""
        return "".join(self.chunks())

    def sha256(self) -> str:
        """Hex digest of the file's bytes, or, of several files, of their digests in order."""
        digests = [file_sha256(path) for path in self.paths]
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

    def summary(self, most: int = 5) -> str:
        """One line: `12 text files; left out: .git (hidden)`; "" for a single text file."""
        names = [f"{printable(path.name)} ({reason})" for path, reason in self.left_out[:most]]
        if len(self.left_out) > most:
            names.append(f"{len(self.left_out) - most:,} more")
        if len(self.paths) == 1 and not names:
            return ""
        files = "1 text file" if len(self.paths) == 1 else f"{len(self.paths):,} text files"
        return f"{files}; left out: {', '.join(names)}" if names else files


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


def printable(name: object) -> str:
    """`name`, with unprintable characters escaped."""
    return str(name) if str(name).isprintable() else repr(str(name))


def corpus_error(name: object, message: str) -> UserError:
    """The error whose message is `corpus=NAME` and `message`."""
    return UserError(f"corpus={printable(name)}{message}")


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names the corpus and the file."""
    try:
        yield
    except OSError as error:
        cache = cache_dir()
        path = Path(error.filename or cache)
        advice = "; GPT_LIGHTNING_CACHE can name another folder" if cache in path.parents else ""
        reason = f": {printable(path)}: {error.strerror or error}{advice}"
        raise corpus_error(name, reason) from error


def lock(path: Path) -> FileLock:
    """The lock that a process holds while it makes this file of the cache."""
    return FileLock(path.with_name(f".{path.name}.lock"))


def progress(total: int | None, title: str):
    """A tqdm bar of bytes, on a terminal only, and only after two seconds."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=title, unit="B", unit_scale=True, leave=False, delay=2, disable=None
    )


# --- files and folders ----------------------------------------------------------------------------


def _from_path(name: str) -> Corpus:
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if name and os.path.isdir(path):
        return _from_folder(path)
    if not name or not os.path.exists(path):
        raise corpus_error(
            name,
            " is not found: it is playwright[:SEED[:CHARS]], tinyshakespeare, an https:// URL, or "
            "the path of a file or folder" + did_you_mean(name.partition(":")[0].lower(), BUILTIN),
        )
    if reason := _why_not_text(path):
        raise corpus_error(path, f" is not a text file: {reason}")
    return Corpus(str(path), (path,))


def _from_folder(folder: Path) -> Corpus:
    left_out: list[tuple[Path, str]] = []
    texts = list(_find_texts(folder, left_out))
    texts.sort(key=lambda path: path.relative_to(folder).as_posix())
    corpus = Corpus(str(folder), tuple(texts), left_out=tuple(sorted(left_out)))
    if not texts:
        raise corpus_error(folder, f" has no text file in it ({corpus.summary()})")
    return corpus


def _find_texts(folder: Path, left_out: list[tuple[Path, str]]) -> Iterator[Path]:
    """The text files below `folder`; other paths are appended to `left_out` with the reason."""
    for path in folder.iterdir():
        if reason := _why_left_out(path):
            left_out.append((path, reason))
        elif path.is_dir():
            yield from _find_texts(path, left_out)
        else:
            yield path


def _why_left_out(path: Path) -> str:
    """The reason why a folder corpus leaves out this file or folder, or ""."""
    if path.name.startswith("."):
        return "hidden"
    if not path.is_dir():
        return _why_not_text(path)
    if path.is_symlink():
        return "linked folder"
    of_a_run = path.name in RUN_FOLDERS or path == cache_dir()
    return "written by runs" if of_a_run else ""


def _why_not_text(path: Path) -> str:
    """The reason why this is not a text file, as far as its first bytes tell, or ""."""
    if not path.is_file():
        return "not a regular file"
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head in (b"", codecs.BOM_UTF8):
        return "empty"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16, convert it to UTF-8"
    if (nul := head.find(b"\0")) >= 0:
        return f"binary, NUL byte at byte offset {nul}"
    return ""


def _read_text(path: Path, size: int, advance: Callable[[int], object]) -> Iterator[str]:
    """The non-empty pieces of a file's text, line ends translated, byte-order mark dropped."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    data, offset = b"", 0  # bytes that are not decoded yet, and their offset in the file
    at_end = False
    with path.open("rb", buffering=0) as file:
        while not at_end:
            block = file.read(size)
            data += block
            at_end = not block
            if (nul := data.find(b"\0")) >= 0:
                raise corpus_error(path, f" is binary: NUL byte at byte offset {offset + nul}")
            try:
                text, used = codecs.utf_8_decode(data, "strict", at_end)
            except UnicodeDecodeError as error:
                at = f"{error.reason} at byte offset {offset + error.start}"
                message = f" is not UTF-8 text: {at}; convert it to UTF-8"
                raise corpus_error(path, message) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            data, offset = data[used:], offset + used
            if text := newlines.decode(text, at_end):
                yield text
            advance(len(block))


# --- the embedded corpus --------------------------------------------------------------------------


def _playwright(name: str) -> Corpus:
    from gpt_lightning.data import playwright

    match = re.fullmatch("playwright(?::([0-9]{1,19})(?::([0-9]{1,19}))?)?", name)
    seed = int(match and match[1] or playwright.DEFAULT_SEED)
    chars = int(match and match[2] or playwright.DEFAULT_CHARS)
    if not match or not 1 <= chars <= MAX_CHARS:
        raise corpus_error(
            name,
            " must be playwright[:SEED[:CHARS]] with whole numbers, as in playwright:1337:1000000; "
            f"SEED has at most 19 digits, CHARS is from 1 to {MAX_CHARS}",
        )
    path = cache_dir() / f"playwright-v{playwright.GRAMMAR_VERSION}-{seed}-{chars}.txt"
    floor_path = path.with_suffix(".nats")
    if not path.exists():
        with lock(path):
            if not path.exists():
                _generate(seed, chars, path, floor_path)
    return Corpus(f"playwright:{seed}:{chars}", (path,), floor_path)


def _generate(seed: int, chars: int, path: Path, floor_path: Path) -> None:
    from gpt_lightning.data import playwright

    # The text file appears last: if it exists, both are complete.
    with (
        write_atomically(path) as text_file,
        write_atomically(floor_path) as floor_file,
        progress(chars, "play") as bar,
    ):
        for text, ends, nats in playwright.write_pieces(seed, chars):
            lines = np.empty(len(ends), LINE)
            lines["end"], lines["nats"] = ends, nats
            text_file.write(text.encode("ascii"))
            floor_file.write(lines.tobytes())
            bar.update(len(text))


# --- downloads ------------------------------------------------------------------------------------


def _from_url(name: str) -> Corpus:
    url, _, fragment = name.partition("#")
    digest = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
    if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
        raise corpus_error(name, ": #sha256= must be followed by 64 hex digits")
    try:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:
            raise ValueError("it names no host")
    except ValueError as error:  # also of a port that is not a number
        raise corpus_error(name, f" is not a URL: {error}") from None
    if "@" in parts.netloc:  # the name would be written to logs and checkpoints
        raise corpus_error("URL", ": a URL with a user name or a password is not accepted")
    path = cache_dir() / f"url-{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()}.txt"
    _download(name, url, path, digest)
    return Corpus(name, (path,))


def _download(name: str, url: str, path: Path, digest: str | None) -> None:
    """Make sure that `path` holds the text of `url`, with this SHA-256 if one is given."""
    if not path.exists():
        with lock(path):
            if not path.exists():  # another process may have been faster
                return _fetch(name, url, path, digest)
    if digest and (actual := file_sha256(path)) != digest:
        mismatch = f"{path} has the SHA-256 {actual[:12]}... instead of {digest[:12]}..."
        raise corpus_error(name, f": {mismatch}; delete the file and run again")


def _fetch(name: str, url: str, path: Path, digest: str | None) -> None:
    import aiohttp  # not above: these two take time to import, and most runs need no download
    import fsspec

    def failed(reason: object) -> UserError:
        reason = printable(str(reason)[:300])  # may quote the server
        advice = f"run again, or save the file as {path}"
        return corpus_error(name, f": download failed ({reason}); {advice}")

    limit = _download_limit()
    insecure = "plain http can be changed on the way; use https:// or add #sha256=HEX"
    if not digest and not _is_secure(url):
        raise failed(insecure)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    client = {"timeout": timeout, "trust_env": True}  # trust_env: proxies
    web = fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=client)
    sha256, received = hashlib.sha256(), 0
    try:
        # block_size=0 streams the file; any size saves a request that asks for it
        with write_atomically(path) as file, web.open(url, block_size=0, size=1) as source:
            if not digest and not _is_secure(str(source.r.url)):  # after redirects
                raise failed(insecure)
            size = int(source.r.headers.get("Content-Length", 0))
            with progress(size or None, "download") as bar:
                while block := source.read(1 << 20):
                    received += len(block)
                    if max(size, received) > limit:
                        raise failed(f"it is larger than GPT_LIGHTNING_MAX_DOWNLOAD={limit} bytes")
                    sha256.update(block)
                    file.write(block)
                    bar.update(len(block))
            if not received:
                raise failed("the server sent an empty file")
            if digest and (actual := sha256.hexdigest()) != digest:
                raise failed(f"its SHA-256 is {actual[:12]}... instead of {digest[:12]}...")
    except FileNotFoundError as error:
        raise failed(f"404, not found: {error}") from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise failed(str(error) or type(error).__name__) from error


def _is_secure(url: str) -> bool:
    """Whether nobody can change the text of this URL on its way here."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")


def _download_limit() -> int:
    """The most bytes that a download may have: $GPT_LIGHTNING_MAX_DOWNLOAD, or 4 GiB."""
    text = os.environ.get("GPT_LIGHTNING_MAX_DOWNLOAD") or str(4 << 30)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"GPT_LIGHTNING_MAX_DOWNLOAD={printable(text)} must be a number of bytes")
    return int(text)
