"""Sampling against softmax in double precision, brute force and drawn frequencies."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_lightning.errors import UserError
from gpt_lightning.generation.sampling import Sampling, draw

quick = settings(max_examples=100, deadline=None)

# logits of a few tokens: distinct values, ties, and values far apart
some_logits = st.lists(
    st.one_of(st.floats(-8, 8, width=32), st.sampled_from([-30.0, 0.0, 1.0, 2.0])),
    min_size=1,
    max_size=12,
)


LARGEST = 1 - 2**-24  # that torch.rand draws in fp32


def uniform(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def softmax(logits, temperature=1.0):
    """Probabilities in double precision."""
    scaled = [x / temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    return [w / sum(weights) for w in weights]


def probabilities(logits, **kwargs):
    return Sampling(**kwargs).probabilities(torch.tensor([logits]))[0].tolist()


def kept(probs):
    return {i for i, p in enumerate(probs) if p > 0}


def renormalized(probs, keep):
    total = sum(probs[i] for i in keep)
    return [p / total if i in keep else 0.0 for i, p in enumerate(probs)]


@quick
@given(logits=some_logits, seed=st.integers(0, 2**63 - 1))
def test_temperature_0_takes_the_most_likely_for_every_seed(logits, seed):
    expected = max(range(len(logits)), key=lambda i: (logits[i], -i))  # the lowest id of a tie
    logits = torch.tensor([logits])
    assert Sampling(temperature=0).sample(logits, uniform(1, seed)).tolist() == [expected]
    probs = Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.1).probabilities(logits)
    assert probs[0].tolist() == [float(i == expected) for i in range(len(probs[0]))]


@quick
@given(logits=some_logits, temperature=st.floats(0.05, 20))
def test_temperature_divides_the_logits(logits, temperature):
    expected = softmax(logits, temperature)
    assert probabilities(logits, temperature=temperature) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_a_tiny_temperature_tends_to_the_most_likely(temperature):
    logits = [10.0, 30.0, 30.0, -1e30, 29.9]
    found = probabilities(logits, temperature=temperature)
    assert found == pytest.approx([0, 0.5, 0.5, 0, 0], abs=1e-30)


def test_huge_values_do_not_overflow():
    assert probabilities([1.0, 3.0, -5.0, 0.0], temperature=1.7e308) == pytest.approx([0.25] * 4)
    assert probabilities([1e38, -1e38, 1e38]) == [0.5, 0, 0.5]
    assert probabilities([0.0, -math.inf], temperature=0.1) == [1, 0]
    half = Sampling().probabilities(torch.tensor([[6e4, -6e4]], dtype=torch.float16))
    assert half.tolist() == [[1, 0]]


@quick
@given(logits=some_logits, top_k=st.integers(1, 15))
def test_top_k_keeps_exactly_k_also_with_ties(logits, top_k):
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))  # lower ids first among ties
    keep = set(order[:top_k])
    expected = renormalized(softmax(logits), keep)
    found = probabilities(logits, top_k=top_k)
    assert kept(found) == keep
    assert found == pytest.approx(expected, abs=1e-5)


@quick
@given(
    logits=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=7), top_p=st.floats(0.01, 1)
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, top_p):
    probs, found = softmax(logits), probabilities(logits, top_p=top_p)
    keep = kept(found)
    mass = sum(probs[i] for i in keep)
    tiny = 1e-5  # single precision
    assert mass >= top_p - tiny
    for size in range(len(keep)):  # every smaller set falls short
        for other in itertools.combinations(probs, size):
            assert sum(other) < top_p + tiny
    for other in itertools.combinations(probs, len(keep)):  # and no set of this size has more
        assert sum(other) <= mass + tiny
    assert found == pytest.approx(renormalized(probs, keep), abs=1e-5)


@quick
@given(logits=some_logits, min_p=st.floats(0.01, 1))
def test_min_p_keeps_that_fraction_of_the_most_likely(logits, min_p):
    probs, found = softmax(logits), probabilities(logits, min_p=min_p)
    keep = kept(found)
    for i, p in enumerate(probs):
        if abs(p - min_p * max(probs)) > 1e-6 * max(probs):  # rounding decides at the edge
            assert (i in keep) == (p > min_p * max(probs))
    assert found == pytest.approx(renormalized(probs, keep), abs=1e-5)


def test_each_filter_applies_to_what_the_previous_one_keeps():
    probs = [0.4, 0.3, 0.2, 0.1]
    logits = [math.log(p) for p in probs]
    # of three tokens the first has 4/9, so top_p = 0.44 needs one; of all four it would need two
    assert kept(probabilities(logits, top_k=3, top_p=0.44)) == {0}
    assert kept(probabilities(logits, top_p=0.44)) == {0, 1}
    # the temperature comes first: squared, the first has 16/30
    assert kept(probabilities(logits, temperature=0.5, top_p=0.5)) == {0}
    assert kept(probabilities(logits, top_p=0.5)) == {0, 1}
    assert kept(probabilities(logits, top_k=3, top_p=0.95, min_p=0.6)) == {0, 1}


def test_samples_of_a_batch_are_filtered_independently():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    sampling = Sampling(temperature=0.7, top_k=2, top_p=0.9, min_p=0.05)
    alone = [sampling.probabilities(row[None])[0] for row in logits]
    assert torch.equal(sampling.probabilities(logits), torch.stack(alone))
    assert torch.equal(logits[0], torch.tensor([0.0, 1.0, 2.0]))  # not changed in place


@pytest.mark.parametrize("V", [2, 65, 800])
def test_tokens_are_drawn_with_their_probabilities(V):
    """A chi-square test: its statistic has mean V - 1 and variance 2 (V - 1)."""
    logits, n = torch.randn(V, generator=torch.Generator().manual_seed(V)), 100 * V
    expected = n * torch.tensor(softmax(logits.tolist(), 1.3), dtype=torch.float64)
    drawn = torch.zeros(V)
    for numbers in uniform(n, 1).split(5000):
        ids = Sampling(temperature=1.3).sample(logits.expand(len(numbers), V), numbers)
        drawn += ids.bincount(minlength=V)
    statistic = ((drawn - expected) ** 2 / expected).sum().item()
    assert abs(statistic - (V - 1)) < 5 * math.sqrt(2 * (V - 1))


SOME_WEIGHTS = st.lists(st.floats(0, 1, width=32), max_size=6)


@quick
@given(
    weights=st.tuples(SOME_WEIGHTS, SOME_WEIGHTS).map(lambda w: [*w[0], 1.0, *w[1]]),
    u=st.integers(0, 2**24 - 1).map(lambda n: n * 2**-24) | st.sampled_from([0.0, LARGEST]),
)
def test_a_draw_is_the_first_token_whose_cumulative_sum_exceeds_u(weights, u):
    found = draw(torch.tensor([weights]), torch.tensor([u])).item()
    assert weights[found] > 0
    sums = list(itertools.accumulate(map(float, weights)))
    tiny = 1e-6 * sums[-1]  # single precision
    assert sums[found] > u * sums[-1] - tiny
    assert sums[found] - weights[found] <= u * sums[-1] + tiny


def test_the_ends_of_the_distribution_have_positive_weight():
    generator = torch.Generator().manual_seed(0)
    for V in (1, 3, 65, 60_000):
        weights = torch.rand(20, V, generator=generator) ** 8
        weights[:, V // 2 + 1 :] = 0  # what a filter removes
        weights[:, : V // 3] = 0
        for u in (0.0, LARGEST):
            ids = draw(weights, torch.full((20,), u))
            assert (weights.gather(1, ids[:, None]) > 0).all()
        assert (draw(weights, torch.zeros(20)) == V // 3).all()


def test_a_sample_depends_on_its_own_logits_and_number_only():
    logits, numbers = torch.randn(50, 9), uniform(50, 3)
    for sampling in (Sampling(), Sampling(0.7, top_k=4, top_p=0.9, min_p=0.1)):
        whole = sampling.sample(logits, numbers)
        alone = [sampling.sample(logits[i : i + 1], numbers[i : i + 1]) for i in range(50)]
        assert torch.equal(whole, torch.cat(alone))


@quick
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=9),
    penalty=st.floats(0.1, 10),
    window=st.lists(st.integers(0, 2), min_size=1, max_size=5),
)
def test_the_repetition_penalty_is_that_of_ctrl(logits, penalty, window):
    expected = [
        x if i not in window else x / penalty if x > 0 else x * penalty
        for i, x in enumerate(logits)
    ]
    sampling = Sampling(temperature=0.7, repetition_penalty=penalty)
    found = sampling.probabilities(torch.tensor([logits]), torch.tensor([window]))[0].tolist()
    assert found == pytest.approx(softmax(expected, 0.7), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_not_drawn(temperature):
    logits = torch.tensor([[5.0, 1.0, 1.0, 0.0]]).repeat(500, 1)
    banned = torch.tensor([[True, False, True, False]]).repeat(500, 1)
    ids = Sampling(temperature).sample(logits, uniform(500), banned=banned)
    assert set(ids.tolist()) == ({1} if temperature == 0 else {1, 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", 0.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_raise(name, value):
    with pytest.raises(UserError, match=f"^{name}={value} must be "):
        Sampling(**{name: value})


@pytest.mark.parametrize("row", [[0, math.nan, 1], [0, math.inf, 1], [-math.inf] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(row, temperature):
    logits = torch.tensor([[0.0, 1.0, 2.0], row])
    good, bad = Sampling(temperature=temperature).sample(logits, uniform(2)).tolist()
    assert good >= 0 and bad == -1
