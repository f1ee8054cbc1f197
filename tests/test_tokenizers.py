import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_lightning.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    tokenizer_from_state,
    train_tokenizer,
)

# every code point, surrogates too; and what people write
ANY = st.text(st.characters(codec=None, exclude_categories=()))
TEXT = st.text()
SAMPLES = [
    "",
    "First Citizen:\n",
    "naïve e\u0301",
    "漢字かな",
    "👩‍👩‍👧 🇩🇪",
    "\U0010ffff\x00\x7f\x80",
]


def in_pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


# --- characters -----------------------------------------------------------------------------------


@given(ANY.filter(bool), st.integers(1, 5))
def test_the_vocabulary_is_the_lectures(text, size):
    tokenizer = CharTokenizer.train(in_pieces(text, size))
    chars = sorted(set(text))
    stoi = {ch: i for i, ch in enumerate(chars)}
    assert tokenizer.vocabulary == "".join(chars)
    assert tokenizer.vocab_size == len(chars)
    assert tokenizer.encode(text).tolist() == [stoi[c] for c in text]


def test_training_finds_a_late_and_rare_character():
    chunks = ["ab" * 50_000 + "z" + "ab" * 50_000, "ba" * 10, "ß", "Q"]
    assert CharTokenizer.train(iter(chunks)).vocabulary == "Qabzß"


@given(ANY.filter(bool))
def test_characters_round_trip(text):
    tokenizer = CharTokenizer.train([text])
    ids = tokenizer.encode(text)
    stream = tokenizer.stream_decoder()
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert "".join(map(stream, ids)) + stream(None) == text
    assert tokenizer.count_characters(ids) == len(ids) == len(text)
    assert tokenizer_from_state(tokenizer.state()).encode(text).tolist() == ids.tolist()


@pytest.mark.parametrize("token", [-1, 3, 1 << 40])
def test_a_streamed_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"token id {token} is not in the vocabulary of 3 tokens"):
        CharTokenizer("abc").stream_decoder()(token)


@pytest.mark.parametrize("text", SAMPLES)
def test_a_vocabulary_in_any_order(text):
    vocabulary = "".join(sorted(set("".join(SAMPLES)), reverse=True))
    tokenizer = CharTokenizer(vocabulary)
    assert tokenizer.encode(text).tolist() == [vocabulary.index(c) for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_ids_take_the_smallest_type_that_holds_them(size, dtype):
    tokenizer = CharTokenizer("".join(map(chr, range(size))))
    last = chr(size - 1)
    assert tokenizer.dtype == np.dtype(dtype)
    for text in (last, last + chr(0), chr(0), ""):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.dtype(dtype) and ids.ndim == 1 and ids.flags.writeable
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(last).tolist() == [size - 1]


@pytest.mark.parametrize(
    ("text", "offset", "expected"),
    [
        ("abcab", 0, r"'c' \(U\+0063 LATIN SMALL LETTER C\) at position 2 "),
        ("aab", 0, None),
        ("baé😀", 1000, r"'é' \(U\+00E9 LATIN SMALL LETTER E WITH ACUTE\) at position 1002 "),
        ("ba😀é", 7, r"'😀' \(U\+1F600 GRINNING FACE\) at position 9 "),
        ("ab\x07", 0, r"'\\x07' \(U\+0007\) at position 2 "),
        ("a\ud800", 0, r"'\\ud800' \(U\+D800\) at position 1 "),
        ("a\n", 0, r"'\\n' \(U\+000A\) at position 1 "),
    ],
)
def test_an_unknown_character_is_named(text, offset, expected):
    tokenizer = CharTokenizer("ab")
    if expected is None:
        assert tokenizer.encode(text, offset=offset).tolist() == [0, 0, 1]
        return
    with pytest.raises(ValueError, match=expected) as caught:
        tokenizer.encode(text, offset=offset)
    message = str(caught.value)
    assert "\n" not in message and "unknown=drop" in message and "unknown=replace" in message


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


def test_nothing_to_replace_by():
    tokenizer = CharTokenizer("xyz", unknown="replace")
    assert tokenizer.encode("zyx").tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="'a'.*position 3 .*nothing to replace.*unknown=drop"):
        tokenizer.encode("xyzaxy")


