"""Token files: built once in constant memory, kept in the cache by content."""

import hashlib
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_lightning.data import tokens
from gpt_lightning.data.corpus import find_corpus
from gpt_lightning.data.tokens import TokenizerSettings, prepare_tokens
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


def prepare(corpus, kind="char", vocabulary_corpus=None, **settings):
    return prepare_tokens(corpus, TokenizerSettings(kind, **settings), vocabulary_corpus)


def decoded(found) -> str:
    return found.tokenizer.decode(found.ids)


def files(cache):
    """The suffixes of everything in the cache except locks."""
    found = cache.iterdir() if cache.exists() else ()
    return sorted(path.suffix for path in found if path.suffix != ".lock")


def test_characters_are_encoded_as_in_the_lecture(corpus):
    found = prepare(corpus)
    ids = found.ids
    chars = sorted(set(PLAIN))
    assert ids.tolist() == [chars.index(c) for c in PLAIN]
    assert ids.dtype == np.uint8 and isinstance(ids, np.memmap) and not ids.flags.writeable
    assert found.tokenizer.vocabulary == "".join(chars)
    assert found.corpus_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)
@given(st.text("ab\r\né漢😀\ufeff").filter(lambda s: s.strip("\ufeff")), st.integers(1, 7))
def test_any_text_round_trips_whatever_the_piece_size(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(tokens, "PIECE", size)
    corpus = make_corpus(tmp_path, text)
    expected = "".join(corpus.chunks())
    assert decoded(prepare(corpus)) == expected
    assert prepare(corpus, "byte").ids.tobytes() == expected.encode()
    assert decoded(prepare(corpus, "word")) == expected


# --- the cache ------------------------------------------------------------------------------------


def test_a_file_is_built_once_for_what_the_ids_depend_on(corpus, tmp_path, monkeypatch):
    built, encode = [], tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda *args: built.append(args[2]) or encode(*args))
    wide = "".join(sorted(set(PLAIN))) + "#"
    calls = [
        {},
        {"kind": "byte"},
        {"vocabulary": wide},
        {"vocabulary": wide[::-1]},
        {"vocabulary": wide, "unknown": "drop"},
        {"vocabulary": wide, "unknown": "replace"},
        {"kind": "bpe"},
        {"kind": "bpe", "max_vocab_size": 300},
        {"kind": "word"},
        {"vocabulary_corpus": make_corpus(tmp_path, wide, "wide")},
    ]
    moved = make_corpus(tmp_path, TEXT, "moved")  # the same content under another name
    for text in (corpus, moved):
        found = [prepare(text, **call) for call in calls]
        assert list(map(decoded, found)) == [PLAIN] * len(calls)
    prepare(make_corpus(tmp_path, TEXT + "!", "other"))
    monkeypatch.setattr(tokens, "FORMAT", tokens.FORMAT + 1)
    prepare(corpus)
    assert len(built) == len(set(built)) == len(calls) + 2


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
found = tokens.prepare_tokens(corpus, tokens.TokenizerSettings())
print(found.path, len(found.ids), len(calls))
"""


def start_build(corpus):
    command = [sys.executable, "-c", BUILD, corpus.name]
    run = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert run.stdout.readline() == "ready\n"
    return run


def test_two_processes_build_a_file_once(corpus):
    first = start_build(corpus)
    assert first.stdout.readline() == "built\n"
    second = start_build(corpus)  # waits for the lock
    answers = [run.communicate("\n", timeout=60)[0].split() for run in (first, second)]
    path = str(prepare(corpus).path)
    assert answers == [[path, str(len(PLAIN)), "2"], [path, str(len(PLAIN)), "1"]]


def test_a_killed_build_leaves_no_token_file(corpus, cache):
    run = start_build(corpus)
    assert run.stdout.readline() == "built\n"
    run.kill()
    run.communicate()
    assert files(cache) == [".tmp"]
    assert decoded(prepare(corpus)) == PLAIN
    assert files(cache) == [".bin", ".json"]


def test_files_of_an_earlier_version_of_the_text_are_removed(tmp_path, cache):
    first = prepare(make_corpus(tmp_path, "first")).ids
    other = prepare(make_corpus(tmp_path, "other", "other"))
    second = make_corpus(tmp_path, "second")
    found = [prepare(second), prepare(second, "byte"), other]
    assert set(cache.glob("*.bin")) == {one.path for one in found}
    assert first.tolist() == [0, 1, 2, 3, 4]  # "first" in the order of its letters: f i r s t
    assert files(cache) == [".bin"] * 3 + [".json"] * 3


def test_the_longest_unused_files_are_removed_from_a_full_cache(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_CACHE", 250)
    corpora = [make_corpus(tmp_path, str(i) * 100, str(i)) for i in range(3)]
    paths = [prepare(corpus).path for corpus in corpora[:2]]
    for path in paths:
        os.utime(path, (0, 0))  # long ago
    prepare(corpora[0])
    newest = prepare(corpora[2]).path
    assert set(cache.glob("*.bin")) == {paths[0], newest}
    large = prepare(make_corpus(tmp_path, "a" * 999, "large"))
    assert list(cache.glob("*.bin")) == [large.path]


def test_the_encoding_of_a_large_text_is_announced_once(corpus, cache, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "LARGE", len(TEXT))
    for _ in range(2):
        prepare(corpus)
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and str(cache) in err


# --- vocabularies and errors ----------------------------------------------------------------------


def test_characters_outside_a_given_vocabulary_follow_the_policy(corpus):
    vocabulary = "zyx" + "".join(sorted(set(PLAIN) - set("ü😀")))
    with pytest.raises(UserError, match=rf"corpus={corpus.name}.*'ü' \(U\+00FC\)"):
        prepare(corpus, vocabulary=vocabulary)
    dropped = prepare(corpus, vocabulary=vocabulary, unknown="drop")
    assert dropped.tokenizer.vocabulary == vocabulary
    assert decoded(dropped) == PLAIN.replace("ü", "").replace("😀", "")
    replaced = prepare(corpus, vocabulary=vocabulary + "?", unknown="replace")
    assert decoded(replaced) == PLAIN.replace("ü", "?").replace("😀", "?")


RARE = "abcabcab漢漢字é"  # with min_count=3: c, 漢, 字 and é are rare, which occur six times


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize(
    ("unknown", "expected"),
    [("replace", "ab\ufffd" * 2 + "ab" + "\ufffd" * 4), ("drop", "ababab")],
)
def test_rare_characters_are_replaced_or_dropped_and_counted(tmp_path, kind, unknown, expected):
    for _ in range(2):  # the second time from the cache
        found = prepare(make_corpus(tmp_path, RARE), kind, unknown=unknown, min_count=3)
        assert decoded(found) == expected
        assert (found.unknown, found.once) == (6, 2)  # 字 and é occur once
        assert found.tokenizer.count_characters(found.ids) == len(expected)


def test_no_replacement_is_added_to_the_vocabulary_without_rare_characters(tmp_path):
    found = prepare(make_corpus(tmp_path, "aabb"), unknown="replace", min_count=2)
    assert found.tokenizer.vocabulary == "ab" and (found.unknown, found.once) == (0, 0)


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_the_vocabulary_of_another_corpus_can_be_used(corpus, tmp_path, kind):
    other = make_corpus(tmp_path, TEXT + "to sleep, to sleep", "other")
    found = prepare(corpus, kind, vocabulary_corpus=other)
    assert found.tokenizer.state() == prepare(other, kind).tokenizer.state()
    assert found.tokenizer.state() != prepare(corpus, kind).tokenizer.state()
    assert decoded(found) == PLAIN


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"vocabulary": "ab"}, "corpus=.*is not in the vocabulary"),
        ({"vocabulary": "#", "unknown": "drop"}, "corpus=.*no character of the vocabulary"),
        ({"vocabulary": ""}, "vocabulary='' must be"),
        ({"kind": "byte", "vocabulary": "ab"}, "vocabulary=ab is for .* not for tokenizer=b"),
        ({"kind": "bpe", "min_count": 3}, "min_count=3 is for .*char, word, not for"),
        ({"max_vocab_size": 500}, "max_vocab_size=500 is for .*word, bpe, not for tokenizer=char"),
        ({"kind": "word", "max_vocab_size": 5}, "max_vocab_size=5 is less than the "),
        ({"kind": "bpe", "max_vocab_size": 1 << 17}, "max_vocab_size=131072 must be at most"),
        ({"min_count": 10_000}, "min_count=10000 is more often"),
    ],
)
def test_an_invalid_setting_is_refused_and_leaves_nothing(corpus, cache, arguments, part):
    with pytest.raises(UserError, match=f"^{part}"):
        prepare(corpus, **arguments)
    assert not files(cache)


def test_a_file_that_is_gone_or_not_text_is_refused_and_leaves_nothing(corpus, cache):
    corpus.paths[0].write_bytes(b"a" * 9_000 + b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        prepare(corpus)
    corpus.paths[0].unlink()
    with pytest.raises(UserError, match=f"{corpus.name}: No such file"):
        prepare(corpus)
    assert not files(cache)


def test_a_file_that_changes_while_it_is_read_is_refused(corpus, cache, monkeypatch):
    def meanwhile(*args):
        corpus.paths[0].write_text(PLAIN + "a", encoding="utf-8")
        encode(*args)

    encode = tokens._encode
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="changed while it was read"),
    ):
        patch.setattr(tokens, "_encode", meanwhile)
        prepare(corpus)
    assert not files(cache)
    assert decoded(prepare(corpus)) == PLAIN + "a"


def test_memory_is_constant(tmp_path):
    with open(tmp_path / "text", "w") as file:
        for i in range(400):
            file.write(f"naïve {i:06d}\n" * 7_000)  # 39 MB in all
    corpus = find_corpus(str(tmp_path / "text"))
    tracemalloc.start()
    assert len(prepare(corpus).ids) == 400 * 7_000 * 13
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
