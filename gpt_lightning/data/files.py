"""Files: the cache folder, written whole or not at all, digests, and how messages name them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that is being written cannot be removed anyway
    fcntl = None


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
            _lock(file)  # tells it from an orphan
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the new name itself must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _lock(file: BinaryIO) -> bool:
    """Take the file's lock; False where there are none, BlockingIOError where another has it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fcntl is not None
    except BlockingIOError:
        raise
    except OSError:  # some network file systems
        return False


def remove_orphans(folder: Path, prefix: str, age: float = 86400.0) -> None:
    """Remove what killed `write_atomically`s of `prefix...` left in `folder`.

    That is what nobody has the lock of; where there are no locks, what is `age` seconds old.
    """
    ours = re.compile(re.escape(f".{prefix}") + r".*\.[0-9a-f]{16}\.tmp")
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            with contextlib.suppress(OSError):  # it is being written, or somebody was quicker
                with path.open("r+b") as file:
                    enough = min(age, 1) if _lock(file) else age  # one just made has no lock yet
                if path.stat().st_mtime <= time.time() - enough:
                    path.unlink()


def file_sha256(path: Path, advance: Callable[[int], object] = lambda n: None) -> str:
    """Hex digest of the file's bytes, read in pieces; `advance` is told the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def progress(total: int | None, title: str, initial: int = 0):
    """A tqdm bar of bytes, rate and time left, on a terminal only, and only after two seconds."""
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
