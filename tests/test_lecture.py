"""The lecture's models equal the lecture's own code, rung by rung (`lecture_oracle.py`)."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import perturbed, seeded
from lecture_oracle import LADDER, copy_named, from_rung, oracle_of
from torch import nn

from gpt_lightning.config_files import load_config
from gpt_lightning.errors import UserError
from gpt_lightning.model import CONFIGS, build_model, num_parameters
from gpt_lightning.model.lecture import Bigram, BigramConfig, LectureConfig, LectureGPT

SHAPES = [
    dict(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8),
    dict(vocab_size=65, block_size=16, n_layer=3, n_head=4, n_embd=32),
    dict(vocab_size=2, block_size=5, n_layer=2, n_head=3, n_embd=12, bias=False),
    dict(vocab_size=65, block_size=16, n_layer=2, n_head=8, n_embd=8),  # heads of size 1
]
SMALL = dict(vocab_size=11, block_size=6, n_layer=1, n_head=2, n_embd=8)
CONFIGS_FOLDER = Path(__file__).parent.parent / "configs/lecture"
RUNGS = sorted(path.stem for path in CONFIGS_FOLDER.glob("*.yaml"))
SWITCHES = dict(scaled=False, ffwd=1, residual=False, proj=False, norm=False)


def random_model(name="lecture", noise=0.3, **settings) -> nn.Module:
    """A model in eval mode, every weight moved away from its initial value."""
    torch.manual_seed(3)
    return perturbed(build_model(CONFIGS[name](**settings)), noise)


def some_ids(vocab_size, *shape) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=seeded(5))


def rung(name, noise=0.15, **settings) -> tuple[nn.Module, nn.Module]:
    """Our model as the rung's config describes it, and the lecture's with the same weights."""
    config = load_config(CONFIGS_FOLDER / f"{name}.yaml")
    found = config.get("data", {}) | config["model"]
    if name == "13_scaled_up_gpu":
        found |= {"block_size": 16, "n_embd": 48}  # small enough for a test
    kind = found.pop("name")
    # small weights: without a norm, weights of 0.3 would give logits of 800
    found |= {"vocab_size": 11, "init_std": 0.02, **settings}
    fields = {field.name for field in dataclasses.fields(CONFIGS[kind])}
    model = random_model(kind, noise, **{k: v for k, v in found.items() if k in fields})
    V, T = model.config.vocab_size, model.config.block_size
    C, n_head = found.get("n_embd", 0), found.get("n_head", 1)
    oracle = LADDER[name](V, T, C)
    copy_named(from_rung(oracle, model.state_dict(), n_head), oracle)
    return model, oracle.eval()


def dropping(p):
    """A replacement of F.dropout that drops the same elements of every tensor of a shape."""

    def drop(x, p_=0.5, training=True, inplace=False):
        assert p_ == p
        if not training or p == 0:
            return x
        if x.dim() == 4:  # (B, H, T, T): one head at a time, as in the oracle
            return torch.stack([drop(head, p) for head in x.unbind(1)], dim=1)
        generator = torch.Generator().manual_seed(
            sum(size * 31**i for i, size in enumerate(x.shape))
        )
        return x * (torch.rand(x.shape, generator=generator) >= p) / (1 - p)

    return drop


# --- equal to the lecture -------------------------------------------------------------------------


def assert_equal(model, oracle):
    """Equal logits at several lengths, and equal gradients of the loss."""
    V, block_size = model.config.vocab_size, model.config.block_size
    for T in (1, block_size // 2 + 1, block_size):
        ids = some_ids(V, 3, T)
        logits, expected = model(ids), oracle(ids)[0]
        assert logits.shape == (3, T, V)
        assert logits.std() > 0.1  # equality of constants would be trivial
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    targets = ids.roll(-1, dims=1)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    oracle(ids, targets)[1].backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    ours = from_rung(oracle, grads, getattr(model.config, "n_head", 1))
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=1e-12, msg=name)
        assert ours[name].abs().max() > 1e-8, name


@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_logits_and_gradients_equal_the_lecture(settings):
    model = random_model(**settings).double()
    assert_equal(model, oracle_of(model).double())


def test_configs_and_oracle_have_the_same_rungs():
    assert list(LADDER) == RUNGS


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", RUNGS)
def test_logits_and_gradients_of_every_rung_equal_the_lecture(name, fused):
    # gradients through the plain blocks are as small as 1e-7, so they are compared in float64
    model, oracle = (net.double() for net in rung(name, fused=fused))
    dropped = {module.p for module in oracle.modules() if isinstance(module, nn.Dropout)}
    assert {getattr(model.config, "dropout", 0.0)} == (dropped or {0.0})
    assert_equal(model, oracle)


# --- attention ------------------------------------------------------------------------------------


def test_attention_weights_equal_the_softmax_of_the_lecture_heads():
    model = random_model(**SHAPES[1])
    attention, x = model.blocks[0].sa, torch.randn(2, 16, 32)
    q, k, _ = attention.heads(x)
    heads = oracle_of(model).blocks[0].sa.heads
    for ours, head in zip(attention.weights(q, k).unbind(1), heads, strict=True):
        seen = []
        head.dropout.register_forward_hook(lambda module, args, wei, seen=seen: seen.append(wei))
        head(x)
        torch.testing.assert_close(ours, seen[0], rtol=0, atol=1e-6)
    unmasked = attention.weights(q, k, causal=False)
    assert unmasked.gt(0).all()
    torch.testing.assert_close(unmasked.sum(-1), torch.ones(2, 4, 16))


# --- bigrams by counting --------------------------------------------------------------------------

PIECES = ["abracadabra", "", "b", "bard", "crab"]  # over the letters a b c d r


def test_bigram_counts_pairs_within_each_piece_only():
    counts = Counter(pair for text in PIECES for pair in itertools.pairwise(text))
    assert counts["a", "b"] == 3 and counts["a", "c"] == 1  # counted by hand
    pieces = [torch.tensor(["abcdr".index(c) for c in text], dtype=torch.uint8) for text in PIECES]
    model = Bigram(BigramConfig(vocab_size=5, block_size=4)).count(pieces, smoothing=0.5)
    probs = model(torch.arange(5)[None])[0].exp()  # rows are normalized already
    torch.testing.assert_close(probs.sum(1), torch.ones(5))
    for i, first in enumerate("abcdr"):
        total = sum(counts[first, second] + 0.5 for second in "abcdr")
        for j, second in enumerate("abcdr"):
            assert probs[i, j].item() == pytest.approx((counts[first, second] + 0.5) / total)


def test_bigram_counts_a_large_vocabulary_from_uint8_ids():
    ids = torch.tensor([250, 199, 250, 199, 250], dtype=torch.uint8)
    model = Bigram(BigramConfig(vocab_size=256, block_size=4)).count([ids], smoothing=1e-3)
    assert model(ids[None].long())[0].argmax(1).tolist() == [199, 250, 199, 250, 199]


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_is_in_the_lecture_s_places(monkeypatch, fused):
    """With the same elements dropped, training mode gives the oracle's logits."""
    p = 0.3
    model = random_model(**SHAPES[1], dropout=p, fused=fused).train()
    oracle = oracle_of(model)
    drop = dropping(p)

    def attention(q, k, v, dropout_p=0.0, is_causal=False, scale=None):
        assert fused and is_causal and dropout_p == p
        T = q.shape[2]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        return drop(scores.softmax(-1), p) @ v

    monkeypatch.setattr(F, "dropout", drop)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    ids = some_ids(65, 3, 16)
    logits, expected = model(ids), oracle(ids)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (oracle.eval()(ids)[0] - expected).abs().max() > 0.1


