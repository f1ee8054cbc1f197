"""Downloads: a URL becomes a local file, once, verified; a download cut short is gone on with.

A partial download lies in `NAME.part` and is never used as the text; `NAME.part.json` notes which
version of the text it belongs to. $GPT_LIGHTNING_MAX_DOWNLOAD (bytes, 4 GiB unless told) bounds it,
and $GPT_LIGHTNING_TIMEOUT (seconds, 20) is how long a server may take to begin, or go on slowly.
Plain http, which anyone on the way can change, needs a checksum.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gpt_lightning.data.files import file_sha256, progress, shown, why

try:
    import fcntl
except ImportError:  # Windows: two downloads of one URL at once are not kept apart there
    fcntl = None

SLOW = 100  # bytes a second: what sends less means to keep us waiting


def download(name: str, url: str, target: Path, digest: str | None, advice: str) -> None:
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
    with _open(target.with_name(target.name + ".lock"), "ab") as lock:
        if fcntl:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open(path: Path, mode: str) -> IO:
    """Open a file to write, but not through a link that somebody has put there."""
    no_link = getattr(os, "O_NOFOLLOW", 0)
    encoding = None if "b" in mode else "utf-8"
    opener = lambda name, flags: os.open(name, flags | no_link, 0o666)  # noqa: E731
    return open(path, mode, encoding=encoding, opener=opener)


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
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme.lower() == "http" and not digest and not local:
        raise ValueError(
            f"--data.corpus={shown(name)}: anyone on the way can change what plain http brings; "
            "use https://, or add its checksum, #sha256=HEX"
        )
    try:
        _transfer(url, part, note, most, timeout)
        if digest and (actual := file_sha256(part)) != digest:
            part.unlink()  # it is ours, and going on with it would never end well
            raise OSError(f"its SHA-256 is {actual[:12]}... where {digest[:12]}... is expected")
        os.replace(part, target)
        note.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = shown(why(error)[:200])  # some of it may be the server's words
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
    response, have, total = _in_time(timeout, url, timeout, *_so_far(part, note))
    if (total or 0) > most:
        response.close()
        raise OSError(f"its {total} bytes are {too_many}")
    with response, _open(part, "ab" if have else "wb") as file:
        if not have:
            etag = response.headers.get("ETag", "W/")
            validator = response.headers.get("Last-Modified") if etag[:2] == "W/" else etag
            known = {"validator": validator and " ".join(validator.split()), "total": total}
            with _open(note, "w") as side:
                side.write(json.dumps(known))
        due, enough = time.monotonic() + timeout, have + SLOW * timeout
        with progress(total, "download", have) as bar:
            while have <= most and (block := response.read1(1 << 18)):
                have += file.write(block)
                bar.update(len(block))
                if time.monotonic() > due:
                    if have < enough:
                        raise OSError(f"fewer than {SLOW} bytes a second in {timeout:g} seconds")
                    due, enough = time.monotonic() + timeout, have + SLOW * timeout
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


def _in_time(seconds: float, *request) -> tuple[http.client.HTTPResponse, int, int | None]:
    """`_answer` of `request`, or TimeoutError: a socket's own timeout starts anew at each byte."""
    found = []

    def ask():
        try:
            found.append(_answer(*request))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


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
    span = re.fullmatch(
        r"bytes ([0-9]{1,19})-[0-9]+/([0-9]{1,19})", response.headers.get("Content-Range", "")
    )
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
