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

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
SECURE = r"https://|http://(localhost|127\.0\.0\.1|\[::1\])([:/]|$)"  # nobody can change the text
MAX_DOWNLOAD = 4 << 30  # bytes; the environment can set another limit
TIMEOUT = 20  # seconds without an answer after which a download fails
RUN_FOLDERS = ("lightning_logs", "checkpoints")  # a folder corpus leaves them out
HEAD = 8192  # bytes at the start of a file; a NUL among them means binary data
LINE = np.dtype([("end", "<i8"), ("nats", "<f8")])  # of a play: the offset after it, its cost


@dataclass(frozen=True)
class Corpus:
    """A text, as the UTF-8 files whose concatenation it is.

    Args:
        name: what `find_corpus` finds it by.
        paths: the files in order. A file that does not end with a line end is given one if
            another file follows.
        floor_path: the cost of each line (array of `LINE`) if the entropy of the text is known.
        left_out: what a folder corpus leaves out, each as `NAME (REASON)`.
    """

    name: str
    paths: tuple[Path, ...]
    floor_path: Path | None = None
    left_out: tuple[str, ...] = ()

    def chunks(self, size: int = 1 << 22, title: str = "text") -> Iterator[str]:
        """The text in order, in pieces of about `size` characters; takes constant memory.

        `title` is that of the progress bar.

        Raises:
            UserError: if a file is not UTF-8 text (with file and byte offset), or there is no
                character at all.
        """
        last = ""
        with progress(sum(path.stat().st_size for path in self.paths), title) as bar:
            for path in self.paths:
                is_first_piece = True
                for text in _read_text(path, size, bar):
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

    def summary(self) -> str:
        """One line: `12 text files; left out: .git (hidden)`; "" for a single text file."""
        if len(self.paths) == 1 and not self.left_out:
            return ""
        more = ["..."] if len(self.left_out) > 5 else []
        left_out = ", ".join([*self.left_out[:5], *more]) or "nothing"
        return f"{len(self.paths):,} text files; left out: {left_out}"


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
        path = printable(error.filename or cache_dir())
        raise corpus_error(name, f": {path}: {error.strerror or error}") from error


def make_once(path: Path, make: Callable[[], object]) -> None:
    """Call `make` if `path` does not exist; of several processes, one calls and the others wait."""
    if not path.exists():
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                make()


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
    left_out: list[str] = []
    texts = sorted(_find_texts(folder, left_out), key=Path.as_posix)
    corpus = Corpus(str(folder), tuple(texts), left_out=tuple(sorted(left_out)))
    if not texts:
        raise corpus_error(folder, f" has no text file in it ({corpus.summary()})")
    return corpus


def _find_texts(folder: Path, left_out: list[str]) -> Iterator[Path]:
    """The text files below `folder`; the names of other files are appended to `left_out`."""
    for path in folder.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if path.name.startswith("."):
            reason = "hidden"
        elif is_folder:
            of_a_run = path.name in RUN_FOLDERS or path == cache_dir()
            reason = "written by runs" if of_a_run else ""
        else:
            reason = _why_not_text(path)
        if reason:
            left_out.append(f"{printable(path.name)} ({reason})")
        elif is_folder:
            yield from _find_texts(path, left_out)
        else:
            yield path


def _why_not_text(path: Path) -> str:
    """The reason why this is not a text file, as far as its first bytes tell, or ""."""
    if not path.is_file():
        return "not a regular file"
    with path.open("rb") as file:
        head = file.read(HEAD)
    if b"\0" in head:
        return "binary or UTF-16"
    return "" if head else "empty"


def _read_text(path: Path, size: int, bar) -> Iterator[str]:
    """The non-empty pieces of a file's text, line ends translated, byte-order mark dropped."""
    with path.open(encoding="utf-8-sig") as file:
        done = 0
        try:
            while text := file.read(size):
                bar.update(file.buffer.tell() - done)
                done = file.buffer.tell()
                yield text
        except UnicodeDecodeError as error:
            # error.object is what the decoder has read last
            offset = file.buffer.tell() - len(error.object) + error.start
            at = f"{error.reason} at byte offset {offset}"
            message = f" is not UTF-8 text: {at}; convert it to UTF-8"
            raise corpus_error(path, message) from None


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
    make_once(path, lambda: _generate(seed, chars, path, floor_path))
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
    if re.match("[^/]*//[^/?]*@", url):  # the name would be written to logs and checkpoints
        raise corpus_error("URL", ": a URL with a user name or a password is not accepted")
    if not digest and not re.match(SECURE, url, re.IGNORECASE):
        advice = "plain http can be changed on the way; use https:// or add #sha256=HEX"
        raise corpus_error(name, f": {advice}")
    # The checksum is part of the file's name, so a text that fails it is used by no other name.
    path = cache_dir() / f"url-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()}.txt"
    _download(name, url, path, digest)
    return Corpus(name, (path,))


def _download(name: str, url: str, path: Path, digest: str | None) -> None:
    """Make sure that `path` holds the text of `url`, with this SHA-256 if one is given."""
    make_once(path, lambda: _fetch(name, url, path))
    if digest and (actual := file_sha256(path)) != digest:
        mismatch = f"{path} has the SHA-256 {actual[:12]}... instead of {digest[:12]}..."
        raise corpus_error(name, f": {mismatch}; delete the file and run again")


def _fetch(name: str, url: str, path: Path) -> None:
    import aiohttp  # not above: these two take time to import, and most runs need no download
    import fsspec

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    client = {"timeout": timeout, "trust_env": True}  # trust_env: proxies
    web = fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=client)
    try:
        with (
            write_atomically(path) as file,
            # block_size=0 streams the file; any size saves a request that asks for it
            web.open(url, block_size=0, size=1) as source,
            progress(None, "download") as bar,
        ):
            final = str(source.r.url)  # after redirects
            if url.startswith("https://") and "#sha256=" not in name and final[:8] != "https://":
                raise OSError(f"redirected to {final}, which others can change; add #sha256=HEX")
            limit = int(os.environ.get("GPT_LIGHTNING_MAX_DOWNLOAD", MAX_DOWNLOAD))
            while block := source.read(1 << 20):
                file.write(block)
                if file.tell() > limit:
                    raise OSError(f"larger than GPT_LIGHTNING_MAX_DOWNLOAD={limit} bytes")
                bar.update(len(block))
            if not file.tell():
                raise OSError("the server sent an empty file")
    except (aiohttp.ClientError, OSError) as error:
        reason = printable(f"{type(error).__name__}: {error}"[:300])  # may quote the server
        advice = f"run again, or save the file as {path}"
        raise corpus_error(name, f": download failed ({reason}); {advice}") from error