def test_bad_vocabularies():
    with pytest.raises(ValueError, match="'b' more than once"):
        CharTokenizer("abcb")
    with pytest.raises(ValueError, match="empty"):
        CharTokenizer("")
    with pytest.raises(ValueError, match="not list"):
        CharTokenizer(["a", "b"])
    for nothing in ([], ["", ""]):
        with pytest.raises(ValueError, match="empty"):
            CharTokenizer.train(nothing)
    with pytest.raises(ValueError, match="did you mean replace"):
        CharTokenizer("ab", unknown="replaced")


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer()])
def test_ids_outside_the_vocabulary(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong} is not"):
            tokenizer.decode([0, wrong, 1])
    with pytest.raises(ValueError, match="whole numbers"):
        tokenizer.decode([0.5])
    assert tokenizer.decode([]) == ""


# --- bytes ----------------------------------------------------------------------------------------


@given(TEXT)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8 and ids.flags.writeable
    assert bytes(ids) == text.encode("utf-8")
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert tokenizer.count_characters(ids) == len(text)


@given(st.binary())
def test_any_bytes_decode_and_streaming_agrees(raw):
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream_decoder()
    assert tokenizer.decode(list(raw)) == raw.decode("utf-8", "replace")
    assert "".join(map(stream, raw)) + stream(None) == raw.decode("utf-8", "replace")


def test_a_streamed_character_comes_whole():
    stream = ByteTokenizer().stream_decoder()
    assert [stream(b) for b in "a😀é".encode()] == ["a", "", "", "", "😀", "", "é"]
    assert stream("漢".encode()[0]) == "" and stream(None) == "\ufffd"


@given(ANY)
def test_lone_surrogates_do_not_crash(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.count_characters(tokenizer.encode(text)) == len(text)
    assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)


def test_counting_in_pieces():
    ids = np.tile(ByteTokenizer().encode("aé漢😀\n"), 600_000)  # more than one piece
    assert ByteTokenizer().count_characters(ids) == 5 * 600_000


# --- states and choices ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [CharTokenizer("\nab😀é"), ByteTokenizer()])
def test_a_state_is_plain_and_brings_the_tokenizer_back(tokenizer):
    state = json.loads(json.dumps(tokenizer.state()))
    again = tokenizer_from_state(state)
    assert type(again) is type(tokenizer) and again.state() == state
    assert again.encode("ab😀é\n").tolist() == tokenizer.encode("ab😀é\n").tolist()


def test_the_policy_goes_with_a_state():
    assert tokenizer_from_state({"kind": "char", "vocabulary": "ab"}, "drop").encode("xa").size == 1


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        "char",
        {},
        {"kind": "word"},
        {"kind": "char"},
        {"kind": "char", "vocabulary": ["a"]},
        {"kind": "char", "vocabulary": ""},
        {"kind": "char", "vocabulary": "aa"},
        {"kind": ["char"], "vocabulary": "a"},
    ],
)
def test_malformed_states(state):
    with pytest.raises(ValueError) as caught:
        tokenizer_from_state(state)
    assert "\n" not in str(caught.value)


def test_training_by_name():
    assert train_tokenizer("char", ["ba"]).state() == {"kind": "char", "vocabulary": "ab"}
    assert train_tokenizer("byte", None).state() == {"kind": "byte"}  # the text is not read
    assert train_tokenizer("char", ["a"], "drop").encode("xax").tolist() == [0]
    with pytest.raises(ValueError, match=re.escape("--data.tokenizer='chars'") + ".*mean char"):
        train_tokenizer("chars", ["a"])
    for kind in ("char", "byte"):
        with pytest.raises(ValueError, match="--data.unknown='ignore'"):
            train_tokenizer(kind, ["a"], "ignore")


def test_importing_is_light():
    code = (
        "import sys, gpt_lightning.data.tokenizers, gpt_lightning.data.corpora\n"
        "import gpt_lightning.data.tokens\n"
        "print(sorted({'torch', 'lightning', 'tqdm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
