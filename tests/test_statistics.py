"""Repeated passages and n-gram entropies, against brute force and closed forms."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpt_lightning.data.statistics import ngram_entropies, repeated_passages, split_messages


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("latin-1"), np.uint8)


def sentences(words: str, n: int, seed: int) -> str:
    """`n` characters of sentences that a seed draws from the words."""
    draw = np.random.default_rng(seed)
    parts = (" ".join(draw.choice(words.split(), 8)) + ".\n" for _ in range(n))
    return "".join(parts)[:n]


ENGLISH = "the of and to in that is was for it with as his on be at by had not are but from or"
GERMAN = "der und die zu den das nicht von sie ist des sich mit dem ein es auf eine als auch zum"


# --- repeated passages ----------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.text(alphabet="ab", min_size=3, max_size=60),
    st.lists(st.integers(0, 60), min_size=3, max_size=3, unique=True),
    st.integers(1, 6),
)
def test_repeated_passages_are_those_of_brute_force(text, cuts, shortest):
    a, b, c = sorted(cut * len(text) // 60 for cut in cuts)
    assume(a < b < c)
    train, val = [(0, a), (b, c)], [(a, b), (c, len(text))]
    windows = [i for first, stop in val for i in range(first, stop - shortest + 1)]
    repeated = {
        i
        for i in windows
        if any(text[i : i + shortest] in text[first:stop] for first, stop in train)
    }
    found, share = repeated_passages(ids_of(text), train, val, shortest)
    assert share == pytest.approx(len(repeated) / max(1, len(windows)))
    for length, ours, theirs in found:
        assert text[ours : ours + length] == text[theirs : theirs + length]
        for start, spans in ((ours, val), (theirs, train)):
            assert any(first <= start and start + length <= stop for first, stop in spans)
    assert repeated == {i + j for n, i, _ in found for j in range(n - shortest + 1)}


def test_a_text_that_repeats_itself_is_one_passage():
    text = sentences(ENGLISH, 3000, 0) * 12
    n = len(text) - 3600
    found, share = repeated_passages(ids_of(text), [(0, n)], [(n, len(text))])
    assert share == 1 and [passage.length for passage in found] == [3600]


def test_a_passage_planted_across_the_split_is_found_with_its_places():
    text = sentences(ENGLISH, 40000, 1)
    text = text[:38000] + "#" + text[5000:5700] + "#" + text[38702:]
    found, share = repeated_passages(ids_of(text), [(0, 36000)], [(36000, 40000)])
    assert found == [(700, 38001, 5000)]
    assert share == pytest.approx((700 - 49) / (4000 - 49))


def test_tokens_of_two_bytes_are_compared_as_tokens():
    ids = np.array([1, 256, 1, 256, 256, 1, 0, 1], np.uint16)  # the bytes 1 0, 0 1, ...
    found, share = repeated_passages(ids, [(0, 4)], [(4, 8)], shortest=2)
    assert found == [(2, 4, 1)] and share == pytest.approx(1 / 3)


# --- n-gram models --------------------------------------------------------------------------------


def witten_bell(text, at, order, vocab_size, held_out):
    """P of the token at `at`, from its definition."""
    if order == 0:
        return 1 / vocab_size
    lower = witten_bell(text, at, order - 1, vocab_size, held_out)
    context = text[at - order + 1 : at]
    followers = Counter(
        text[i]
        for i in range(order - 1, len(text))
        if i not in held_out and text[i - order + 1 : i] == context
    )
    if not followers:
        return lower
    n, distinct = sum(followers.values()), len(followers)
    return (followers[text[at]] + distinct * lower) / (n + distinct)


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="abc", min_size=12, max_size=40))
def test_ngram_entropies_are_those_of_the_definition(text):
    ids, n = ids_of(text) - 97, len(text)
    parts = [[(n - 4, n)], [(5, 7), (8, 10)]]
    found = ngram_entropies(ids, 3, parts, 4)
    for part, row in zip(parts, found, strict=True):
        held_out = {9 + i for span in part for i in range(*span)}
        for order, nats in enumerate(row, 1):
            skipped = held_out | set(range(9))  # the start of the text is a context of its own
            costs = [
                -math.log(witten_bell("^" * 9 + text, at, order, 3, skipped)) for at in held_out
            ]
            assert nats == pytest.approx(np.mean(costs))


def test_ngram_entropies_reach_the_entropy_of_a_markov_chain():
    # From each state one of two: a chain whose entropy rate is that of its coin.
    draw = np.random.default_rng(0)
    ids = np.zeros(200_000, np.int64)
    for i, coin in enumerate(draw.random(len(ids) - 1) < 0.9, 1):
        ids[i] = (3 * ids[i - 1] + 1 + coin) % 5
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    (row,) = ngram_entropies(ids, 5, [[(180_000, 200_000)]], 3)
    # The coin of 20,000 tokens has a standard error of 0.005 nats.
    assert row[1:] == pytest.approx(entropy, abs=0.02)
    assert row[0] > 1.5  # without context all five are about equally likely: log 5 = 1.609


# --- warnings -------------------------------------------------------------------------------------


def test_a_split_is_warned_about_for_an_end_in_another_language_and_for_repetitions():
    english, german = sentences(ENGLISH, 20000, 2), sentences(GERMAN, 2000, 3)
    repeated = english[:18000] + english[:2000]
    for text, warning in (
        (english, None),
        (english[:18000] + german, "the end of the text"),
        (repeated, "100% of the validation text repeats"),
    ):
        spans = [(0, 18000)], [(18000, 20000)]
        messages = split_messages(ids_of(text), 256, *spans, 128, is_tail=True)
        assert len(messages) == (warning is not None)
        assert all(message.startswith(warning) for message in messages)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9])
def test_any_split_of_a_clean_text_is_accepted(fraction):
    ids = ids_of(sentences(ENGLISH, 5000, 4))
    n = round(len(ids) * (1 - fraction))
    assert split_messages(ids, 256, [(0, n)], [(n, len(ids))], 128, is_tail=True) == []
