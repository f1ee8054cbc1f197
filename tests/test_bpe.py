"""Byte pair encoding: every text round-trips; merges are those of the definition."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_lightning.data.bpe import BYTE_CHARACTERS, BPETokenizer
from gpt_lightning.errors import UserError

TEXT = "low low low lower lowest newest newest newest widest 漢字 漢字 😀😀\n" * 3
TOKENIZER = BPETokenizer.train([TEXT[:40], TEXT[40:]], 300)


@given(st.text() | st.text(st.sampled_from("lowerst 漢字😀\n")))
def test_any_text_round_trips(text):
    ids = TOKENIZER.encode(text)
    stream = TOKENIZER.stream_decoder()
    assert ids.dtype == TOKENIZER.dtype
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids.tolist()) == text
    assert "".join(map(stream, ids)) + stream(None) == text
    assert TOKENIZER.count_characters(ids) == len(text)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_ids_decode_and_streaming_agrees(ids):
    stream = TOKENIZER.stream_decoder()
    assert "".join(map(stream, ids)) + stream(None) == TOKENIZER.decode(ids)
    raw = b"".join(TOKENIZER._tokens[i] for i in ids)
    assert TOKENIZER.decode(ids) == raw.decode("utf-8", "replace")
    assert TOKENIZER.count_characters(np.array(ids, int)) == sum(b & 0xC0 != 0x80 for b in raw)


@given(st.binary(max_size=20))
def test_the_first_ids_are_the_bytes(raw):
    assert TOKENIZER.decode(list(raw)) == raw.decode("utf-8", "replace")
    assert BPETokenizer("").encode("é\n").tolist() == list("é\n".encode())


def test_words_are_encoded_by_the_merges_in_their_order():
    merges = [line.split(" ") for line in TOKENIZER.vocabulary.splitlines()]
    for word in ("lowest", "widest", "newer", "slow"):
        parts = list(word)
        while ranks := [merges.index(list(p)) for p in pairwise(parts) if list(p) in merges]:
            left, right = merges[min(ranks)]
            at = list(pairwise(parts)).index((left, right))
            parts[at : at + 2] = [left + right]
        assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode(word)] == parts
    assert TOKENIZER.encode("low").size == 1 and TOKENIZER.encode(" 漢字").size == 1


def test_training_gives_the_same_merges_in_another_process():
    code = (
        "from gpt_lightning.data.bpe import BPETokenizer\n"
        f"print(BPETokenizer.train([{TEXT!r}], 300).vocabulary.encode().hex())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert bytes.fromhex(found.stdout).decode() == BPETokenizer.train([TEXT], 300).vocabulary


@pytest.mark.parametrize(
    ("size", "expected"), [(256, 256), (260, 260), (100_000, TOKENIZER.vocab_size)]
)
def test_the_size_limits_the_vocabulary(size, expected):
    assert BPETokenizer.train([TEXT], size).vocab_size <= max(size, expected)
    assert size > 300 or BPETokenizer.train([TEXT], size).vocab_size == expected
    with pytest.raises(UserError, match="max_vocab_size=255 must be at least 256"):
        BPETokenizer.train([TEXT], 255)


def test_two_merges_may_make_the_same_token():
    tokenizer = BPETokenizer("a b\nb c\nab c\na bc")
    assert tokenizer.vocab_size == 256 + 3
    assert tokenizer.decode(tokenizer.encode("abcab")) == "abcab"


def test_the_bytes_are_spelled_as_in_gpt2():
    assert BYTE_CHARACTERS[ord("a")] == "a" and BYTE_CHARACTERS[ord(" ")] == "Ġ"
    assert BYTE_CHARACTERS[ord("\n")] == "Ċ" and len(set(BYTE_CHARACTERS)) == 256


def test_a_lone_surrogate_becomes_a_question_mark():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800")) == "a?"


@pytest.mark.parametrize("vocabulary", ["ab", "a  b", "a b c", "ab c", "a \n", "\n", None, ["a b"]])
def test_a_line_that_is_no_merge_is_refused(vocabulary):
    with pytest.raises(UserError, match="^vocabulary: .* is not a merge"):
        BPETokenizer(vocabulary)


def test_without_the_package_a_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r'needs .*: pip install -e "\.\[bpe\]"'):
        BPETokenizer("")
