"""Corpora: the texts a model can be trained on, all of them local UTF-8 files in the end.

What `--data.corpus` accepts:

    playwright[:SEED[:CHARS]]   a play written on the spot, its entropy known (needs no network)
    tinyshakespeare             1.1 MB of Shakespeare, downloaded once, its checksum verified
    http://... or https://...   any text file, downloaded once; `#sha256=HEX` verifies it
    FILE                        a UTF-8 text file; `./tinyshakespeare` reaches a file of that name
    FOLDER                      every text file below it, sorted by path; hidden files and folders,
                                linked folders, and binary files (NUL in the first 8 KiB) are
                                passed over; a file without a line end at its end is given one
                                where another follows

Line ends: `\\r\\n` and a lone `\\r` become `\\n`. A byte-order mark at the start of a file is
dropped. Everything else is kept as it is.

Downloads and plays are kept in `cache_dir()`: $GPT_LIGHTNING_CACHE, else
$XDG_CACHE_HOME/gpt_lightning, else ~/.cache/gpt_lightning. $GPT_LIGHTNING_MAX_DOWNLOAD (bytes,
4 GiB unless told) and $GPT_LIGHTNING_TIMEOUT (seconds, 20) bound a download.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import http.client
import io
import json
import math
import os
import re
import secrets
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt_lightning.messages import nearest

try:
    import fcntl
except ImportError:  # Windows: two downloads of one URL at once are not kept apart there
    fcntl = None

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BUILTIN = ("playwright", "tinyshakespeare")
MAX_CHARS = 10**9
HEAD = 8192  # bytes at the start of a file that tell text from binary


@dataclass(frozen=True)
class Corpus:
    """A text, as the UTF-8 files whose concatenation it is."""

    name: str  # what identifies it for people; `find_corpus(name)` finds it again
    paths: tuple[Path, ...]
    floor_path: Path | None = None  # .npz with line_ends and nats, where the entropy is known

    def chunks(self, size: int = 1 << 22) -> Iterator[str]:
        """The text in order, in pieces made of about `size` bytes each; constant memory.

        Raises ValueError naming file and byte offset where a file turns out not to be UTF-8 text,
        and one saying that the corpus is empty if there was no character in it.
        """
        last = ""
        for path in self.paths:
            first = True
            for text in _read_text(path, size):
                if first and last and last != "\n":
                    yield "\n"
                first, last = False, text[-1]
                yield text
        if not last:
            raise ValueError(f"--data.corpus={shown(self.name)} is empty: it has no character")

    def text(self) -> str:
        """The whole text, for small corpora; errors as those of `chunks`."""
        return "".join(self.chunks())

    def sha256(self) -> str:
        """Hex digest of the content: of the file's bytes, or of the digests of several files."""
        digests = [file_sha256(path) for path in self.paths]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def floor(self, start: int, stop: int) -> float | None:
        """Nats per character that no model can beat on characters [start, stop), if known."""
        if self.floor_path is None:
            return None
        from gpt_lightning.data import playwright

        with np.load(self.floor_path) as known:
            return playwright.floor(known["line_ends"], known["nats"], start, stop)


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
        where = f": {shown(error.filename)}" if error.filename else ""
        raise ValueError(f"--data.corpus={shown(name)}{where} ({why(error)})") from error


def cache_dir() -> Path:
    """The folder for what can be made again: downloads, plays, token files. Made on demand.

    Where there is no home, or the folder cannot be made there, it is a private one in the
    system's temporary folder. Only $GPT_LIGHTNING_CACHE, asked for by name, has to work:
    ValueError if it does not.
    """
    if own := os.environ.get("GPT_LIGHTNING_CACHE"):
        try:
            folder = Path(own).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            return folder.absolute()
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"GPT_LIGHTNING_CACHE={shown(own)}: the folder cannot be made ({why(error)}); "
                "name another one"
            ) from error
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        base = Path(os.environ.get("XDG_CACHE_HOME") or "")
        if not base.is_absolute():  # to be ignored, says the XDG specification
            base = Path.home() / ".cache"
        folder = base / "gpt_lightning"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir(), f"gpt_lightning-{user}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # anyone may have put something of this name there
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user:
            return folder
    return Path(tempfile.mkdtemp(prefix="gpt_lightning-"))


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, in one step, and not at all on an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_orphans(folder: Path, prefix: str, age: float = 86400.0) -> None:
    """Remove what killed `write_atomically`s of `prefix...` left in `folder`, `age` seconds ago."""
    ours = re.compile(re.escape(f".{prefix}") + r".*\.[0-9a-f]{16}\.tmp")
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another process may be quicker
                if path.stat().st_mtime < time.time() - age:
                    path.unlink()


