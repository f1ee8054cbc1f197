"""Where windows start: permutations, phases, splits, and exact batches."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gpt_lightning.data.windows import (
    RandomWindows,
    SlidingWindows,
    exact_windows,
    first_tokens,
    permute,
    split_spans,
)

quick = settings(max_examples=60, deadline=None)


def epoch_of(source, epoch):
    """The starts of one epoch, as a list."""
    return source.starts(np.arange(len(source)) + epoch * len(source)).tolist()


def chi_square(counts) -> float:
    """Distance of counts from equal ones, as a standard normal value (Wilson and Hilferty)."""
    counts = np.asarray(counts, float)
    expected, free = counts.sum() / len(counts), len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))


@st.composite
def some_spans(draw):
    """Spans in order, with gaps between some of them; at least one holds a window."""
    block_size = draw(st.integers(1, 9))
    spans, at = [], 0
    for _ in range(draw(st.integers(1, 4))):
        at += draw(st.integers(0, 5))
        size = draw(st.integers(1, 60))
        spans.append((at, at + size))
        at += size
    assume(any(stop - start > block_size for start, stop in spans))
    return spans, block_size


# --- permute --------------------------------------------------------------------------------------


@quick
@given(n=st.integers(1, 3000), keys=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3))
def test_permute_is_a_permutation_for_any_size_and_keys(n, keys):
    assert sorted(permute(np.arange(n), n, *keys).tolist()) == list(range(n))


def test_permute_takes_a_key_for_each_element():
    index, keys = np.tile(np.arange(50), 2), np.repeat([3, 4], 50)
    orders = [permute(np.arange(50), 50, key).tolist() for key in (3, 4)]
    assert permute(index, 50, keys).tolist() == orders[0] + orders[1]
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 10  # unrelated orders


def test_permute_moves_an_element_to_every_place_equally_often():
    n = 20
    for index in (0, 7, 19):
        where = permute(np.full(20000, index), n, np.arange(20000))
        assert chi_square(np.bincount(where, minlength=n)) < 4


# --- sliding windows ------------------------------------------------------------------------------

# the starts for seed 0, 20 characters, windows of 4: a change here changes every run
PINNED = [[12, 0, 8, 4], [13, 9, 1, 5], [10, 14, 6, 2], [0, 4, 8, 12]]


def test_starts_on_a_tiny_text_are_pinned():
    source = SlidingWindows([(0, 20)], block_size=4, stride=4, seed=0)
    assert len(source) == 4
    assert [epoch_of(source, epoch) for epoch in range(4)] == PINNED
    source = RandomWindows([(0, 20), (30, 40)], block_size=4, seed=0)
    assert source.starts(np.arange(10)).tolist() == [14, 3, 11, 35, 8, 1, 35, 1, 11, 35]


@quick
@given(case=some_spans(), stride=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_an_epoch_is_a_grid_at_the_stride_within_each_span(case, stride, seed):
    spans, block_size = case
    source = SlidingWindows(spans, block_size, stride, seed)
    for epoch in (0, 1, 5):
        starts = sorted(epoch_of(source, epoch))
        assert len(starts) == len(source)
        for start, stop in spans:
            own = [s for s in starts if start <= s and s + block_size + 1 <= stop]
            starts = [s for s in starts if s not in own]
            if stop - start <= block_size:
                assert own == []
                continue
            assert own == list(range(own[0], own[-1] + 1, stride))  # each window once
            first, end = own[0] - start, own[-1] + block_size + 1
            assert first < stride and first + stop - end <= 2 * stride - 2  # little is left out
        assert starts == []  # no window left its span


def test_over_epochs_every_character_is_seen_at_every_position():
    source = SlidingWindows([(0, 50)], block_size=5, stride=5, seed=3)
    places = {i: set() for i in range(50)}
    for epoch in range(100):
        for start in epoch_of(source, epoch):
            for place in range(5):
                places[start + place].add(place)
    assert all(places[i] == set(range(5)) for i in range(5, 44))
    assert chi_square(np.bincount([min(epoch_of(source, e)) for e in range(500)])) < 4


@pytest.mark.parametrize(
    "source",
    [SlidingWindows([(0, 40), (50, 83)], 4, 3, 5), RandomWindows([(0, 40), (50, 83)], 4, 5)],
)
def test_starts_do_not_depend_on_how_numbers_are_grouped(source):
    numbers = np.random.default_rng(0).permutation(4 * len(source))
    one_by_one = [int(source.starts(np.array([n]))[0]) for n in numbers]
    assert source.starts(numbers).tolist() == one_by_one


@pytest.mark.parametrize("spans", [[(0, 4)], [(0, 3), (10, 14)], []])
def test_spans_too_short_for_a_window_have_none(spans):
    assert len(SlidingWindows(spans, 4, 4, 0)) == len(RandomWindows(spans, 4, 0)) == 0


# --- random windows -------------------------------------------------------------------------------


def test_random_windows_are_uniform_over_all_starts():
    source = RandomWindows([(0, 24), (30, 34), (40, 45), (50, 70)], block_size=4, seed=11)
    starts = source.starts(np.arange(40000))
    possible = [*range(20), 40, *range(50, 66)]  # the last window ends with its span
    assert sorted(set(starts.tolist())) == possible
    assert chi_square([np.count_nonzero(starts == s) for s in possible]) < 4


@quick
@given(case=some_spans(), seed=st.integers(0, 2**40))
def test_random_windows_stay_in_their_spans(case, seed):
    spans, block_size = case
    source = RandomWindows(spans, block_size, seed)
    for s in source.starts(np.arange(200)).tolist():
        assert any(start <= s and s + block_size + 1 <= stop for start, stop in spans)
    whole = sum((stop - start - 1) // block_size for start, stop in spans)
    assert len(source) == whole  # windows that do not overlap


# --- split ----------------------------------------------------------------------------------------


def test_tail_is_the_split_of_the_lecture():
    for length in [*range(100, 400), 1115394]:
        n = int(0.9 * length)
        assert split_spans(length, "tail", 0.1, 8) == ([(0, n)], [(n, length)])


def test_blocks_on_a_small_text_are_pinned():
    # 200 characters, a fifth of them held out in 40 // (16 * 2) = 1 block, in the middle
    assert split_spans(200, "blocks", 0.2, 1) == ([(0, 80), (120, 200)], [(80, 120)])
    # 400: 80 // 32 = 2 blocks
    train, val = split_spans(400, "blocks", 0.2, 1)
    assert train == [(0, 80), (120, 280), (320, 400)] and val == [(80, 120), (280, 320)]


@settings(max_examples=300, deadline=None)
@example(length=643, split="blocks", fraction=0.9921875, block_size=1)
@given(
    length=st.integers(1, 20000),
    split=st.sampled_from(["tail", "blocks"]),
    fraction=st.one_of(st.floats(0.001, 0.999), st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.5, 1])),
    block_size=st.one_of(st.integers(1, 8), st.integers(1, 300)),
)
def test_split_partitions_the_text(length, split, fraction, block_size):
    train, val = split_spans(length, split, fraction, block_size)
    pieces = [i for span in sorted(train + val) for i in range(*span)]
    assert pieces == list(range(length))
    held_out = sum(stop - start for start, stop in val)
    asked = length - int(length * (1 - fraction))
    assert held_out == asked or (fraction > 0.9 and asked - len(val) < held_out < asked)
    if split == "blocks" and len(val) > 1:
        assert len(val) <= 20
        assert all(stop - start >= 16 * (block_size + 1) for start, stop in val)


# --- exact batches --------------------------------------------------------------------------------


def exact(spans, block_size, stride, batch_size):
    batches = exact_windows(spans, block_size, stride, batch_size)
    return [(starts.tolist(), length, skipped) for starts, length, skipped in batches]


def test_exact_windows_of_a_tiny_text_are_pinned():
    spans = [(0, 10), (20, 25), (30, 31), (40, 43)]
    batches = [([0, 4], 4, 0), ([8], 1, 0), ([20], 4, 0), ([40], 2, 0)]
    assert exact(spans, 4, 4, 3) == batches
    assert exact([(0, 14)], 4, 4, 2) == [([0, 4], 4, 0), ([8], 4, 0), ([12], 1, 0)]
    assert exact([(0, 10)], 4, 3, 5) == [([0], 4, 0), ([3], 4, 1), ([6], 3, 1)]


@quick
@given(case=some_spans(), batch_size=st.integers(1, 5))
def test_exact_windows_predict_every_token_but_the_first_of_each_span_once(case, batch_size):
    spans, block_size = case
    predicted = []
    for starts, length, skipped in exact(spans, block_size, block_size, batch_size):
        assert 1 <= len(starts) <= batch_size and 1 <= length <= block_size and skipped == 0
        predicted += [start + 1 + i for start in starts for i in range(length)]
    assert predicted == [i for start, stop in spans for i in range(start + 1, stop)]


@pytest.mark.parametrize("span", [(0, 203), (3, 4), (5, 9), (5, 14), (5, 30)])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_each_token_is_predicted_once_with_the_context_that_the_stride_promises(span, stride):
    seen = []
    for starts, length, skipped in exact([span], 8, stride, 5):
        for start in starts:
            assert span[0] <= start and start + length < span[1] and length <= 8
            for target in range(start + skipped + 1, start + length + 1):
                assert target - start > min(8 - stride, target - span[0] - 1)
                seen.append(target)
    assert seen == list(range(span[0] + 1, span[1]))


@quick
@given(case=some_spans(), most=st.integers(2, 250))
def test_first_tokens_keeps_the_first_tokens_of_the_spans(case, most):
    spans, _ = case
    held_out = [i for span in spans for i in range(*span)][:most]
    own = [[i for i in held_out if start <= i < stop] for start, stop in spans]
    found = [list(range(*span)) for span in first_tokens(spans, most)]
    assert found == [tokens for tokens in own if len(tokens) > 1]  # one alone predicts nothing


# --- texts of many billions of tokens -------------------------------------------------------------

FAR = 2**33  # beyond what 32 bits hold, signed or not


@pytest.mark.parametrize("block_size", [1, 128])
def test_windows_of_a_text_of_billions_of_tokens_are_in_place(block_size):
    spans = [(7, FAR), (FAR + 1000, 3 * FAR)]
    sliding = SlidingWindows(spans, block_size, block_size, seed=3)
    numbers = np.arange(len(sliding) - 10_000, len(sliding) + 10_000)  # the end of an epoch
    for epoch in sliding.starts(numbers).reshape(2, 10_000):
        assert len(np.unique(epoch)) == 10_000 and epoch.max() > 2 * FAR
        within = [(start <= epoch) & (epoch < stop - block_size) for start, stop in spans]
        assert np.all(within[0] ^ within[1])
        for (start, stop), inside in zip(spans, within, strict=True):
            assert len(np.unique(epoch[inside] % block_size)) == 1  # one phase
            assert abs(inside.mean() - (stop - start) / (3 * FAR)) < 0.02


def test_permute_is_a_permutation_of_a_million():
    n = 2**20 + 1  # just above a power of four, where most walks are long
    found = permute(np.arange(n), n, 1337, 0)
    assert np.array_equal(np.bincount(found, minlength=n), np.ones(n))
