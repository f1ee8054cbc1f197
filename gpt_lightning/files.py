"""Files written completely or not at all, digests, and the cache folder."""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO

import platformdirs

from gpt_lightning.errors import UserError


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` in one step when the block ends without an error.

    `path` is always the complete old file or the complete new one, even after a power cut.
    The temporary file beside it has a fixed name, so that the next writer overwrites what a killed
    one left. Two writers of one path at a time need a lock.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            _sync(file)
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(file: BinaryIO) -> None:
    """`os.fsync`, where the file system has it: some network and user-space ones refuse."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _replace(source: Path, target: Path) -> None:
    """`os.replace`, retried for two seconds: virus scanners on Windows open new files briefly."""
    for _ in range(40):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.05)
    os.replace(source, target)


def unused(path: Path) -> Path:
    """`path`, or with a number if it exists: `a.ckpt`, `a-1.ckpt`, `a-2.ckpt`, ..."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(name for name in chain([path], names) if not name.exists())


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_dir() -> Path:
    """`$GPT_LIGHTNING_CACHE`, or the user's cache folder of this system; created if missing.

    Raises:
        UserError: if the folder cannot be created.
    """
    folder = os.environ.get("GPT_LIGHTNING_CACHE") or platformdirs.user_cache_dir("gpt_lightning")
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {path} cannot be created ({error}); set GPT_LIGHTNING_CACHE to a "
            "folder that you can write to"
        ) from error
    return path