def file_sha256(path: Path) -> str:
    """Hex digest of the file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def progress(total: int | None, title: str, initial: int = 0):
    """A tqdm bar of bytes, on a terminal only, and only after two seconds."""
    from tqdm import tqdm  # not above: it takes time that a start without a bar can do without

    style = dict(unit="B", unit_scale=True, leave=False, delay=2, disable=None)
    return tqdm(total=total, initial=initial, desc=title, **style)


def shown(name: object) -> str:
    """`name` fit for one line of a message."""
    return str(name) if str(name).isprintable() else repr(str(name))


def why(error: Exception) -> str:
    """The reason that an exception gives, on one line."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    if isinstance(reason, Exception):  # a URLError wraps another one
        reason = reason.strerror if getattr(reason, "strerror", None) else reason
    return " ".join(str(reason).split()) or type(error).__name__


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


def _read_text(path: Path, size: int) -> Iterator[str]:
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
    text_path, floor_path = folder / f"{stem}.txt", folder / f"{stem}.npz"
    if not _is_whole_play(text_path, floor_path):
        remove_orphans(folder, "playwright-")
        text, line_ends, nats = playwright.write_play(seed, chars)
        assert text.isascii() and len(text) == line_ends[-1]
        data = text.encode("ascii")
        digest = hashlib.sha256(data).hexdigest()
        # the text comes last: where it is, all is
        with write_atomically(floor_path) as file:
            np.savez(file, line_ends=line_ends, nats=nats, sha256=digest)
        with write_atomically(text_path) as file:
            file.write(data)
    return Corpus(f"playwright:{seed}:{chars}", (text_path,), floor_path)


def _whole(name: str, part: str, text: str, low: int, high: int) -> int:
    """The number written in `text`, between `low` and `high`; ValueError if there is none."""
    if re.fullmatch("[0-9]{1,19}", text) and low <= int(text) <= high:
        return int(text)
    raise ValueError(
        f"--data.corpus={shown(name)}: {part} must be a whole number from {low} to {high}, as in "
        f"playwright:1337:1000000, not {text!r}"
    )


def _is_whole_play(text_path: Path, floor_path: Path) -> bool:
    try:
        with np.load(floor_path) as known:
            # nats are read as well, for the checksum that .npz files have
            line_ends, _, digest = (known[key] for key in ("line_ends", "nats", "sha256"))
        size = text_path.stat().st_size
        return size == line_ends[-1] and file_sha256(text_path) == str(digest)
    # a damaged .npz fails in many ways
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


# --- downloads ------------------------------------------------------------------------------------


def _tinyshakespeare() -> Corpus:
    target = cache_dir() / "tinyshakespeare.txt"
    _download(
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
    _download(
        name,
        urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, "")),
        target,
        digest,
        "check the URL and run again (it goes on where it stopped), or use --data.corpus=FILE",
    )
    return Corpus(name, (target,))


