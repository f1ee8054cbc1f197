"""Counts, shared passages and n-gram entropies, against brute force and closed forms."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpt_lightning.data import statistics
from gpt_lightning.data.statistics import (
    compare_end,
    count_characters,
    end_message,
    ngram_entropies,
    overlap,
    repeated_message,
    sample,
)


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("latin-1"), np.uint8)


def sentences(words: str, n: int, seed: int) -> str:
    """`n` characters of sentences that a seed draws from the words."""
    draw = np.random.default_rng(seed)
    parts = (" ".join(draw.choice(words.split(), 8)) + ".\n" for _ in range(n))
    return "".join(parts)[:n]


ENGLISH = "the of and to in that is was for it with as his on be at by had not are but from or"
GERMAN = "der und die zu den das nicht von sie ist des sich mit dem ein es auf eine als auch zum"


# --- characters -----------------------------------------------------------------------------------


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=20)))
def test_characters_and_lines_are_counted_in_any_chunks(chunks):
    text = "".join(chunks)
    found = count_characters(chunks)
    assert found.counts == Counter(text)
    assert list(found.counts.values()) == sorted(found.counts.values(), reverse=True)
    assert found.total == len(text) and found.utf8_bytes == len(text.encode())
    lines = text.split("\n")[: -1 if text.endswith("\n") or not text else None]
    assert found.lines == len(lines)
    if lines:
        longest = max(map(len, lines))
        assert found.longest == longest
        assert found.longest_line == 1 + [len(line) for line in lines].index(longest)


def test_letters_are_counted_by_script():
    found = count_characters(["Ωmega, мир 42"])
    assert found.scripts() == {"LATIN": 4, "CYRILLIC": 3, "GREEK": 1}


# --- repeated passages ----------------------------------------------------------------------------


def brute_force_overlap(text, train, val, length):
    """The share, and the length of the longest shared passage of at least `length`."""
    known = {text[i : i + n] for a, b in train for i in range(a, b) for n in range(1, b - i + 1)}
    repeated = [
        text[i - length : i] in known for a, b in val for i in range(a + length, b)
    ]  # positions with `length` predecessors
    passages = {text[i : i + n] for a, b in val for i in range(a, b) for n in range(1, b - i + 1)}
    longest = max(map(len, known & passages), default=0)
    share = sum(repeated) / len(repeated) if repeated else 0.0
    return share, longest if longest >= length else 0


@settings(deadline=None)
@given(
    st.text(alphabet="ab", min_size=3, max_size=60),
    st.lists(st.integers(0, 60), min_size=3, max_size=3, unique=True),
    st.integers(1, 6),
    st.booleans(),
)
def test_overlap_is_that_of_brute_force(text, cuts, length, small_chunks):
    a, b, c = sorted(cut * len(text) // 60 for cut in cuts)
    assume(a < b < c)
    train, val = [(0, a), (b, c)], [(a, b), (c, len(text))]
    with pytest.MonkeyPatch.context() as patch:
        if small_chunks:
            patch.setattr(statistics, "CHUNK", 3)
        found = overlap(ids_of(text), train, val, length=length)
    share, longest = brute_force_overlap(text, train, val, length)
    assert found.share == pytest.approx(share)
    # A shared passage may stand only at the end of a span, where no position follows.
    assert found.length == longest
    if longest:
        passages = [text[i : i + longest] for i in (found.val_start, found.train_start)]
        assert passages[0] == passages[1]
        for start, spans in ((found.val_start, val), (found.train_start, train)):
            assert any(first <= start and start + longest <= stop for first, stop in spans)


def test_a_text_that_repeats_itself_is_reported():
    text = sentences(ENGLISH, 3000, 0) * 12
    n = len(text) - 3600
    found = overlap(ids_of(text), [(0, n)], [(n, len(text))])
    assert found.share == 1 and found.length == 3600
    assert repeated_message(found).startswith("100% of the validation text repeats")


def test_a_passage_planted_across_the_split_is_found_with_its_places():
    text = sentences(ENGLISH, 40000, 1)
    text = text[:38000] + "#" + text[5000:5700] + "#" + text[38702:]
    found = overlap(ids_of(text), [(0, 36000)], [(36000, 40000)])
    assert (found.length, found.val_start, found.train_start) == (700, 38001, 5000)
    assert found.share == pytest.approx((700 - 49) / (4000 - 50))


def test_the_thue_morse_word_has_no_false_repetitions():
    word = np.array([bin(i).count("1") & 1 for i in range(1 << 14)], np.uint8)
    val = (1 << 13, 1 << 14)  # the second half is the complement of the first
    found = overlap(word, [(0, 1 << 13)], [val], length=1024)
    text = bytes(word + 97).decode()
    starts = range(val[0], val[1] - 1024)
    share = np.mean([text[i : i + 1024] in text[: 1 << 13] for i in starts])
    assert found.share == pytest.approx(share)


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


def test_entropies_of_a_uniform_text_are_the_logarithm_of_its_vocabulary():
    ids = np.random.default_rng(0).integers(0, 8, 100_000)
    (row,) = ngram_entropies(ids, 8, [[(90_000, 100_000)]], 2)
    assert row == pytest.approx(math.log(8), abs=2e-3)


# --- the end --------------------------------------------------------------------------------------


def test_an_end_in_another_language_is_reported_and_a_clean_text_is_not():
    english, german = sentences(ENGLISH, 20000, 2), sentences(GERMAN, 2000, 3)
    for text, unlike in ((english, False), (english[:18000] + german, True)):
        found = compare_end(ids_of(text), 256, (0, 18000), (18000, 20000), 128)
        assert found.is_unlike == unlike == bool(end_message(found))
        repeated = overlap(ids_of(text), [(0, 18000)], [(18000, 20000)])
        assert not repeated_message(repeated)


def test_the_message_gives_the_ratio_to_the_blocks():
    text = sentences(ENGLISH, 18000, 2) + sentences(GERMAN, 2000, 3)
    found = compare_end(ids_of(text), 256, (0, 18000), (18000, 20000), 128)
    ratio = float(re.search(r"([\d.]+) times", end_message(found))[1])
    assert ratio == pytest.approx(found.end / found.blocks, abs=0.05)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9])
def test_the_end_is_compared_at_any_split(fraction):
    ids = ids_of(sentences(ENGLISH, 5000, 4))
    n = round(len(ids) * (1 - fraction))
    found = compare_end(ids, 256, (0, n), (n, len(ids)), 128)
    assert 1 <= len(found.others) <= 9 and not found.is_unlike


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 100))
def test_a_sample_lies_within_its_spans(a, b, most):
    spans = [(0, a), (a + 7, a + 7 + b)]
    kept = sample(spans, most)
    assert sum(stop - start for start, stop in kept) <= max(most, 0) or kept == spans
    assert kept == sorted(kept)
    for start, stop in kept:
        assert any(first <= start <= stop <= last for first, last in spans)
