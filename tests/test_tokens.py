"""Token files: built once in constant memory, kept in the cache by content."""

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_lightning.data import corpus as corpus_module
from gpt_lightning.data import tokens
from gpt_lightning.data.corpus import find_corpus
from gpt_lightning.data.tokens import prepare_tokens
from gpt_lightning.errors import UserError

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


def files(cache):
    """Everything in the cache except locks."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"] if cache.exists() else []


@pytest.fixture
def builds(monkeypatch):
    """The files that were built, not found."""
    built, encode = [], tokens._encode

    def counting(corpus, coder, path, digest):
        built.append(path)
        return encode(corpus, coder, path, digest)

    monkeypatch.setattr(tokens, "_encode", counting)
    return built


def test_characters_are_encoded_as_in_the_lecture(corpus):
    found = prepare_tokens(corpus)
    ids = found.open()
    chars = sorted(set(PLAIN))
    assert ids.tolist() == [chars.index(c) for c in PLAIN]
    assert ids.dtype == np.uint8 and isinstance(ids, np.memmap) and not ids.flags.writeable
    assert found.tokenizer.vocabulary == "".join(chars)
    assert found.corpus_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
@given(st.text("ab\r\né漢😀\ufeff").filter(lambda s: s.strip("\ufeff")), st.integers(1, 7))
def test_any_text_round_trips_whatever_the_piece_size(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(tokens, "PIECE", size)
    corpus = make_corpus(tmp_path, text)
    for kind in ("char", "byte"):
        found = prepare_tokens(corpus, kind)
        assert found.tokenizer.decode(found.open()) == corpus.text()
        if kind == "byte":
            assert found.open().tobytes() == corpus.text().encode()


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "u1"), (257, "u2"), (50_000, "u2"), (70_000, "u4")]
)
def test_ids_take_the_smallest_type(tmp_path, size, dtype):
    text = "".join(chr(0x20000 + i) for i in range(size)) + "".join(
        map(chr, range(0x20000, 0x20005))
    )
    ids = prepare_tokens(make_corpus(tmp_path, text)).open()
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == [*range(size), 0, 1, 2, 3, 4]


# --- the cache ------------------------------------------------------------------------------------


def test_a_file_is_built_once_for_its_content(corpus, tmp_path, builds):
    first = prepare_tokens(corpus)
    again = prepare_tokens(corpus)
    assert again.path == first.path and again.tokenizer.state() == first.tokenizer.state()
    # the same content under another name is the same text, without unknown characters
    moved = prepare_tokens(make_corpus(tmp_path, TEXT, "moved"), unknown="drop")
    assert moved.path == first.path and moved.tokenizer.unknown == "drop"
    assert len(builds) == 1


def test_everything_that_changes_the_ids_gives_another_file(corpus, tmp_path, builds, monkeypatch):
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
    prepare_tokens(make_corpus(tmp_path, TEXT + "!", "other"))
    monkeypatch.setattr(tokens, "FORMAT", tokens.FORMAT + 1)
    prepare_tokens(corpus)
    assert len(builds) == len(set(builds)) == len(calls) + 2


BUILD = """
import sys
from gpt_lightning.data import tokens
from gpt_lightning.data.corpus import Corpus, find_corpus
sha256, calls = Corpus.sha256, []
def slowly(corpus):
    calls.append(corpus)
    if len(calls) == 2:  # the file is about to be complete
        print("built", flush=True)
        sys.stdin.readline()
    return sha256(corpus)
