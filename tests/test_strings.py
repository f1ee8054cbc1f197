"""Stop strings and banned strings against a search in the whole text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_lightning.data.tokenizers import KINDS, ByteTokenizer, tokenizer_from_state
from gpt_lightning.errors import UserError
from gpt_lightning.generation.strings import BannedStrings, StopStrings

quick = settings(max_examples=200, deadline=None)
short_texts = st.text("abé", min_size=1, max_size=4)


@quick
@given(st.lists(st.text("abé", max_size=3), max_size=12), st.lists(short_texts, min_size=1))
def test_a_text_ends_after_the_first_stop_string_however_it_is_split(pieces, stop):
    text, decode = "".join(pieces), StopStrings(lambda token: pieces[token], stop)
    ends = [text.find(string) + len(string) for string in stop if string in text]
    found = [decode(token) for token in range(len(pieces))]
    assert "".join(found) == text[: min(ends, default=len(text))]
    assert decode.ended is bool(ends)


@quick
@given(
    tokens=st.lists(short_texts, min_size=1, max_size=8, unique=True),
    strings=st.lists(short_texts, min_size=1, max_size=4),
    ids=st.lists(st.integers(0, 7), max_size=10),
)
def test_banned_tokens_are_those_that_would_complete_a_string(tokens, strings, ids):
    banned = BannedStrings(strings, [token.encode() for token in tokens], B=2)
    text = ""
    for i in [None, *ids]:
        if i is not None:
            i %= len(tokens)
            banned.add([i, i])
            text += tokens[i]
        if any(string in text for string in strings):
            return  # not possible if the mask is followed
        expected = [any(string in text + token for string in strings) for token in tokens]
        if all(expected):
            with pytest.raises(UserError, match="^ban=.* leaves no token"):
                banned.mask()
        else:
            assert banned.mask().tolist() == [expected] * 2


def test_a_banned_character_of_several_bytes():
    tokenizer = ByteTokenizer()
    banned = BannedStrings(["é", "b"], tokenizer.bytes_of_tokens(), B=1)
    first, second = tokenizer.encode("é").tolist()
    assert torch.nonzero(banned.mask()[0]).flatten().tolist() == [ord("b")]
    banned.add([first])
    assert torch.nonzero(banned.mask()[0]).flatten().tolist() == [ord("b"), second]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_text_are_those_of_its_tokens(kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    vocabulary = {"char": "\n abé🙃", "word": '["\\n", " ", "a", "b", "é", "🙃", "ab"]'}
    tokenizer = tokenizer_from_state({"kind": kind, "vocabulary": vocabulary.get(kind, "")})
    text, tokens = "ab é\n🙃 aab", tokenizer.bytes_of_tokens()
    assert len(tokens) == tokenizer.vocab_size
    assert b"".join(tokens[i] for i in tokenizer.encode(text)) == text.encode()
