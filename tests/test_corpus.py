"""Corpora: names, files, folders, the embedded corpus, downloads from a local server."""

import errno
import hashlib
import http.server
import itertools
import os
import re
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_lightning.data import corpus as corpus_module
from gpt_lightning.data import playwright
from gpt_lightning.data.corpus import Corpus, find_corpus
from gpt_lightning.errors import UserError

SHAKESPEARE = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    return folder


def error_of(name, *parts) -> str:
    """The message of `find_corpus(name).text()`: one line that has all `parts` in it."""
    with pytest.raises(UserError) as caught:
        find_corpus(str(name)).text()
    message = str(caught.value)
    assert "\n" not in message and message.startswith("corpus=")
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
def test_line_ends_and_bom_are_normalized_whatever_the_piece_size(tmp_path, pieces, size):
    raw = "".join(pieces).encode()
    path = write(tmp_path / "text", raw)
    expected = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    corpus = Corpus("text", (path,))
    if expected:
        chunks = list(corpus.chunks(size))
        assert "".join(chunks) == corpus.text() == expected
        assert all(chunks)
    else:
        with pytest.raises(UserError, match="text is empty"):
            list(corpus.chunks(size))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.text("aé漢😀\ufeff", max_size=12).map(str.encode),
    st.sampled_from([b"\xff", b"\xe6\xbc", b"\xe6", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\x80"]),
    st.text("aé漢", max_size=4).map(str.encode),
    st.integers(1, 9),
)
def test_bytes_that_are_not_utf8_are_reported_with_their_offset(tmp_path, before, bad, after, size):
    path = write(tmp_path / "text", before + bad + after)
    with pytest.raises(UnicodeDecodeError) as expected:
        (before + bad + after).decode()
    with pytest.raises(UserError) as caught:
        list(Corpus("text", (path,)).chunks(size))
    assert f"byte offset {expected.value.start};" in str(caught.value)
    assert str(path) in str(caught.value) and "convert it to UTF-8" in str(caught.value)


def test_pieces_do_not_grow_with_the_file(tmp_path):
    path = write(tmp_path / "text", "día\r\n" * 100_000)
    pieces = list(Corpus("text", (path,)).chunks(1000))
    assert max(map(len, pieces)) <= 1000 and len(pieces) >= 400


def test_a_file_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    path = write(tmp_path / "my text.txt", SHAKESPEARE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("my text.txt", "./my text.txt", "~/my text.txt", str(path)):
        corpus = find_corpus(name)
        assert corpus.name == str(path) and corpus.text() == SHAKESPEARE
    assert corpus.sha256() == hashlib.sha256(SHAKESPEARE.encode()).hexdigest()
    assert corpus.floor(0, 10) is None and corpus.summary() == ""


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\x89PNG\r\n\0\0", "binary or UTF-16"),
        (SHAKESPEARE.encode("utf-16"), "binary or UTF-16"),
        ("naïve".encode("latin-1"), "not UTF-8 text: invalid continuation byte at byte offset 2;"),
    ],
)
def test_a_file_that_is_not_text_is_refused(tmp_path, data, part):
    path = write(tmp_path / "file", data)
    error_of(path, path, part)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("tinyshakespear", "did you mean tinyshakespeare?"),
        ("Playwright", "did you mean playwright?"),
        ("", "is not found"),
        ("no/such/file.txt", "is not found"),
        ("nul\0", r"'nul\x00' is not found"),
        ("two\nlines", r"'two\nlines' is not found"),
    ],
)
def test_an_unknown_name_is_refused_with_what_is_possible(name, part):
    message = error_of(name, part)
    assert "tinyshakespeare" in message and "playwright" in message
    assert ("did you mean" in message) == ("did you mean" in part)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and named pipes")
def test_a_folder_is_its_text_files_in_order_and_names_what_it_leaves_out(tmp_path, monkeypatch):
    folder = tmp_path / "books"
    write(folder / "b.txt", "\ufeffb, no line end")
    write(folder / "a" / "z.txt", "a/z\r\n")
    write(folder / "a.txt", "a\r")
    write(folder / "a-b", "a-b")
    write(folder / "e.txt", "é")
    write(folder / "c.txt", "")
    write(folder / "photo", b"\xff\xd8" + b"x" * 8000 + b"\0")
    write(folder / "wide.txt", "wide".encode("utf-16"))
    write(folder / ".hidden", "hidden")
    write(folder / "a" / ".git" / "config", "hidden")
    write(folder / "lightning_logs" / "version_0" / "metrics.csv", "step,loss\n")
    write(folder / "a" / "checkpoints" / "notes", "not text of the corpus")
    write(folder / "a" / "cache" / "tokens-char.json", "{}")
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(folder / "a" / "cache"))
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
    assert corpus.left_out == (
        ".git (hidden)",
        ".hidden (hidden)",
        "c.txt (empty)",
        "cache (written by runs)",
        "checkpoints (written by runs)",
        "lightning_logs (written by runs)",
        "link (not a regular file)",
        "loop (not a regular file)",
        "nowhere (not a regular file)",
        "photo (binary or UTF-16)",
        "pipe (not a regular file)",
        "wide.txt (binary or UTF-16)",
    )
    start = "5 text files; left out: .git (hidden), .hidden (hidden), c.txt (empty), cache (written"
    assert corpus.summary().startswith(start) and corpus.summary().endswith(" runs), ...")