# --- causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [SHAPES[1], {**SHAPES[1], **SWITCHES}, {**SHAPES[1], "fused": False}], ids=str
)
def test_changing_a_token_changes_no_earlier_logit(settings):
    V, T = settings["vocab_size"], settings["block_size"]
    model = random_model(**settings)
    ids = some_ids(V, 1, T)
    before = model(ids)
    for at in range(T):
        changed = ids.clone()
        changed[0, at] = (ids[0, at] + 1) % V
        after = model(changed)
        torch.testing.assert_close(after[0, :at], before[0, :at], rtol=0, atol=1e-6)
        for later in range(at, T):  # and it reaches every later one
            assert not torch.allclose(after[0, later], before[0, later], atol=1e-6)


# --- initialization -------------------------------------------------------------------------------


def test_initial_weights_have_the_given_standard_deviation():
    for std in (0.02, 0.1):
        torch.manual_seed(1)
        sizes = dict(n_layer=2, n_head=4, n_embd=128)
        model = LectureGPT(LectureConfig(vocab_size=300, block_size=200, init_std=std, **sizes))
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # five standard errors for the smallest of them
                assert abs(weight.std() / std - 1) < 0.03, name
                assert abs(weight.mean()) < 0.05 * std, name
            elif name.endswith("bias"):
                assert weight.eq(0).all(), name
            else:
                assert ".ln" in name or "ln_f" in name
                assert weight.eq(1).all(), name


