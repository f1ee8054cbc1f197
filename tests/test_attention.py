"""Causal attention in both dtypes, and cached computation against the whole window."""

from unittest.mock import patch

import pytest
import torch
from conftest import perturbed, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_lightning.model import CONFIGS, build_model
from gpt_lightning.model.attention import FEW, STEP, KVCache, causal_attention

SIZES = dict(vocab_size=9, block_size=12, n_layer=3, n_head=2, n_embd=24)


def build(name, **sizes):
    torch.manual_seed(1337)
    return perturbed(build_model(CONFIGS[name](**{**SIZES, **sizes})))


def some_ids(B, T, seed=2):
    return torch.randint(9, (B, T), generator=seeded(seed))


CACHED = {
    "gpt": build("gpt", n_gram=5),
    "lecture": build("lecture"),
    "no layers": build("lecture", n_layer=0),
}


@pytest.mark.parametrize("name", CACHED)
@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    B=st.sampled_from([1, 3, FEW + 1]),
    step=st.sampled_from([5, STEP]),
    used=st.booleans(),
)
def test_logits_of_chunks_equal_those_of_the_whole_window(name, chunks, B, step, used):
    model = CACHED[name]
    T = min(sum(chunks), 12)
    ids, cache, found = some_ids(B, T), KVCache(12), []
    with torch.no_grad(), patch("gpt_lightning.model.attention.STEP", step):
        if used:  # a cache of length 0 is like a new one
            model(some_ids(B, 12, seed=8), cache)
            cache.length = 0
        for chunk in chunks:
            if cache.length < T:
                stop = min(cache.length + chunk, T)
                found.append(model(ids[:, :stop], cache))
                assert cache.length == stop
        torch.testing.assert_close(torch.cat(found, dim=1), model(ids), atol=1e-5, rtol=0)


def heads(B=2, H=3, T=9, D=8, dtype=torch.bfloat16, seed=0):
    drawn = torch.randn(3, B, H, T, D, generator=seeded(seed))
    return [part.to(torch.bfloat16).to(dtype).requires_grad_() for part in drawn]


@pytest.mark.parametrize(
    ("shape", "scale"), [({}, 1.0), (dict(T=1), 1.0), (dict(B=1, H=1, D=2, T=33), 0.35)], ids=str
)
def test_attention_in_bf16_is_close_to_fp32(shape, scale):
    narrow, wide = heads(**shape), heads(**shape, dtype=torch.float32)
    found, expected = causal_attention(*narrow, scale), causal_attention(*wide, scale)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    gradient = torch.randn(found.shape, generator=seeded(4))
    found.backward(gradient.bfloat16())
    expected.backward(gradient)
    for a, b in zip(narrow, wide, strict=True):
        assert (a.grad.float() - b.grad).norm() < 0.03 * (b.grad.norm() + 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_later_positions_have_no_effect(dtype, dropout):
    q, k, v = heads(dtype=dtype)

    def attend(k, v):
        torch.manual_seed(5)
        return causal_attention(q, k, v, 0.35, dropout)

    out = attend(k, v)
    assert out.isfinite().all()
    for t in range(8):
        later = torch.arange(9)[:, None] > t
        changed = attend(torch.where(later, k + 3, k), torch.where(later, v - 5, v))
        assert torch.equal(changed[:, :, : t + 1], out[:, :, : t + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_keeps_the_mean_of_attention(dtype):
    q, k, v = (part.detach() for part in heads(B=1, H=1, T=6, D=4, dtype=dtype))
    torch.manual_seed(0)
    many = [part.expand(4000, 1, 6, 4).contiguous() for part in (q, k, v)]
    found = causal_attention(*many, 0.5, 0.25).float()
    expected = causal_attention(q, k, v, 0.5).float()
    torch.testing.assert_close(found.mean(0, keepdim=True), expected, atol=0.06, rtol=0)
    # the first position has one weight, which is dropped or scaled up
    kept = found[:, 0, 0].abs().amax(-1) > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", ["gpt", "lecture"])
def test_a_model_in_mixed_precision_is_close_to_fp32(name):
    model, ids = build(name, n_embd=32), some_ids(4, 6)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert (found.float() - expected).norm() < 0.03 * expected.norm()
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
