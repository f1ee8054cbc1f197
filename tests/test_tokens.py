import contextlib
import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_lightning.data import files, tokens
from gpt_lightning.data.corpora import find_corpus
from gpt_lightning.data.files import write_atomically
from gpt_lightning.data.tokens import prepare_tokens

TEXT = "To be, or not to be: that is the question.\r\nOb's edler im Gemüt 😀\n" * 20
PLAIN = TEXT.replace("\r\n", "\n")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path, TEXT)


def make_corpus(tmp_path, text, name="text"):
    (tmp_path / name).write_bytes(text.encode())
    return find_corpus(str(tmp_path / name))


@pytest.fixture
def builds(monkeypatch):
    """The entries that were built, not found."""
    built, build = [], tokens._build

    def counting(entry, *rest):
        built.append(entry)
        build(entry, *rest)

    monkeypatch.setattr(tokens, "_build", counting)
    return built


def test_characters(corpus):
    found = prepare_tokens(corpus)
    ids = found.open()
    chars = sorted(set(PLAIN))
    assert ids.tolist() == [chars.index(c) for c in PLAIN]
    assert ids.dtype == np.uint8 and isinstance(ids, np.memmap) and not ids.flags.writeable
    assert found.tokenizer.vocabulary == "".join(chars)
    assert found.corpus_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_bytes(corpus):
    found = prepare_tokens(corpus, "byte")
    assert found.open().tobytes() == PLAIN.encode() and found.tokenizer.kind == "byte"


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
@given(st.text("ab\r\né漢😀\ufeff").filter(lambda s: s.strip("\ufeff")), st.integers(1, 7))
def test_any_text_in_any_pieces(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(tokens, "PIECE", size)
    corpus = make_corpus(tmp_path, text)
    for kind in ("char", "byte"):
        found = prepare_tokens(corpus, kind)
        assert found.tokenizer.decode(found.open()) == corpus.text()


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "u1"), (257, "u2"), (50_000, "u2"), (70_000, "u4")]
)
def test_the_smallest_type(tmp_path, size, dtype):
    text = "".join(chr(0x20000 + i) for i in range(size)) + "".join(
        map(chr, range(0x20000, 0x20005))
    )
    ids = prepare_tokens(make_corpus(tmp_path, text)).open()
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == [*range(size), 0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 1, 12345, 2**31, 10**15])
def test_the_header_is_numpys(tmp_path, count):
    for dtype in ("u1", "<u2", "<u4"):
        header = tokens._header(np.dtype(dtype), count)
        (tmp_path / "header").write_bytes(header)
        with open(tmp_path / "header", "rb") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == ((count,), False, np.dtype(dtype))
            assert file.tell() == len(header) == 128


# --- the cache ------------------------------------------------------------------------------------


def test_built_once(corpus, tmp_path, builds):
    first = prepare_tokens(corpus)
    again = prepare_tokens(corpus)
    assert again.path == first.path and again.tokenizer.state() == first.tokenizer.state()
    # the same content at another place is the same text, and nothing unknown is in it
    moved = prepare_tokens(make_corpus(tmp_path, TEXT, "moved"), unknown="drop")
    assert moved.path == first.path and moved.tokenizer.unknown == "drop"
    assert len(builds) == 1


def test_what_makes_another_entry(corpus, tmp_path, builds, monkeypatch):
    wide = "".join(sorted(set(PLAIN))) + "#"
    calls = [
        {},
        {"tokenizer": "byte"},
        {"vocabulary": wide},
        {"vocabulary": wide[::-1]},
        {"vocabulary": wide, "unknown": "drop"},
        {"vocabulary": wide, "unknown": "replace"},
    ]
    for _ in range(2):
        found = [prepare_tokens(corpus, **call) for call in calls]
        assert all(file.tokenizer.decode(file.open()) == PLAIN for file in found)
    prepare_tokens(make_corpus(tmp_path, TEXT + "!"))
    monkeypatch.setattr(tokens, "FORMAT", tokens.FORMAT + 1)
    prepare_tokens(corpus)
    assert len(builds) == len(set(builds)) == len(calls) + 2


def test_a_cache_of_ones_own(corpus, tmp_path):
    found = prepare_tokens(corpus, cache=tmp_path / "my" / "own")
    assert found.path.parent == tmp_path / "my" / "own"
    assert len(list(found.path.parent.iterdir())) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


