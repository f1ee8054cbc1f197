import json
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_lightning.data.bpe import BPETokenizer
from gpt_lightning.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    character_counts,
    tokenizer_from_state,
)
from gpt_lightning.data.words import WordTokenizer
from gpt_lightning.errors import UserError

# every code point, surrogates included; and text that people write
ANY = st.text(st.characters(codec=None, exclude_categories=()))

# --- characters -----------------------------------------------------------------------------------


@given(ANY.filter(bool), st.integers(1, 5))
def test_the_vocabulary_is_that_of_the_lecture(text, size):
    tokenizer = CharTokenizer.train(text[i : i + size] for i in range(0, len(text), size))
    chars = sorted(set(text))
    stoi = {ch: i for i, ch in enumerate(chars)}
    assert tokenizer.vocabulary == "".join(chars)
    assert tokenizer.vocab_size == len(chars)
    assert tokenizer.encode(text).tolist() == [stoi[c] for c in text]


@given(st.text("abcé😀"), st.integers(1, 5), st.integers(1, 4))
def test_characters_are_counted_up_to_a_limit(text, size, most):
    chunks = (text[i : i + size] for i in range(0, len(text), size))
    expected = [(c, min(n, most)) for c, n in sorted(Counter(text).items())]
    assert list(character_counts(chunks, most).items()) == expected


def test_added_characters_follow_the_vocabulary():
    assert CharTokenizer("ba").with_characters("dabc").vocabulary == "bacd"


@given(ANY.filter(bool))
def test_characters_round_trip_with_a_vocabulary_in_any_order(text):
    tokenizer = CharTokenizer("".join(sorted(set(text), reverse=True)))
    ids = tokenizer.encode(text)
    stream = tokenizer.stream_decoder()
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert "".join(map(stream, ids)) + stream(None) == text
    assert tokenizer.count_characters(ids) == len(ids) == len(text)


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_ids_take_the_smallest_type_that_holds_them(size, dtype):
    tokenizer = CharTokenizer("".join(map(chr, range(size))))
    for text in (chr(size - 1), chr(0), ""):
        ids = tokenizer.encode(text)
        assert ids.dtype == tokenizer.dtype == np.dtype(dtype) and ids.flags.writeable
        assert ids.tolist() == list(map(ord, text)) and tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcab", r"'c' \(U\+0063\) in 'abcab' "),
        ("a" * 99 + "é😀", r"'é' \(U\+00E9\) in 'aaaaaaaaaaé😀' "),
        ("a\ud800", r"'\\ud800' \(U\+D800\) in 'a\\ud800' "),
    ],
)
def test_an_unknown_character_is_named_with_the_text_around_it(text, expected):
    with pytest.raises(UserError, match=f"{expected}.*unknown=drop.*unknown=replace"):
        CharTokenizer("ab").encode(text)


@given(ANY, st.sets(st.characters(), min_size=1, max_size=4).map(lambda s: "".join(sorted(s))))
def test_unknown_characters_are_dropped(text, vocabulary):
    tokenizer = CharTokenizer(vocabulary, unknown="drop")
    assert tokenizer.decode(tokenizer.encode(text)) == "".join(c for c in text if c in vocabulary)


@pytest.mark.parametrize(
    ("vocabulary", "stand_in"),
    [("a\n ?\ufffd", "\ufffd"), ("\n ?a", "?"), ("\n a", " "), ("\na", "\n")],
)
def test_unknown_characters_are_replaced(vocabulary, stand_in):
    tokenizer = CharTokenizer(vocabulary, unknown="replace")
    for text in ("aba", "a😀a"):
        assert tokenizer.decode(tokenizer.encode(text)) == f"a{stand_in}a"
    with pytest.raises(UserError, match="'a'"):  # no character can replace it
        CharTokenizer("xyz", unknown="replace").encode("xyzaxy")


@pytest.mark.parametrize("vocabulary", ["", None, ["a", "b"], "abcb"])
def test_a_vocabulary_without_distinct_characters_is_refused(vocabulary):
    with pytest.raises(UserError, match="vocabulary=.* distinct characters"):
        CharTokenizer(vocabulary)


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="unknown=replaced must be.*did you mean replace"):
        CharTokenizer("ab", unknown="replaced")


# --- bytes ----------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8 and ids.flags.writeable
    assert bytes(ids) == text.encode("utf-8")
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_characters(ids) == len(text)


@given(st.binary())
def test_any_bytes_decode_and_streaming_agrees(raw):
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream_decoder()
    assert tokenizer.decode(list(raw)) == raw.decode("utf-8", "replace")
    assert "".join(map(stream, raw)) + stream(None) == raw.decode("utf-8", "replace")


def test_streaming_returns_whole_characters():
    stream = ByteTokenizer().stream_decoder()
    assert [stream(b) for b in "a😀é".encode()] == ["a", "", "", "", "😀", "", "é"]
    assert stream("漢".encode()[0]) == "" and stream(None) == "\ufffd"


def test_characters_of_a_long_text_are_counted_in_pieces():
    ids = np.tile(ByteTokenizer().encode("aé漢😀\n"), 600_000)  # more than one piece
    assert ByteTokenizer().count_characters(ids) == 5 * 600_000


# --- states ---------------------------------------------------------------------------------------


TEXT = "ab ab é😀\nba ba"
TOKENIZERS = [
    CharTokenizer.train([TEXT]),
    ByteTokenizer(),
    WordTokenizer.train([TEXT], "".join(sorted(set(TEXT))), 20),
    BPETokenizer.train([TEXT], 300),
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.kind)
def test_a_tokenizer_is_restored_from_its_state_as_json(tokenizer):
    state = json.loads(json.dumps(tokenizer.state()))
    again = tokenizer_from_state(state)
    assert type(again) is type(tokenizer) and again.state() == state
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.kind)
def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.decode(again.encode(TEXT)) == TEXT


def test_a_restored_tokenizer_has_the_given_policy():
    assert tokenizer_from_state({"kind": "char", "vocabulary": "ab"}, "drop").encode("xa").size == 1


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"kind": "words"},
        {"kind": ["char"]},
        *({"kind": kind, "vocabulary": v} for kind in ("char", "word") for v in ("", "aa", 3)),
        {"kind": "word", "vocabulary": "[" * 1_000_000},
        {"kind": "bpe", "vocabulary": "a bc"},
        {"kind": "bpe", "vocabulary": ["a b"]},
    ],
    ids=lambda state: str(state)[:40],
)
def test_a_malformed_state_is_refused(state):
    with pytest.raises(UserError):
        tokenizer_from_state(state)


def test_importing_tokenizers_imports_neither_torch_nor_lightning():
    code = (
        "import sys, gpt_lightning.data.tokenizers, gpt_lightning.data.tokens\n"
        "print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