def test_init_std_none_keeps_torch_s_initial_weights():
    torch.manual_seed(4)
    found = LectureGPT(LectureConfig(**SMALL, init_std=None)).state_dict()
    torch.manual_seed(4)
    expected = [nn.Embedding(11, 8).weight, nn.Embedding(6, 8).weight]
    expected += nn.LayerNorm(8).parameters()
    expected.append(nn.Linear(8, 24, bias=False).weight)
    expected += nn.Linear(8, 8).parameters()
    expected += nn.LayerNorm(8).parameters()
    expected += [*nn.Linear(8, 32).parameters(), *nn.Linear(32, 8).parameters()]
    expected += [*nn.LayerNorm(8).parameters(), *nn.Linear(8, 11).parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


# --- shape of the state ---------------------------------------------------------------------------

KEYS = {
    "token_embedding_table.weight": (11, 8),
    "position_embedding_table.weight": (6, 8),
    "blocks.0.ln1.weight": (8,),
    "blocks.0.ln1.bias": (8,),
    "blocks.0.sa.qkv.weight": (24, 8),
    "blocks.0.sa.proj.weight": (8, 8),
    "blocks.0.sa.proj.bias": (8,),
    "blocks.0.ln2.weight": (8,),
    "blocks.0.ln2.bias": (8,),
    "blocks.0.ffwd.net.0.weight": (32, 8),
    "blocks.0.ffwd.net.0.bias": (32,),
    "blocks.0.ffwd.net.2.weight": (8, 32),
    "blocks.0.ffwd.net.2.bias": (8,),
    "ln_f.weight": (8,),
    "ln_f.bias": (8,),
    "lm_head.weight": (11, 8),
    "lm_head.bias": (11,),
}


def test_state_dict_names_and_shapes_are_pinned():
    found = LectureGPT(LectureConfig(**SMALL)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == KEYS


@pytest.mark.parametrize(
    ("switches", "removed"),
    [
        (dict(bias=False), r"(?<!lm_head)\.bias"),
        (SWITCHES, r"\.proj\.|\.net\.2\.|ln1|ln2|ln_f"),
        (dict(ffwd=0), "ffwd|ln2"),
    ],
    ids=str,
)
def test_switches_remove_their_parameters(switches, removed):
    found = LectureGPT(LectureConfig(**SMALL, **switches)).state_dict()
    assert list(found) == [name for name in KEYS if not re.search(removed, name)]


def test_last_model_has_the_lecture_s_10_788_929_parameters():
    # 10.788929 M parameters is what the lecture's own script prints for Shakespeare's 65 characters
    sizes = dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384)
    with torch.device("meta"):
        assert num_parameters(LectureGPT(LectureConfig(**sizes))) == 10_788_929


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", -1),
        ("n_layer", -1),
        ("n_head", 0),
        ("n_embd", 9),
        ("ffwd", -1),
        ("dropout", 1.0),
        ("dropout", math.nan),
        ("init_std", -0.02),
        ("init_std", math.inf),
    ],
)
def test_config_rejects_values_out_of_range(name, value):
    for config in (LectureConfig, BigramConfig):
        if hasattr(config, name):
            with pytest.raises(UserError, match=f"^{name}={value} must be "):
                config(**{name: value})


def test_a_wide_feed_forward_requires_its_projection():
    with pytest.raises(UserError, match="^ffwd=2 requires proj=true"):
        LectureConfig(ffwd=2, proj=False)
    LectureConfig(ffwd=1, proj=False)