def _download(name: str, url: str, target: Path, digest: str | None, advice: str) -> None:
    """Have the text of `url` in `target`, of this SHA-256 if one is given, or raise ValueError."""
    if not target.exists():
        with _alone(target):
            if not target.exists():  # another process may have been quicker
                return _fetch(name, url, target, digest, advice)
    if digest and (actual := file_sha256(target)) != digest:
        raise ValueError(
            f"--data.corpus={shown(name)}: {shown(target)} has the SHA-256 {actual[:12]}... where "
            f"{digest[:12]}... is expected; delete that file and run again"
        )


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of this target: two processes must not write one `.part`."""
    with target.with_name(target.name + ".lock").open("wb") as lock:
        if fcntl:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects, except out of https and to anything that is not the web."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = (urllib.parse.urlsplit(url).scheme for url in (req.full_url, newurl))
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise urllib.error.URLError(f"it redirects from {old} to {new}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(name: str, url: str, target: Path, digest: str | None, advice: str) -> None:
    """Download `url` to `target` by way of `target.part`, which a failure leaves to go on with."""
    part, note = (target.with_name(target.name + end) for end in (".part", ".part.json"))
    most = _limit("GPT_LIGHTNING_MAX_DOWNLOAD", 4 << 30)
    timeout = _limit("GPT_LIGHTNING_TIMEOUT", 20)
    try:
        _transfer(url, part, note, most, timeout)
        if digest and (actual := file_sha256(part)) != digest:
            part.unlink()  # it is ours, and going on with it would never end well
            raise OSError(f"its SHA-256 is {actual[:12]}... where {digest[:12]}... is expected")
        os.replace(part, target)
        note.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = why(error)
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            reason = f"the server answered {error.code} {reason}"
        elif isinstance(error, TimeoutError) or "timed out" in reason:
            reason = f"no answer within {timeout:g} seconds"
        place = "" if name.startswith(url) else f" {url}"
        raise ValueError(
            f"--data.corpus={shown(name)}: could not download{place} ({reason}); {advice}"
        ) from error


def _transfer(url: str, part: Path, note: Path, most: float, timeout: float) -> None:
    """Write what is missing of `url` to `part`; OSError or HTTPException if that fails.

    `note` keeps what tells whether a later answer belongs to the same version of the text.
    """
    too_many = f"more than GPT_LIGHTNING_MAX_DOWNLOAD={most:.0f}"
    response, have, total = _answer(url, timeout, *_so_far(part, note))
    if (total or 0) > most:
        response.close()
        raise OSError(f"its {total} bytes are {too_many}")
    with response, part.open("ab" if have else "wb") as file:
        if not have:
            etag = response.headers.get("ETag", "W/")
            validator = response.headers.get("Last-Modified") if etag[:2] == "W/" else etag
            known = {"validator": validator and " ".join(validator.split()), "total": total}
            note.write_text(json.dumps(known), "utf-8")
        with progress(total, "download", have) as bar:
            while have <= most and (block := response.read(1 << 18)):
                have += file.write(block)
                bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    if have > most:
        part.unlink()
        raise OSError(f"it goes on after {have} bytes, {too_many}")
    if total is not None and have != total:
        raise OSError(f"the connection ended after {have} of {total} bytes")
    if have == 0:
        raise OSError("the server sent an empty text")


def _so_far(part: Path, note: Path) -> tuple[int, str | None, int | None]:
    """Bytes in `part`, validator and total size noted; 0 bytes if one could not go on with them."""
    try:
        have, known = part.stat().st_size, json.loads(note.read_text("utf-8"))
        validator, total = known["validator"], known["total"]
    except (OSError, ValueError, LookupError, TypeError):
        return 0, None, None
    return (have if validator or total else 0), validator, total


def _answer(
    url: str, timeout: float, have: int = 0, validator: str | None = None, known: int | None = None
) -> tuple[http.client.HTTPResponse, int, int | None]:
    """The server's answer, the offset in the text at which it begins, and the text's size.

    Asks for the text from byte `have` on, and for all of it where the server has no such rest.
    """
    headers = {"User-Agent": "gpt_lightning"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    opener = urllib.request.build_opener(_Redirects)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # the text is shorter by now
            error.close()
            return _answer(url, timeout)
        raise
    if response.status == 200:
        return response, 0, response.length
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if have and span and int(span[1]) == have and int(span[2]) == (known or int(span[2])):
        return response, have, int(span[2])
    response.close()
    if have:
        return _answer(url, timeout)
    raise OSError(f"the server answered {response.status} {response.reason}")


def _limit(variable: str, default: float) -> float:
    """A bound for downloads from the environment."""
    text = os.environ.get(variable) or str(default)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ValueError(f"{variable}={shown(text)} must be a number above 0")
