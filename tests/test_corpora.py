import errno
import hashlib
import http.server
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt_lightning.data
from gpt_lightning.data import corpora, downloads, files
from gpt_lightning.data.corpora import Corpus, find_corpus
from gpt_lightning.data.files import cache_dir, write_atomically

SHAKESPEARE = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("GPT_LIGHTNING_MAX_DOWNLOAD", raising=False)
    monkeypatch.setenv("GPT_LIGHTNING_TIMEOUT", "10")
    return folder


def fails(name, *parts) -> str:
    """The message of `find_corpus(name).text()`: one line that has all `parts` in it."""
    with pytest.raises(ValueError) as caught:
        find_corpus(str(name)).text()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# --- files ----------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.sampled_from(["\r", "\n", "\r\n", "\ufeff", "a", "é", "漢", "😀", "\x85\u2028"])),
    st.integers(1, 9),
)
def test_the_text_of_a_file(tmp_path, pieces, size):
    raw = "".join(pieces).encode()
    path = write(tmp_path / "text", raw)
    expected = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    corpus = Corpus("text", (path,))
    if expected:
        chunks = list(corpus.chunks(size))
        assert "".join(chunks) == corpus.text() == expected
        assert all(chunks)
    else:
        with pytest.raises(ValueError, match="text is empty"):
            list(corpus.chunks(size))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.text("aé漢😀\ufeff", max_size=12).map(str.encode),
    st.sampled_from([b"\xff", b"\xe6\xbc", b"\xe6", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\x80"]),
    st.text("aé漢", max_size=4).map(str.encode),
    st.integers(1, 9),
)
def test_the_offset_of_what_is_not_utf8(tmp_path, before, bad, after, size):
    path = write(tmp_path / "text", before + bad + after)
    with pytest.raises(UnicodeDecodeError) as expected:
        (before + bad + after).decode()
    with pytest.raises(ValueError) as caught:
        list(Corpus("text", (path,)).chunks(size))
    assert f"byte offset {expected.value.start};" in str(caught.value)
    assert str(path) in str(caught.value) and "convert it to UTF-8" in str(caught.value)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = write(tmp_path / "text", "día\r\n" * 100_000)
    pieces = list(Corpus("text", (path,)).chunks(1000))
    assert max(map(len, pieces)) <= 1000 and len(pieces) >= 600


def test_a_file_is_known_by_its_absolute_path(tmp_path, monkeypatch):
    path = write(tmp_path / "my text.txt", SHAKESPEARE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my text.txt", "./my text.txt", "~/my text.txt", str(path)):
        corpus = find_corpus(name)
        assert corpus.name == str(path) and corpus.text() == SHAKESPEARE
    assert corpus.sha256() == hashlib.sha256(SHAKESPEARE.encode()).hexdigest()
    assert corpus.floor(0, 10) is None


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "file"
    fails(write(path, b""), "--data.corpus=", path, "is empty")
    fails(write(path, b"\xef\xbb\xbf"), path, "is empty")
    fails(write(path, b"\x89PNG\r\n\0\0"), path, "looks binary (NUL byte at byte offset 6)")
    fails(write(path, b"a" * 9000 + b"\0\xff"), path, "looks binary (NUL byte at byte offset 9000)")
    with pytest.raises(ValueError, match="NUL byte at byte offset 9000"):
        list(Corpus("text", (path,)).chunks(7))
    fails(write(path, b"a" * 9000 + b"\xff\0"), path, "not UTF-8", "byte offset 9000")
    for encoding in ("utf-16", "utf-16-be"):
        data = ("\ufeff" if encoding == "utf-16-be" else "") + SHAKESPEARE
        fails(write(path, data.encode(encoding)), path, "looks like UTF-16", "UTF-8")
    fails(write(path, "naïve".encode("latin-1")), path, "not UTF-8", "byte offset 2;")


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "neither a regular file nor a folder")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path):
    path = write(tmp_path / "file", "text")
    path.chmod(0)
    fails(path, path, "cannot be read (Permission denied)")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("tinyshakespear", "did you mean tinyshakespeare?"),
        ("Playwright", "did you mean playwright?"),
        ("playwrite:7", "did you mean playwright?"),
        ("", "is not found"),
        ("no/such/file.txt", "is not found"),
        ("file:///etc/hosts", "is not found"),
        ("ftp://host/text", "is not found"),
        ("x" * 5000, "cannot be read"),
        ("nul\0", r"'nul\x00' is not found"),
        ("two\nlines", r"'two\nlines' is not found"),
    ],
)
def test_a_name_that_is_none(name, part):
    message = fails(name, "--data.corpus=", part)
    if "not found" in part:
        assert "tinyshakespeare" in message and "playwright" in message and "did you" not in message


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_is_its_text_files_in_order(tmp_path):
    folder = tmp_path / "books"
    write(folder / "b.txt", "\ufeffb, no line end")
    write(folder / "a" / "z.txt", "a/z\r\n")
    write(folder / "a.txt", "a\r")
    write(folder / "a-b", "a-b")
    write(folder / "c.txt", "")
    write(folder / "d.txt", "\ufeff")
    write(folder / "e.txt", "é")
    write(folder / "photo", b"\xff\xd8" + b"x" * 8000 + b"\0")
    write(folder / ".hidden", "hidden")
    write(folder / ".git" / "config", "hidden")
    write(folder / "a" / ".git" / "config", "hidden")
    write(tmp_path / "elsewhere" / "f.txt", "linked folder")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe")
    corpus = find_corpus(f"{folder}/")
    # in order of the paths: "a-b" < "a.txt" < "a/z.txt"
    assert corpus.text() == "a-b\na\na/z\nb, no line end\né"
    assert corpus.name == str(folder)
    assert "".join(corpus.chunks(1)) == corpus.text()