def test_the_digest_of_a_folder_depends_on_where_its_files_end(tmp_path):
    def digest(*texts):
        folder = tmp_path / "-".join(texts)
        for i, text in enumerate(texts):
            write(folder / str(i), text)
        return find_corpus(str(folder)).sha256()

    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("c", "ab")}) == 4
    assert digest("abc") == hashlib.sha256(b"abc").hexdigest()


def test_a_folder_without_text_is_refused_with_what_is_in_it(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    error_of(folder, folder, "has no text file")
    write(folder / "empty", "")
    write(folder / "photo", b"\0")
    error_of(folder, "has no text file", "empty (empty), photo (binary")
    bad = write(folder / "bad", b"abc\xff")
    error_of(folder, bad, "not UTF-8", "byte offset 3")


# --- the embedded corpus --------------------------------------------------------------------------


@pytest.fixture
def generated(monkeypatch):
    """The (seed, chars) of the plays that were generated, not found in the cache."""
    calls, real = [], playwright.write_pieces

    def write_pieces(seed, chars):
        calls.append((seed, chars))
        return real(seed, chars)

    monkeypatch.setattr(playwright, "write_pieces", write_pieces)
    monkeypatch.setattr(playwright, "DEFAULT_CHARS", 2000)
    return calls


def test_a_play_is_generated_once(generated, cache):
    for name in ("playwright", "playwright:1337", "playwright:01337:2000"):
        corpus = find_corpus(name)
        assert corpus.name == "playwright:1337:2000"
    assert generated == [(1337, 2000)]
    text, line_ends, nats = playwright.write_play(1337, 2000)
    assert corpus.text() == text
    start, stop = line_ends[2], line_ends[9]
    assert corpus.floor(start, stop) == pytest.approx(nats[3:10].sum() / (stop - start))
    assert find_corpus("playwright:0:500").text() != text[:500]
    assert {path.name for path in cache.glob("play*")} == {
        f"playwright-v1-{stem}.{end}" for stem in ("1337-2000", "0-500") for end in ("txt", "nats")
    }


@pytest.mark.parametrize(
    "name",
    ["playwright:", "playwright:-1", "playwright:1:0", "playwright:1:10000000001", "playwright:٣"],
)
def test_a_play_without_proper_numbers_is_refused(generated, name):
    error_of(name, "must be playwright[:SEED[:CHARS]]")
    assert not generated


def test_a_built_in_name_wins_over_a_file(generated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "playwright", "my own")
    assert find_corpus("playwright").name == "playwright:1337:2000"
    assert find_corpus("./playwright").text() == "my own"


def test_a_long_play_is_generated_in_constant_memory(monkeypatch):
    lines = itertools.repeat(("x" * 29 + "\n", 1.0))
    monkeypatch.setattr(playwright, "write_lines", lambda seed: lines)
    tracemalloc.start()
    corpus = find_corpus("playwright:1:10000000")
    assert corpus.floor(0, 10_000_000) == pytest.approx(1 / 30)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert corpus.paths[0].stat().st_size == 10_000_020


def test_a_cache_that_cannot_be_used_is_named(generated, cache, monkeypatch):
    (cache / "tinyshakespeare.txt").mkdir(parents=True)
    error_of("tinyshakespeare", cache / "tinyshakespeare.txt", "Is a directory")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error_of("playwright", f"{cache}: No space left on device")
    assert [path.suffix for path in cache.glob("*playwright*")] == [".lock"]


# --- downloads ------------------------------------------------------------------------------------


class Site(http.server.ThreadingHTTPServer):
    """A web site with one text, which can be made to misbehave."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Page)
        self.text = b"To be, or not to be.\n" * 50_000  # 1 MB
        self.stop_after = None  # bytes of an answer after which the connection ends
        self.asked = []  # all paths
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Broken connections are expected."""


class Page(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        site = self.server
        site.asked.append(self.path)
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/broken":
            return self.send_error(500, "Out of\x1b[31m order")
        if self.path == "/asleep":
            return time.sleep(1)
        self.send_response(200)
        self.send_header("Content-Length", str(len(site.text)))
        self.end_headers()
        self.wfile.write(site.text[: site.stop_after])


@pytest.fixture
def site():
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def downloaded(cache: Path) -> list[Path]:
    """Complete and partial downloads."""
    return [path for path in cache.glob("*url-*") if path.suffix != ".lock"]


def test_a_url_is_downloaded_once(site, cache):
    name = f"{site.url}/a text.txt?lang=en"
    corpus = find_corpus(name)
    assert corpus.name == name and corpus.text().encode() == site.text
    assert find_corpus(name).paths == corpus.paths
    assert site.asked == ["/a%20text.txt?lang=en"]
    assert re.fullmatch(r"url-[0-9a-f]{64}\.txt", corpus.paths[0].name)
    assert downloaded(cache) == list(corpus.paths)
    assert find_corpus(f"{site.url}/other").paths != corpus.paths


def test_a_checksum_in_the_url_is_verified(site, cache):
    digest = hashlib.sha256(site.text).hexdigest()
    corpus = find_corpus(f"{site.url}/text#sha256={digest.upper()}")
    assert corpus.text().encode() == site.text
    assert site.asked == ["/text"]
    wrong = f"{site.url}/text#sha256={'0' * 64}"
    for _ in range(2):  # a cached file is verified too, and not removed
        error_of(wrong, cache / "url-", digest[:12], "0" * 12, "delete the file")
    assert site.asked == ["/text", "/text"]
    assert find_corpus(f"{site.url}/text").paths not in (corpus.paths, ())
    error_of(f"{site.url}/text#sha256=12", "64 hex digits")


def test_a_download_that_is_cut_short_leaves_nothing_and_starts_again(site, cache):
    site.stop_after = 300_000
    error_of(f"{site.url}/text", "download failed", "run again")
    assert not downloaded(cache)
    site.stop_after = None
    assert find_corpus(f"{site.url}/text").text().encode() == site.text


def test_errors_of_a_server_are_reported_as_text(site, cache, monkeypatch):
    error_of(f"{site.url}/missing", "FileNotFoundError", "or save the file as")
    assert "\x1b" not in error_of(f"{site.url}/broken", "500", "order")
    site.text = b""
    error_of(f"{site.url}/text", "empty file")
    monkeypatch.setattr(corpus_module, "TIMEOUT", 0.2)
    error_of(f"{site.url}/asleep", "download failed")
    url = site.url
    site.server_close()
    error_of(f"{url}/text", "download failed")
    assert not downloaded(cache)


@pytest.mark.parametrize("host", ["example.invalid", "localhost.invalid", "127.0.0.1.invalid"])
def test_plain_http_needs_a_checksum_unless_it_is_local(host):
    error_of(f"http://{host}/text", "#sha256=HEX")
    error_of(f"http://{host}/text#sha256={'0' * 64}", "download failed")


def test_a_password_in_a_url_is_refused_and_not_repeated():
    assert "geheim" not in error_of("https://user:geheim@host/text", "password")


def test_concurrent_downloads_of_one_url_ask_the_server_once(site):
    results = []

    def download():
        results.append(find_corpus(f"{site.url}/text").text().encode() == site.text)

    threads = [threading.Thread(target=download) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4 and len(site.asked) == 1


def test_tinyshakespeare_is_downloaded_or_put_in_place_and_verified(site, cache, monkeypatch):
    monkeypatch.setattr(corpus_module, "TINYSHAKESPEARE_URL", f"{site.url}/missing")
    digest = hashlib.sha256(site.text).hexdigest()
    monkeypatch.setattr(corpus_module, "TINYSHAKESPEARE_SHA256", digest)
    path = cache / "tinyshakespeare.txt"
    error_of("tinyshakespeare", f"save the file as {path}")
    write(path, SHAKESPEARE)
    error_of("tinyshakespeare", path, digest[:12], "delete the file")
    write(path, site.text)
    assert find_corpus("tinyshakespeare").text().encode() == site.text
    path.unlink()
    monkeypatch.setattr(corpus_module, "TINYSHAKESPEARE_URL", f"{site.url}/input.txt")
    corpus = find_corpus("tinyshakespeare")
    assert corpus.name == "tinyshakespeare" and corpus.paths == (path,)