def scramble(path):
    path.write_bytes(b"{}" + path.read_bytes()[2:])


def remove(path):
    path.unlink()


def forge(path):  # well-formed, but of another length
    if path.suffix == ".npy":
        np.save(path, np.zeros(7, np.uint8))
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": 7}))


@pytest.mark.parametrize("damage", [cut, lengthen, empty, scramble, remove, forge])
@pytest.mark.parametrize("end", [".npy", ".json"])
def test_a_damaged_entry_is_built_anew(corpus, builds, damage, end):
    found = prepare_tokens(corpus)
    damage(found.path.with_suffix(end))
    found = prepare_tokens(corpus)
    assert found.tokenizer.decode(found.open()) == PLAIN
    prepare_tokens(corpus)
    assert len(builds) == 2


def test_what_killed_builds_left_goes_at_the_next(corpus, cache):
    cache.mkdir()
    left = [cache / f".tokens-char-0123.npy.0123456789abcde{i}.tmp" for i in range(2)]
    others = [cache / "tokens.tmp", cache / ".tokens-notes.tmp", cache / "tokens-char-0123.npy"]
    for path in (*left, *others):
        path.write_text("x")
        os.utime(path, (time.time() - 5,) * 2)
    with write_atomically(cache / "tokens-char-4567.npy"):  # one that is being written stays
        (written,) = cache.glob(".tokens-char-4567.*")
        os.utime(written, (time.time() - 90_000,) * 2)
        prepare_tokens(corpus)
        assert written.exists()
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_where_there_are_no_locks_leftovers_go_after_a_day(corpus, cache, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    cache.mkdir()
    old, new = (cache / f".tokens-char-0123.npy.0123456789abcde{i}.tmp" for i in range(2))
    for path, age in ((old, 90_000), (new, 80_000)):
        path.write_text("x")
        os.utime(path, (time.time() - age,) * 2)
    prepare_tokens(corpus)
    assert not old.exists() and new.exists()


BUILD = """
import sys
from gpt_lightning.data import tokens
from gpt_lightning.data.corpora import find_corpus
tokens.PIECE = 256
header = tokens._header
def slowly(dtype, count):
    if count:  # when the entry is about to be complete
        print("built", flush=True)
        sys.stdin.readline()
    return header(dtype, count)
tokens._header = slowly
corpus = find_corpus(sys.argv[1])
found = tokens.prepare_tokens(corpus)
print(found.path, len(found.open()), found.tokenizer.decode(found.open()) == corpus.text())
"""


def start(code, *args):
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *args], stdin=pipe, stdout=pipe, text=True)


def test_two_processes_build_one_entry(corpus, cache, builds):
    runs = [start(BUILD, corpus.name) for _ in range(2)]
    for run in runs:  # both are in the middle of it before either may end
        assert run.stdout.readline() == "built\n"
    answers = [run.communicate("\n", timeout=60)[0].split() for run in runs]
    found = prepare_tokens(corpus)
    assert answers == [[str(found.path), str(len(PLAIN)), "True"]] * 2
    assert not builds and len(list(cache.iterdir())) == 2


def test_a_killed_build_leaves_no_entry(corpus, cache):
    run = start(BUILD, corpus.name)
    assert run.stdout.readline() == "built\n"
    run.kill()
    run.communicate()
    assert [path.suffix for path in cache.iterdir()] == [".tmp"]
    found = prepare_tokens(corpus)
    assert found.tokenizer.decode(found.open()) == PLAIN


# --- vocabularies and errors ----------------------------------------------------------------------


def test_a_given_vocabulary(corpus, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 100)
    at = PLAIN.index("ü")
    vocabulary = "zyx" + "".join(sorted(set(PLAIN) - set("ü😀")))
    with pytest.raises(
        ValueError, match=rf"{corpus.name}.*'ü' \(U\+00FC.*position {at} "
    ) as caught:
        prepare_tokens(corpus, vocabulary=vocabulary)
    assert "\n" not in str(caught.value)
    dropped = prepare_tokens(corpus, vocabulary=vocabulary, unknown="drop")
    assert dropped.tokenizer.vocabulary == vocabulary
    assert dropped.tokenizer.decode(dropped.open()) == PLAIN.replace("ü", "").replace("😀", "")
    replaced = prepare_tokens(corpus, vocabulary=vocabulary + "?", unknown="replace")
    assert replaced.tokenizer.decode(replaced.open()) == PLAIN.replace("ü", "?").replace("😀", "?")


