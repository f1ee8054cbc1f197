"""Corpora: names, files, folders, the embedded corpus, downloads from a local server."""

import errno
import gzip
import hashlib
import http.server
import os
import socket
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from conftest import error_of, text_of, write

from gpt_lightning.data import corpus as corpus_module
from gpt_lightning.data import playwright
from gpt_lightning.data.corpus import find_corpus
from gpt_lightning.data.documents import listed

SHAKESPEARE = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    return folder


# --- files and folders ----------------------------------------------------------------------------


def test_a_file_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    path = write(tmp_path / "my text.txt", SHAKESPEARE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("my text.txt", "./my text.txt", "~/my text.txt", str(path)):
        corpus = find_corpus(name)
        assert corpus.name == str(path) and text_of(name) == SHAKESPEARE
    assert corpus.sha256() == hashlib.sha256(SHAKESPEARE.encode()).hexdigest()
    assert corpus.floor(0, 10) is None


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "file (empty)"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\x89PNG\r\n\0\0", "file (binary)"),
        ("naïve".encode("latin-1"), "not UTF-8 text (invalid continuation byte)"),
    ],
)
def test_a_file_that_is_not_text_is_refused(tmp_path, data, part):
    path = write(tmp_path / "file", data)
    error_of(path, path, part)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("Playwright", "did you mean playwright?"), ("", ""), ("no/such/file.txt", ""), ("nul\0", "")],
)
def test_an_unknown_name_is_refused_with_what_is_possible(name, suggestion):
    message = error_of(name, "is not found", "tinyshakespeare", "playwright", suggestion)
    assert ("did you mean" in message) == bool(suggestion)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and named pipes")
def test_a_folder_is_its_text_files_in_order(tmp_path):
    folder = tmp_path / "books"
    write(folder / "b.txt", "\ufeffb, no line end")
    write(folder / "a" / "z.txt", "a/z\r\n")
    write(folder / "a.txt", "a\r")
    write(folder / "a-b", "a-b")
    write(folder / "e.txt", "é")
    write(folder / "c.txt", "")
    write(folder / "photo", b"\xff\xd8" + b"x" * 8000 + b"\0")
    write(folder / ".hidden", "hidden")
    write(folder / "a" / ".git" / "config", "hidden")
    write(folder / "lightning_logs" / "version_0" / "metrics.csv", "step,loss\n")
    write(folder / "a" / "checkpoints" / "notes", "not text of the corpus")
    write(tmp_path / "elsewhere" / "f.txt", "linked folder")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe")
    write(folder / "a" / "wide", "wide".encode("utf-16"))
    corpus = find_corpus(f"{folder}/")
    assert corpus.name == str(folder)
    # in order of the paths: "a-b" < "a.txt" < "a/z.txt"
    for size in (1, 100):
        assert "".join(corpus.chunks(size)) == "a-b\na\na/z\nb, no line end\né"
    assert corpus.left_out == (
        "a/wide (utf-16; read it with encoding=utf-16 or auto)",
        "c.txt (empty)",
        "link (a link to a folder)",
        "loop (a link to a folder)",
        "nowhere (not a regular file)",
        "photo (binary)",
        "pipe (not a regular file)",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_pattern_is_the_files_that_match_in_order(tmp_path, monkeypatch):
    folder = tmp_path / "books"
    for name in ("b.md", "a/z.md", "a/b/c.md", "a.txt", ".x.md", "a/.git/y.md", "checkpoints/n.md"):
        write(folder / name, f"{name}\n")
    (folder / "loop").symlink_to(folder)
    (folder / "photo.md").write_bytes(b"\0")
    monkeypatch.chdir(tmp_path)
    corpus = find_corpus("books/**/*.md")
    assert "".join(corpus.chunks()) == "a/b/c.md\na/z.md\nb.md\n"
    assert corpus.name == str(folder / "**" / "*.md") and corpus.left_out == ("photo.md (binary)",)
    assert text_of("books/?/*") == "a/z.md\n"
    assert text_of("books/checkpoints/*.md") == "checkpoints/n.md\n"
    error_of("books/**/*.tex", "books/**/*.tex is not found")
    write(tmp_path / "a[1].txt", "a name with brackets")
    assert text_of("a[1].txt") == "a name with brackets"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_file_names_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path / name / f"{name}.txt", SHAKESPEARE)
    write(tmp_path / name / name, b"\0")
    assert text_of(tmp_path / name) == text_of(tmp_path / name / f"{name}.txt") == SHAKESPEARE


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "books" / "a.txt", "a")
    write(tmp_path / "books" / "locked" / "b.txt", "b")
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    error_of(tmp_path / "books", tmp_path / "books" / "locked", "Permission denied")


