"""Token files: built once in constant memory, kept in the cache by content."""

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_lightning.data import tokens
from gpt_lightning.data.corpus import find_corpus, progress
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
    built, build = [], tokens._build

    def counting(path, *rest):
        built.append(path)
        return build(path, *rest)

    monkeypatch.setattr(tokens, "_build", counting)
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


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4"])
def test_the_header_has_one_size_for_every_count(tmp_path, dtype):
    sizes = set()
    for count in (0, 12345, 2**31, 10**15):
        with open(tmp_path / "header", "wb") as file:
            tokens._write_header(file, np.dtype(dtype), count)
            sizes.add(file.tell())
    assert len(sizes) == 1


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


def test_files_of_a_corpus_that_changed_are_removed(tmp_path, cache):
    other = prepare_tokens(make_corpus(tmp_path, TEXT, "other")).path
    for i in range(4):
        corpus = make_corpus(tmp_path, TEXT + str(i))
        paths = {prepare_tokens(corpus, kind).path for kind in ("char", "byte")}
        (cache / f".{next(iter(paths)).name}.tmp").touch()  # what a killed build leaves
    assert {path for path in files(cache) if path.suffix == ".npy"} == paths | {other}
    assert len(list(cache.iterdir())) == 3 * 3 + 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def scramble(path):
    path.write_bytes(b"{}" + path.read_bytes()[2:])


def remove(path):
    path.unlink()


def replace_by_another_length(path):
    if path.suffix == ".npy":
        np.save(path, np.zeros(7, np.uint8))
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": 7}))


@pytest.mark.parametrize("damage", [cut, empty, scramble, remove, replace_by_another_length])
@pytest.mark.parametrize("end", [".npy", ".json"])
def test_a_damaged_file_is_built_again(corpus, builds, damage, end):
    found = prepare_tokens(corpus)
    damage(found.path.with_suffix(end))
    found = prepare_tokens(corpus)
    assert found.tokenizer.decode(found.open()) == PLAIN
    prepare_tokens(corpus)
    assert len(builds) == 2


BUILD = """
import sys
from gpt_lightning.data import tokens
from gpt_lightning.data.corpus import find_corpus
write_header = tokens._write_header
def slowly(file, dtype, count):
    if count:  # the file is about to be complete
        print("built", flush=True)
        sys.stdin.readline()
    write_header(file, dtype, count)
tokens._write_header = slowly
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
    assert sorted(path.suffix for path in files(cache)) == [".json", ".npy"]


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


def test_an_unknown_character_is_located_in_a_long_text(tmp_path):
    text = "ab" * 200_000 + "Z" + "ab" * 10
    with pytest.raises(UserError, match="'Z'.* position 400000 "):
        prepare_tokens(make_corpus(tmp_path, text), vocabulary="ab")


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


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"a" * 9_000 + b"\xff", "byte offset 9000"),
        (b"a" * 9_000 + b"\0", "NUL byte at byte offset 9000"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_a_file_that_is_not_text_leaves_nothing(corpus, cache, kind, raw, part):
    corpus.paths[0].write_bytes(raw)
    with pytest.raises(UserError, match=part):
        prepare_tokens(corpus, kind)
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
    write_header = tokens._write_header

    def meanwhile(*args):
        with corpus.paths[0].open("a") as file:
            file.write("a")
        write_header(*args)

    monkeypatch.setattr(tokens, "_write_header", meanwhile)
    with pytest.raises(UserError, match="changed while it was read; run again"):
        prepare_tokens(corpus)
    assert not files(cache)
    monkeypatch.setattr(tokens, "_write_header", write_header)
    assert len(prepare_tokens(corpus).open()) == len(PLAIN) + 1


def test_both_passes_have_a_bar_that_ends_with_the_last_byte(corpus, monkeypatch):
    bars = {}

    @contextlib.contextmanager
    def fake_progress(total, title):
        seen = []
        yield SimpleNamespace(update=seen.append)
        bars[title] = (total, sum(seen))

    monkeypatch.setattr(tokens, "progress", fake_progress)
    monkeypatch.setattr(tokens, "PIECE", 100)
    prepare_tokens(corpus)
    assert bars == {"vocabulary": (len(TEXT.encode()),) * 2, "tokens": (len(TEXT.encode()),) * 2}


def test_a_bar_is_shown_on_a_terminal_only(capsys):
    with progress(4000, "tokens") as bar:
        assert bar.disable


def test_memory_is_constant(tmp_path):
    with open(tmp_path / "text", "w") as file:
        for i in range(400):
            file.write(f"naïve {i:06d}\n" * 7_000)  # 39 MB in all
    corpus = find_corpus(str(tmp_path / "text"))
    tracemalloc.start()
    assert len(prepare_tokens(corpus).open()) == 400 * 7_000 * 13
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