def test_where_in_a_long_text(tmp_path):
    text = "ab" * 200_000 + "Z" + "ab" * 10
    with pytest.raises(ValueError, match="'Z'.* position 400000 "):
        prepare_tokens(make_corpus(tmp_path, text), vocabulary="ab")


def test_nothing_is_left_of_a_failure(corpus, cache):
    for arguments, part in [
        ({"vocabulary": "ab"}, "is not in the vocabulary"),
        ({"vocabulary": "#", "unknown": "drop"}, "no character of the vocabulary"),
        ({"vocabulary": ""}, "empty"),
        ({"tokenizer": "byte", "vocabulary": "ab"}, "--data.vocabulary"),
        ({"tokenizer": "bytes"}, "--data.tokenizer='bytes'.*did you mean byte"),
        ({"unknown": "skip"}, "--data.unknown='skip'"),
    ]:
        with pytest.raises(ValueError, match=part) as caught:
            prepare_tokens(corpus, **arguments)
        assert "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_text_that_turns_out_to_be_none(tmp_path, cache, kind):
    corpus = make_corpus(tmp_path, "a" * 10_000)
    for raw, part in [
        (b"a" * 9_000 + b"\xff", "byte offset 9000"),
        (b"a" * 9_000 + b"\0", "NUL byte at byte offset 9000"),
        (b"\xef\xbb\xbf", "is empty"),
    ]:
        corpus.paths[0].write_bytes(raw)
        with pytest.raises(ValueError, match=part):
            prepare_tokens(corpus, kind)
    assert not list(cache.iterdir())


def test_a_disk_that_is_full(corpus, cache, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=f"{corpus.name}.*{cache}.*No space left on device"):
        prepare_tokens(corpus)
    assert not list(cache.iterdir())


def test_a_file_that_is_gone(corpus):
    corpus.paths[0].unlink()
    with pytest.raises(ValueError, match=f"{corpus.name} cannot be read"):
        prepare_tokens(corpus)


@pytest.mark.parametrize("more", ["a", "Z"])  # Z is new to the vocabulary of the first pass
def test_a_file_that_changes_meanwhile(corpus, cache, monkeypatch, more):
    build = tokens._build

    def meanwhile(*args):
        with corpus.paths[0].open("a") as file:
            file.write(more)
        build(*args)

    monkeypatch.setattr(tokens, "_build", meanwhile)
    with pytest.raises(ValueError, match="changed while it was read; run again"):
        prepare_tokens(corpus)
    assert not list(cache.glob("*.npy"))
    monkeypatch.setattr(tokens, "_build", build)
    assert len(prepare_tokens(corpus).open()) == len(PLAIN) + 1


def test_every_pass_has_a_bar_that_ends_with_the_text_s_last_byte(corpus, monkeypatch):
    bars = {}

    @contextlib.contextmanager
    def progress(total, title):
        seen = []
        yield SimpleNamespace(update=seen.append)
        bars[title] = (total, sum(seen))

    monkeypatch.setattr(tokens, "progress", progress)
    monkeypatch.setattr(tokens, "PIECE", 100)
    prepare_tokens(corpus)
    whole = (len(TEXT.encode()),) * 2
    assert bars == {"digest": whole, "vocabulary": whole, "tokens": whole}
    bars.clear()
    prepare_tokens(corpus)
    assert bars == {"digest": whole}


def test_a_bar_shows_rate_and_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    with files.progress(4000, "tokens") as bar:
        bar.update(1000)
        assert not terminal.getvalue()  # not within two seconds
        bar.start_t -= 10
        bar.refresh()
    assert re.search(r"tokens: +25%.* 1.00k/4.00k \[00:10<00:30, .*B/s\]", terminal.getvalue())


def test_memory_is_constant(tmp_path):
    with open(tmp_path / "text", "w") as file:
        for i in range(400):
            file.write(f"naïve {i:06d}\n" * 7_000)  # 39 MB in all
    corpus = find_corpus(str(tmp_path / "text"))
    tracemalloc.start()  # not the process's peak, which begins with that of the one it came from
    assert len(prepare_tokens(corpus).open()) == 400 * 7_000 * 13
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