def test_a_long_list_is_cut():
    assert listed(": ", []) == ""
    assert listed(": ", list("abcde")) == ": a, b, c, d, e"
    assert listed(": ", list("abcdefgh")) == ": a, b, c, d, e and 3 more"


def test_the_digest_of_a_folder_depends_on_where_its_files_end(tmp_path):
    def digest(*texts):
        folder = tmp_path / "-".join(texts)
        for i, text in enumerate(texts):
            write(folder / str(i), text)
        return find_corpus(str(folder)).sha256()

    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("c", "ab")}) == 4
    assert digest("abc") == hashlib.sha256(b"abc").hexdigest()


def test_a_folder_without_text_is_refused(tmp_path):
    write(tmp_path / "folder" / "photo", b"\0")
    error_of(tmp_path / "folder", tmp_path / "folder", "has no text in it: photo (binary)")
    bad = write(tmp_path / "folder" / "bad", b"abc\xff")
    error_of(tmp_path / "folder", bad, "not UTF-8")


# --- the embedded corpus --------------------------------------------------------------------------


@pytest.fixture
def generated(monkeypatch):
    """The seeds of the plays that were generated, not found in the cache."""
    seeds, real = [], playwright.write_lines
    monkeypatch.setattr(playwright, "write_lines", lambda seed: seeds.append(seed) or real(seed))
    monkeypatch.setattr(playwright, "DEFAULT_CHARS", 2000)
    return seeds


def test_a_play_is_generated_once(generated):
    for name in ("playwright", "playwright:1337", "playwright:01337:2000"):
        corpus = find_corpus(name)
        assert corpus.name == "playwright:1337:2000"
    assert generated == [1337]
    lines, source = [], playwright.write_lines(1337)
    while sum(len(line) for line, _ in lines) < 2000:
        lines.append(next(source))
    assert text_of(name) == "".join(line for line, _ in lines)
    assert text_of("playwright:0:500") != text_of(name)[:500]


def test_the_floor_is_the_mean_cost_of_the_characters(generated):
    corpus, source = find_corpus("playwright"), playwright.write_lines(1337)
    costs = []  # of each character: an equal share of the cost of its line
    while len(costs) < 2000:
        line, nats = next(source)
        costs += [nats / len(line)] * len(line)
    for start, stop in ((0, len(costs)), (0, 1), (17, 18), (5, 1234), (1999, 2000)):
        assert corpus.floor(start, stop) == pytest.approx(sum(costs[start:stop]) / (stop - start))


@pytest.mark.parametrize("numbers", [":", ":-1", ":1:0", ":1:12345678901", ":٣"])
def test_a_play_without_proper_numbers_is_refused(generated, numbers):
    error_of(f"playwright{numbers}", "must be playwright[:SEED[:CHARS]]")
    assert not generated


def test_a_built_in_name_wins_over_a_file(generated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "playwright", "my own")
    assert find_corpus("playwright").name == "playwright:1337:2000"
    assert text_of("./playwright") == "my own"