Corpus.sha256 = slowly
corpus = find_corpus(sys.argv[1])
print("ready", flush=True)
found = tokens.prepare_tokens(corpus)
print(found.path, len(found.open()), found.tokenizer.decode(found.open()) == corpus.text())
"""


def start_build(corpus):
    command = [sys.executable, "-c", BUILD, corpus.name]
    run = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert run.stdout.readline() == "ready\n"
    return run


def test_two_processes_build_a_file_once(corpus, builds):
    first = start_build(corpus)
    assert first.stdout.readline() == "built\n"
    second = start_build(corpus)  # waits for the lock
    answers = [run.communicate("\n", timeout=60)[0].split() for run in (first, second)]
    found = prepare_tokens(corpus)
    assert answers == [[str(found.path), str(len(PLAIN)), "True"]] * 2
    assert not builds


def test_a_killed_build_leaves_no_token_file(corpus, cache):
    run = start_build(corpus)
    assert run.stdout.readline() == "built\n"
    run.kill()
    run.communicate()
    assert [path.suffix for path in files(cache)] == [".tmp"]
    found = prepare_tokens(corpus)
    assert found.tokenizer.decode(found.open()) == PLAIN
    assert sorted(path.suffix for path in files(cache)) == [".bin", ".json"]


# --- vocabularies and errors ----------------------------------------------------------------------


def test_characters_outside_a_given_vocabulary_follow_the_policy(corpus, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 100)
    at = PLAIN.index("ü")
    vocabulary = "zyx" + "".join(sorted(set(PLAIN) - set("ü😀")))
    with pytest.raises(UserError, match=rf"corpus={corpus.name}.*'ü' \(U\+00FC.*position {at} "):
        prepare_tokens(corpus, vocabulary=vocabulary)
    dropped = prepare_tokens(corpus, vocabulary=vocabulary, unknown="drop")
    assert dropped.tokenizer.vocabulary == vocabulary
    assert dropped.tokenizer.decode(dropped.open()) == PLAIN.replace("ü", "").replace("😀", "")
    replaced = prepare_tokens(corpus, vocabulary=vocabulary + "?", unknown="replace")
    assert replaced.tokenizer.decode(replaced.open()) == PLAIN.replace("ü", "?").replace("😀", "?")


@pytest.mark.parametrize(
    ("arguments", "field", "part"),
    [
        ({"vocabulary": "ab"}, "corpus", "is not in the vocabulary"),
        ({"vocabulary": "#", "unknown": "drop"}, "corpus", "no character of the vocabulary"),
        ({"vocabulary": ""}, "vocabulary", "at least one character"),
        ({"tokenizer": "byte", "vocabulary": "ab"}, "vocabulary", "for the char tokenizer"),
        ({"tokenizer": "bytes"}, "tokenizer", "tokenizer='bytes'.*did you mean byte"),
        ({"unknown": "skip"}, "unknown", "unknown='skip'"),
    ],
)
def test_an_invalid_setting_is_refused_and_leaves_nothing(corpus, cache, arguments, field, part):
    with pytest.raises(UserError, match=part) as caught:
        prepare_tokens(corpus, **arguments)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(field)
    assert not files(cache)


@pytest.mark.parametrize(
    ("raw", "part"), [(b"a" * 9_000 + b"\xff", "byte offset 9000"), (b"\xef\xbb\xbf", "is empty")]
)
def test_a_file_that_is_not_text_leaves_nothing(corpus, cache, raw, part):
    corpus.paths[0].write_bytes(raw)
    with pytest.raises(UserError, match=part):
        prepare_tokens(corpus)
    assert not files(cache)


def test_a_full_disk_is_reported_with_the_cache_folder(corpus, cache, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"{corpus.name}.*{cache}.*No space left on device"):
        prepare_tokens(corpus)
    assert not files(cache)


def test_a_file_that_is_gone_is_named(corpus):
    corpus.paths[0].unlink()
    with pytest.raises(UserError, match=f"{corpus.name}: No such file"):
        prepare_tokens(corpus)


def test_a_file_that_changes_while_it_is_read_is_refused(corpus, cache, monkeypatch):
    encode = tokens._encode

    def meanwhile(*args):
        with corpus.paths[0].open("a") as file:
            file.write("a")
        encode(*args)

    monkeypatch.setattr(tokens, "_encode", meanwhile)
    with pytest.raises(UserError, match="changed while it was read; run again"):
        prepare_tokens(corpus)
    assert not files(cache)
    monkeypatch.setattr(tokens, "_encode", encode)
    assert len(prepare_tokens(corpus).open()) == len(PLAIN) + 1


def test_both_passes_have_a_bar_that_ends_with_the_last_byte(corpus, monkeypatch):
    bars = {}

    @contextlib.contextmanager
    def fake_progress(total, title):
        seen = []
        yield SimpleNamespace(update=seen.append)
        bars[title] = (total, sum(seen))

    monkeypatch.setattr(corpus_module, "progress", fake_progress)
    monkeypatch.setattr(tokens, "PIECE", 100)
    prepare_tokens(corpus)
    assert bars == {"vocabulary": (len(TEXT.encode()),) * 2, "tokens": (len(TEXT.encode()),) * 2}


def test_memory_is_constant(tmp_path):
    with open(tmp_path / "text", "w") as file:
        for i in range(400):
            file.write(f"naïve {i:06d}\n" * 7_000)  # 39 MB in all
    corpus = find_corpus(str(tmp_path / "text"))
    tracemalloc.start()
    assert len(prepare_tokens(corpus).open()) == 400 * 7_000 * 13
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