def test_a_folders_digest_tells_where_files_end(tmp_path):
    def digest(*texts):
        folder = tmp_path / "-".join(texts)
        for i, text in enumerate(texts):
            write(folder / str(i), text)
        return find_corpus(str(folder)).sha256()

    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("c", "ab")}) == 4
    assert digest("abc") == hashlib.sha256(b"abc").hexdigest()


def test_folders_without_text(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    fails(folder, "--data.corpus=", folder, "has no text file")
    write(folder / "empty", "")
    write(folder / "bom", "\ufeff")
    write(folder / "photo", b"\0")
    write(folder / ".hidden", "text")
    fails(folder, "has no text file", "3 binary or empty files")
    wide = write(folder / "wide", "漢字".encode("utf-16"))
    fails(folder, wide, "looks like UTF-16")
    bad = write(folder / "bad", b"abc\xff")
    fails(folder, bad, "not UTF-8", "byte offset 3")


# --- playwright -----------------------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    """A playwright of known lines, which counts how often it writes."""
    module = types.ModuleType("gpt_lightning.data.playwright")
    module.GRAMMAR_VERSION, module.DEFAULT_SEED, module.DEFAULT_CHARS = 3, 1337, 1_000
    module.written = []

    def write_pieces(seed, chars):
        module.written.append((seed, chars))
        lines = [f"line {i} of {seed}\n" for i in range(chars // 10 + 1)]
        ends, nats = np.cumsum([len(s) for s in lines]), np.arange(len(lines)) / 7
        yield "".join(lines[:5]), ends[:5], nats[:5]
        yield "".join(lines[5:]), ends[5:], nats[5:]

    module.write_pieces = write_pieces
    module.floor = lambda line_ends, nats, start, stop: (len(line_ends), nats[1], start, stop)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(gpt_lightning.data, "playwright", module, raising=False)
    return module


def test_a_play_is_written_once(stub, cache):
    for name in ("playwright", "playwright:1337", "playwright:01337:1000"):
        corpus = find_corpus(name)
        assert corpus.name == "playwright:1337:1000"
        assert corpus.text() == "".join(text for text, *_ in stub.write_pieces(1337, 1000))
    assert stub.written[:1] == [(1337, 1000)] and stub.written.count((1337, 1000)) == 4
    assert corpus.floor(2, 9) == (101, 1 / 7, 2, 9)
    assert find_corpus("playwright:5:20").text().startswith("line 0 of 5\n")
    stub.GRAMMAR_VERSION = 4
    find_corpus("playwright")
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        f"playwright-v{stem}.{end}"
        for stem in ("3-1337-1000", "3-5-20", "4-1337-1000")
        for end in ("json", "nats", "txt")
    )


@pytest.mark.parametrize(
    ("end", "damage"),
    [
        ("txt", lambda data: data[:-1]),
        ("txt", lambda data: b""),
        ("txt", lambda data: data[:50] + b"X" + data[51:]),
        ("txt", None),
        ("nats", lambda data: data[:-16]),
        ("nats", lambda data: b""),
        ("nats", lambda data: data[:100] + bytes(20) + data[120:]),
        ("nats", lambda data: data.replace(np.float64(1 / 7).tobytes(), bytes(8))),
        ("nats", None),
        ("json", lambda data: data[:-1]),
        ("json", lambda data: data.replace(b"a", b"b")),
        ("json", None),
    ],
)
def test_a_damaged_play_is_written_again(stub, cache, end, damage):
    text = find_corpus("playwright:5:200").text()
    path = cache / f"playwright-v3-5-200.{end}"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    corpus = find_corpus("playwright:5:200")
    assert corpus.text() == text and corpus.floor(0, 1)[0] == 21
    assert len(stub.written) == 2
    find_corpus("playwright:5:200")
    assert len(stub.written) == 2


def test_what_a_killed_writer_left_goes_at_the_next_play(stub, cache):
    cache.mkdir()
    left = cache / ".playwright-v3-1-1.txt.0123456789abcdef.tmp"
    others = [cache / name for name in ("playwright-notes.tmp", ".playwright-x.tmp", "x.tmp")]
    for path in (left, *others):
        write(path, "x")
        os.utime(path, (time.time() - 5,) * 2)
    find_corpus("playwright")
    assert not left.exists() and all(path.exists() for path in others)


@pytest.mark.parametrize(
    "name",
    [
        "playwright:",
        "playwright:x",
        "playwright:-1",
        "playwright:1.5",
        "playwright:1:0",
        "playwright:1:",
        "playwright:1:1e6",
        "playwright:1:10000000001",
        "playwright:1:2:3",
        "playwright:" + "9" * 5000,
        "playwright:٣",
        "playwright:1\n:5",
    ],
)
def test_a_play_that_cannot_be(stub, name):
    fails(name, "--data.corpus=", "playwright")
    assert not stub.written


def test_builtin_names_win_over_files(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "playwright", "my own")
    assert find_corpus("playwright").name == "playwright:1337:1000"
    assert find_corpus("./playwright").text() == "my own"


def test_the_real_play():
    from gpt_lightning.data.playwright import write_play

    corpus = find_corpus("playwright:7:3000")
    text, line_ends, nats = write_play(7, 3000)
    assert corpus.text() == text
    start, stop = line_ends[2], line_ends[9]
    assert corpus.floor(start, stop) == pytest.approx(nats[3:10].sum() / (stop - start))


def test_a_long_play_is_written_in_constant_memory(cache, monkeypatch):
    from gpt_lightning.data import playwright

    lines = itertools.repeat(("x" * 29 + "\n", 1.0))
    monkeypatch.setattr(playwright, "write_lines", lambda seed: lines)
    tracemalloc.start()
    corpus = find_corpus("playwright:1:10000000")
    assert corpus.floor(0, 10_000_000) == pytest.approx(1 / 30)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert corpus.paths[0].stat().st_size == 10_000_020


PLAY = """
import sys, time
from gpt_lightning.data import corpora, playwright
whole = playwright.write_pieces
def slowly(seed, chars):
    print("writing", flush=True)
    time.sleep(0.5)
    return whole(seed, chars)
playwright.write_pieces = slowly
print("ready", flush=True)
sys.stdin.readline()
print(corpora.find_corpus("playwright:3:2000").sha256())
"""


def test_two_processes_write_one_play(cache):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PLAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    answers = [run.communicate(timeout=60)[0].split() for run in runs]
    assert answers[0] == answers[1] and answers[0][0] == "writing"
    assert answers[0][1] == find_corpus("playwright:3:2000").sha256()
    assert len(list(cache.iterdir())) == 3


# --- the cache ------------------------------------------------------------------------------------


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache_dir() == tmp_path / "cache" and cache_dir().is_dir()
    monkeypatch.delenv("GPT_LIGHTNING_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "gpt_lightning" and cache_dir().is_dir()
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_dir() == tmp_path / "home" / ".cache" / "gpt_lightning"
    assert cache_dir().is_dir()


def test_the_cache_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("GPT_LIGHTNING_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(write(tmp_path / "no folder", "")))
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_dir()
    assert folder == cache_dir() == tmp_path / f"gpt_lightning-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)  # by someone else, who would like to read or to plant a text
    assert not cache_dir().is_symlink() and cache_dir() != folder

    with monkeypatch.context() as other:
        other.setattr(files.os, "getuid", lambda: folder.lstat().st_uid + 1)
        theirs = tmp_path / f"gpt_lightning-{os.getuid()}"
        theirs.mkdir()
        assert cache_dir() != theirs

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files.Path, "home", homeless)
    assert cache_dir().is_dir()


def test_a_cache_asked_for_has_to_work(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(write(tmp_path / "file", "") / "cache"))
    with pytest.raises(ValueError, match="GPT_LIGHTNING_CACHE=.*(Not a directory)"):
        cache_dir()


def test_a_cache_that_cannot_be_used(stub, shakespeare, cache):
    (cache / "tinyshakespeare.txt").mkdir(parents=True)
    fails("tinyshakespeare", cache / "tinyshakespeare.txt", "Is a directory")
    (cache / "playwright-v3-1337-1000.txt").mkdir()
    fails("playwright", cache, "Is a directory")


def test_a_disk_that_is_full_of_a_play(stub, cache, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    fails("playwright", f"{cache} (No space left on device); GPT_LIGHTNING_CACHE can name another")
    assert not list(cache.iterdir())


def test_an_error_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "file", "old")
    with pytest.raises(KeyError), write_atomically(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with path.open() as reader:
        with write_atomically(path) as file:
            file.write(b"new")
            assert path.read_text() == "old"
        assert reader.read() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# --- downloads ------------------------------------------------------------------------------------


class Site(http.server.ThreadingHTTPServer):
    """A web site of one text, which can be told to misbehave."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Page)
        self.text = b"To be, or not to be.\n" * 50_000  # 1 MB
        self.etag = '"v1"'
        self.modified = None
        self.stop_after = None  # bytes of an answer after which the connection ends
        self.ranges = True
        self.shift = 0  # how far from what was asked for a range begins
        self.sized = True
        self.asked = []  # the headers of all requests
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Connections that break are what the tests are about."""


class Page(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        site = self.server
        site.asked.append(dict(self.headers))
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/asleep":
            return time.sleep(1.5)
        if self.path.startswith("/to:"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            return self.end_headers()
        start = 0
        if site.ranges and (asked := self.headers.get("Range")):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            validator = self.headers.get("If-Range")
            if validator and validator not in (site.etag, site.modified):
                start = 0
            elif start >= len(site.text):
                return self.send_error(416)
            else:
                start += site.shift
        body = site.text[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(site.text) - 1}/{len(site.text)}"
            )
        if site.etag:
            self.send_header("ETag", site.etag)
        if site.modified:
            self.send_header("Last-Modified", site.modified)
        if site.sized:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: site.stop_after])


@pytest.fixture
def site():
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def cached(cache: Path, end: str = "") -> list[Path]:
    return [path for path in cache.glob("url-*") if path.name.endswith(".txt" + end)]


def test_a_url_is_downloaded_once(site, cache):
    name = f"{site.url}/../../a text.txt?lang=en"
    corpus = find_corpus(name)
    assert corpus.name == name and corpus.text().encode() == site.text
    assert find_corpus(name).paths == corpus.paths
    assert len(site.asked) == 1
    assert re.fullmatch(r"url-[0-9a-f]{64}\.txt", corpus.paths[0].name)
    assert cached(cache) == list(corpus.paths) and not cached(cache, ".part")
    assert find_corpus(f"{site.url}/other").paths != corpus.paths


def test_a_checksum_in_the_url(site, cache):
    digest = hashlib.sha256(site.text).hexdigest()
    corpus = find_corpus(f"{site.url}/text#sha256={digest.upper()}")
    assert corpus.text().encode() == site.text
    # also of what is there already, which is never removed
    fails(f"{site.url}/text#sha256={'0' * 64}", corpus.paths[0], digest[:12], "0" * 12, "delete")
    assert corpus.paths[0].exists()
    fails(f"{site.url}/other#sha256={'0' * 64}", f"SHA-256 is {digest[:12]}...", "0" * 12)
    assert cached(cache) == list(corpus.paths) and not cached(cache, ".part")
    fails(f"{site.url}/text#sha256=12", "64 hex digits")
    assert len(site.asked) == 2


def test_a_broken_download_goes_on(site, cache):
    site.stop_after = 300_000
    name = f"{site.url}/text"
    for have in (300_000, 600_000, 900_000):
        fails(name, f"connection ended after {have} of {len(site.text)} bytes", "run again")
        assert cached(cache, ".part")[0].read_bytes() == site.text[:have]
        assert not cached(cache)
    assert find_corpus(name).text().encode() == site.text
    assert [headers.get("Range") for headers in site.asked] == [
        None,
        "bytes=300000-",
        "bytes=600000-",
        "bytes=900000-",
    ]
    assert all(headers["If-Range"] == '"v1"' for headers in site.asked[1:])
    assert not cached(cache, ".part") and not cached(cache, ".part.json")


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_going_on_by_date(site, etag):
    site.etag, site.modified = etag, "Wed, 21 Oct 2015 07:28:00 GMT"
    site.stop_after = 600_000
    fails(f"{site.url}/text", "connection ended")
    assert find_corpus(f"{site.url}/text").text().encode() == site.text
    assert site.asked[1]["If-Range"] == site.modified


def change_version(site):
    site.etag = '"v2"'


def change_size(site):  # without a validator only the size tells
    site.etag = None


def forget_ranges(site):
    site.ranges = False


def become_shorter(site):
    site.text = site.text[:300_000]


def shift_ranges(site):
    site.shift = 1
    site.text = site.text.replace(b"To bee", b"To be")  # it has not changed, the server is odd


@pytest.mark.parametrize(
    "change", [change_version, change_size, forget_ranges, become_shorter, shift_ranges]
)
def test_a_text_that_changed_is_begun_anew(site, change):
    if change is change_size:
        site.etag = None
    site.stop_after = 600_000
    fails(f"{site.url}/text", "connection ended after 600000")
    site.text = site.text.replace(b"To be", b"To bee")
    site.stop_after = None
    change(site)
    assert find_corpus(f"{site.url}/text").text().encode() == site.text
    assert site.asked[1]["Range"] == "bytes=600000-"


def test_a_part_of_nothing_known_is_not_gone_on_with(site, cache):
    cache.mkdir()
    path = cache / f"url-{hashlib.sha256(f'{site.url}/text'.encode()).hexdigest()}.txt.part"
    write(path, "something else")
    for note in (None, "{", "[]", '{"validator": null, "total": null}'):
        write(path, "something else")
        if note:
            write(path.with_name(path.name + ".json"), note)
        corpus = find_corpus(f"{site.url}/text")
        assert corpus.text().encode() == site.text and "Range" not in site.asked[-1]
        corpus.paths[0].unlink()


def test_what_a_server_can_answer(site, cache):
    fails(f"{site.url}/missing", "--data.corpus=", "the server answered 404 Not Found", "FILE")
    site.text = b""
    fails(f"{site.url}/text", "empty")
    assert not cached(cache)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        fails(f"http://127.0.0.1:{free.getsockname()[1]}/text", "Connection refused")


def test_a_server_that_is_silent(site, monkeypatch):
    monkeypatch.setenv("GPT_LIGHTNING_TIMEOUT", "0.2")
    start = time.monotonic()
    fails(f"{site.url}/asleep", "no answer within 0.2 seconds")
    assert time.monotonic() - start < 1.2


@pytest.mark.parametrize("sized", [True, False])
def test_too_large_a_text(site, cache, monkeypatch, sized):
    site.sized = sized
    monkeypatch.setenv("GPT_LIGHTNING_MAX_DOWNLOAD", str(len(site.text) - 1))
    told = f"its {len(site.text)} bytes are more" if sized else "it goes on after"
    fails(f"{site.url}/text", told, f"GPT_LIGHTNING_MAX_DOWNLOAD={len(site.text) - 1}")
    assert not cached(cache) and not cached(cache, ".part")
    monkeypatch.setenv("GPT_LIGHTNING_MAX_DOWNLOAD", str(len(site.text)))
    assert find_corpus(f"{site.url}/text").text().encode() == site.text


@pytest.mark.parametrize("variable", ["GPT_LIGHTNING_MAX_DOWNLOAD", "GPT_LIGHTNING_TIMEOUT"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf"])
def test_bounds_that_are_none(site, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    fails(f"{site.url}/text", f"{variable}={value} must be a number above 0")


def test_redirects(site, cache, tmp_path):
    corpus = find_corpus(f"{site.url}/to:{site.url}/text")
    assert corpus.text().encode() == site.text
    secret = write(tmp_path / "secret", "secret")
    fails(f"{site.url}/to:file://{secret}", "could not download")
    fails(f"{site.url}/to:ftp://127.0.0.1/text", "redirects from http to ftp", "refused")
    assert len(cached(cache)) == 1


@pytest.mark.parametrize("old", ["http", "https"])
@pytest.mark.parametrize("new", ["http", "https"])
def test_no_redirect_leaves_https(old, new):
    def follow():
        request = urllib.request.Request(f"{old}://host/text", headers={"Range": "bytes=5-"})
        handler = downloads._Redirects()
        return handler.redirect_request(request, None, 302, "Found", {}, f"{new}://host/new")

    if (old, new) == ("https", "http"):
        with pytest.raises(urllib.error.URLError, match="from https to http"):
            follow()
    else:
        assert follow().full_url == f"{new}://host/new" and follow().headers["Range"] == "bytes=5-"


@pytest.mark.parametrize("name", ["http://", "https:///text", "http://[::1/text", "http://host:x/"])
def test_urls_that_are_none(name):
    fails(name, f"--data.corpus={name}")


def test_a_password_in_a_url_is_not_repeated():
    assert "geheim" not in fails("https://user:geheim@host/text", "password")


def test_two_downloads_of_one_url(site, cache):
    results = []

    def download():
        results.append(find_corpus(f"{site.url}/text").text().encode() == site.text)

    threads = [threading.Thread(target=download) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4 and len(site.asked) == 1


# --- tinyshakespeare ------------------------------------------------------------------------------


@pytest.fixture
def shakespeare(site, monkeypatch):
    digest = hashlib.sha256(site.text).hexdigest()
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE_URL", f"{site.url}/input.txt")
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE_SHA256", digest)
    return site


def test_tinyshakespeare(shakespeare, cache):
    for _ in range(2):
        corpus = find_corpus("tinyshakespeare")
        assert corpus.name == "tinyshakespeare" and corpus.text().encode() == shakespeare.text
    assert corpus.paths == (cache / "tinyshakespeare.txt",) and len(shakespeare.asked) == 1


def test_tinyshakespeare_offline(shakespeare, cache, monkeypatch):
    path, url = cache / "tinyshakespeare.txt", f"{shakespeare.url}/missing"
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE_URL", url)
    fails("tinyshakespeare", f"could not download {url} (", f"put the file at {path} ", "FILE")
    write(path, shakespeare.text)
    assert find_corpus("tinyshakespeare").text().encode() == shakespeare.text


def test_another_tinyshakespeare(shakespeare, cache):
    path = write(cache / "tinyshakespeare.txt", SHAKESPEARE)
    actual = hashlib.sha256(SHAKESPEARE.encode()).hexdigest()[:12]
    expected = hashlib.sha256(shakespeare.text).hexdigest()[:12]
    fails("tinyshakespeare", path, actual, expected, "delete that file")
    assert path.read_text() == SHAKESPEARE and not shakespeare.asked