def test_a_cache_that_cannot_be_used_is_named(generated, cache, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error_of("playwright", f"{cache}: No space left on device")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


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
        if self.path == "/asleep":
            return time.sleep(1)
        if self.path == "/elsewhere":
            self.send_response(301)
            self.send_header("Location", f"http://insecure.localhost:{site.server_port}/text")
            return self.end_headers()
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


def test_a_url_is_downloaded_once(site, cache, capsys):
    name = f"{site.url}/a täxt.txt?lang=en"
    threads = [threading.Thread(target=text_of, args=(name,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert find_corpus(name).name == name and text_of(name).encode() == site.text
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and site.url in err and str(cache) in err
    assert site.asked == ["/a%20t%C3%A4xt.txt?lang=en"]
    assert find_corpus(f"{site.url}/other").paths != find_corpus(name).paths


def test_a_checksum_in_the_url_is_verified(site, cache):
    digest = hashlib.sha256(site.text).hexdigest()
    corpus = find_corpus(f"{site.url}/text#sha256={digest.upper()}")
    assert text_of(corpus.name).encode() == site.text and site.asked == ["/text"]
    wrong = f"{site.url}/text#sha256={'0' * 64}"
    for _ in range(2):  # a cached file is verified too, and not removed
        error_of(wrong, cache / "url-", digest[:12], "0" * 12, "delete the file")
    assert site.asked == ["/text", "/text"]
    assert find_corpus(f"{site.url}/text").paths not in (corpus.paths, ())
    error_of(f"{site.url}/text#sha256=12", "64 hex digits")


def test_a_download_that_fails_leaves_nothing_and_starts_again(site, cache, monkeypatch):
    error_of(f"{site.url}/missing", "download failed", "404", "or save the file as")
    monkeypatch.setattr(corpus_module, "TIMEOUT", 0.2)
    error_of(f"{site.url}/asleep", "download failed")
    site.stop_after = 300_000
    error_of(f"{site.url}/text", "download failed", "ended early", "run again")
    site.stop_after = None
    with monkeypatch.context() as small:
        small.setenv("GPT_LIGHTNING_MAX_DOWNLOAD", "1000000")
        error_of(f"{site.url}/text", "larger than GPT_LIGHTNING_MAX_DOWNLOAD=1000000 bytes")
    assert {path.suffix for path in cache.iterdir()} == {".lock"}
    assert text_of(f"{site.url}/text").encode() == site.text


@pytest.mark.parametrize("host", ["example.invalid", "localhost.invalid", "127.0.0.1.invalid"])
def test_plain_http_needs_a_checksum_unless_it_is_local(host):
    error_of(f"http://{host}/text", "#sha256=HEX")
    error_of(f"http://{host}/text#sha256={'0' * 64}", "download failed")


def test_a_redirect_to_plain_http_needs_a_checksum(site, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        "socket.getaddrinfo", lambda _, *rest, **kw: resolve("127.0.0.1", *rest, **kw)
    )
    error_of(f"{site.url}/elsewhere", "redirected to http://insecure.localhost")
    digest = hashlib.sha256(site.text).hexdigest()
    assert text_of(f"{site.url}/elsewhere#sha256={digest}").encode() == site.text


def test_a_password_in_a_url_is_refused_and_not_repeated():
    assert "geheim" not in error_of("https://user:geheim@host/text", "password")


def test_a_download_keeps_the_suffix_that_tells_its_format(site):
    site.text = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    name = f"{site.url}/rows.jsonl.gz?download=true"
    corpus = find_corpus(name, field="text")
    assert "".join(corpus.chunks()) == "one\ntwo" and corpus.paths[0].name.endswith(".jsonl.gz")


def test_other_protocols_are_read_through_fsspec(cache, monkeypatch):
    monkeypatch.setattr(corpus_module, "REMOTE", ("s3", "memory"))
    with fsspec.open("memory://texts/a.txt.gz", "wb") as file:
        file.write(gzip.compress(SHAKESPEARE.encode()))
    digest = hashlib.sha256(gzip.compress(SHAKESPEARE.encode())).hexdigest()
    for _ in range(2):
        assert text_of("memory://texts/a.txt.gz") == SHAKESPEARE
        fsspec.filesystem("memory").store.clear()  # it is downloaded once
    error_of(f"memory://texts/a.txt.gz#sha256={digest}", "download failed (FileNotFoundError")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    error_of("s3://bucket/a.txt", "download failed (ImportError: Install s3fs")
    assert {path.suffix for path in cache.iterdir()} == {".lock", ".gz"}


@pytest.mark.parametrize("name", ["ftp://host/a.txt", "file:///etc/hosts"])
def test_other_urls_are_refused(name):
    error_of(name, "URLs begin with one of https://, s3://")


def test_tinyshakespeare_is_downloaded_or_put_in_place_and_verified(site, cache, monkeypatch):
    monkeypatch.setattr(corpus_module, "TINYSHAKESPEARE_URL", f"{site.url}/missing")
    digest = hashlib.sha256(site.text).hexdigest()
    monkeypatch.setattr(corpus_module, "TINYSHAKESPEARE_SHA256", digest)
    path = cache / "tinyshakespeare.txt"
    error_of("tinyshakespeare", f"save the file as {path}")
    write(path, SHAKESPEARE)
    error_of("tinyshakespeare", path, digest[:12], "delete the file")
    path.unlink()
    monkeypatch.setattr(corpus_module, "TINYSHAKESPEARE_URL", f"{site.url}/input.txt")
    assert find_corpus("tinyshakespeare").paths == (path,)
    assert text_of("tinyshakespeare").encode() == site.text
