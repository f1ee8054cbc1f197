"""Words as tokens: any text of known characters round-trips."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_lightning.data import words
from gpt_lightning.data.words import WordTokenizer
from gpt_lightning.errors import UserError

TEXT = "To be, or not to be:\n\nthat is the question -- Gemüt 😀, the the\n\n"
PROSE = st.text(st.sampled_from("aab  \n\t.,'é漢字😀\u0301\ud800"))


def trained(text=TEXT, size=10_000, unknown="error"):
    return WordTokenizer.train([text], "".join(sorted(set(text))), size, unknown)


def test_words_runs_of_space_and_punctuation_marks_are_tokens():
    tokenizer = trained()
    shown = [tokenizer.decode([i]) for i in tokenizer.encode("the be,  the\n\nbe--")]
    # "be" and "the" occur twice, as does the empty line; two spaces do not
    assert shown == ["the", " ", "be", ",", " ", " ", "the", "\n\n", "be", "-", "-"]


def test_the_most_frequent_words_follow_the_characters_up_to_the_size():
    tokens = json.loads(trained().vocabulary)
    characters = sorted(set(TEXT))
    assert tokens == [*characters, "the", "\n\n", "be"]
    assert json.loads(trained(size=len(characters) + 1).vocabulary) == tokens[:-2]
    with pytest.raises(UserError, match=f"max_vocab_size=5 is less than the {len(characters)} "):
        trained(size=5)


@given(PROSE.filter(bool), PROSE, st.integers(0, 9))
def test_any_text_of_known_characters_round_trips(seen, text, more):
    text = "".join(c for c in text if c in seen)  # other words of the same characters
    tokenizer = trained(seen, size=len(set(seen)) + more)
    ids = tokenizer.encode(text)
    stream = tokenizer.stream_decoder()
    assert ids.dtype == tokenizer.dtype == np.uint8
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert "".join(map(stream, ids)) + stream(None) == text
    for start in range(len(ids) + 1):
        span = ids[start:]
        assert tokenizer.count_characters(span) == len(tokenizer.decode(span))


@given(PROSE)
def test_every_character_is_in_one_token(text):
    assert "".join(words.WORDS.findall(text)) == text
    assert all(re.fullmatch(r"\w+|\s+|.", word) for word in words.WORDS.findall(text))


def test_rare_words_are_dropped_from_the_count_of_a_text_with_too_many(monkeypatch):
    monkeypatch.setattr(words, "MAX_COUNTED", 3)
    chunks = ["one one ", "two three ", "four five ", "one two two two "]
    tokens = json.loads(WordTokenizer.train(chunks, " efhnortuwiv", 99).vocabulary)
    expected = Counter("".join(chunks).split()).most_common(2)
    assert {word for word in tokens if len(word) > 1} == {word for word, _ in expected}


def test_unknown_characters_follow_the_policy():
    with pytest.raises(UserError, match=r"'ß' \(U\+00DF\) in 'the ß be'"):
        trained().encode("the ß be")
    for unknown, expected in (("drop", "the  be"), ("replace", "the ? be")):
        tokenizer = trained(TEXT + "?", unknown=unknown)
        assert tokenizer.decode(tokenizer.encode("the ß be")) == expected


def test_added_characters_follow_the_vocabulary():
    old = trained()
    grown = old.with_characters("ßtb")
    assert json.loads(grown.vocabulary) == [*json.loads(old.vocabulary), "ß"]
    assert grown.encode(TEXT).tolist() == old.encode(TEXT).tolist()


@pytest.mark.parametrize(
    "vocabulary", ["", "ab", "3", "{}", "[]", '["a", 3]', '["a", ""]', '["a", "a"]', '["ab"]', None]
)
def test_a_vocabulary_that_is_no_list_of_words_is_refused(vocabulary):
    with pytest.raises(UserError, match="^vocabulary="):
        WordTokenizer(vocabulary)
