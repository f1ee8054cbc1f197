import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model import build_config, build_model, model_settings
from gpt_lightning.model.attention import FEW, STEP, KVCache, causal_attention
from gpt_lightning.model.gpt import GPT, Block, GPTConfig
from gpt_lightning.model.lecture import LectureConfig

SIZES = dict(vocab_size=9, block_size=6, n_layer=2, n_head=2, n_embd=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perturbed(name="gpt", seed=3, **sizes):
    """A model none of whose weights are at their initial values, zeros least of all."""
    torch.manual_seed(seed)
    model = build_model(name, **{**SIZES, **sizes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def some_ids(B, T, vocab_size=9, seed=2):
    return torch.randint(vocab_size, (B, T), generator=seeded(seed))


def new_cache(model, B):
    return KVCache(model.config, B, torch.device("cpu"), torch.float32)


# --- the modern GPT once more, written out --------------------------------------------------------


def standard(x):
    """Mean 0 and variance 1 in every row."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def turned(x):
    """(T, D): the halves of a row are real and imaginary parts, which turn with the position."""
    T, D = x.shape
    speeds = torch.tensor([10_000.0 ** (-i / (D // 2)) for i in range(D // 2)]).double()
    angles = torch.arange(T).double()[:, None] * speeds
    z = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * torch.exp(1j * angles)
    return torch.cat([z.real, z.imag], dim=-1)


def reference(weights, config, ids):
    """Logits (T, V) of one text, a list of ids, in double precision."""
    w = {name: weight.double() for name, weight in weights.items()}
    V, C, H = config.vocab_size, config.n_embd, config.n_head
    D, T = C // H, len(ids)
    text = [ids[0]] * 20 + ids
    pairs = [(text[t - 1] * V + text[t]) % min(V * V, 32768) for t in range(20, T + 20)]
    x = w["token_embedding.weight"][ids] + w["pair_embedding.weight"][pairs]
    for n in range(3, config.n_gram + 1):
        numbers = [sum(text[t - i] * V**i for i in range(n)) for t in range(20, T + 20)]
        rows = [number % min(V**n, 16381) for number in numbers]
        x = x + w[f"ngram_embeddings.{n - 3}.weight"][rows]
    x = standard(x)
    for layer in range(config.n_layer):
        block = f"blocks.{layer}."
        wq, wk, wv = w[block + "attn.qkv.weight"].split(C)
        own = w[block + "attn.value_embedding.weight"][ids]
        h, heads = standard(x), []
        for head in range(H):
            its = slice(head * D, (head + 1) * D)
            q, k = turned(standard(h @ wq[its].T)), turned(standard(h @ wk[its].T))
            v = h @ wv[its].T + own[:, its]
            out = []
            for t in range(T):
                scores = torch.stack([q[t] @ k[s] / math.sqrt(D) for s in range(t + 1)])
                shares = scores.exp() / scores.exp().sum()
                out.append(sum(share * v[s] for s, share in enumerate(shares)))
            heads.append(torch.stack(out))
        x = x + torch.cat(heads, dim=-1) @ w[block + "attn.proj.weight"].T
        inside = torch.clamp(standard(x) @ w[block + "mlp.fc.weight"].T, min=0) ** 2
        x = x + inside @ w[block + "mlp.proj.weight"].T
    return standard(x) @ w["lm_head.weight"].T


SHAPES = [
    {},
    dict(n_head=1),
    dict(n_head=8),  # heads of two channels
    dict(block_size=1),
    dict(n_layer=1, n_embd=2, n_head=1),
    dict(vocab_size=1),
    dict(n_gram=2),
    dict(n_gram=5),
    dict(vocab_size=200, n_embd=4, n_layer=1),  # pairs share rows, and triples
    dict(n_layer=3, block_size=11, vocab_size=30, n_embd=12, n_head=3),
]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_logits_and_gradients_are_those_of_the_model_written_out(sizes):
    model = perturbed(**sizes)
    config = model.config
    ids = some_ids(2, config.block_size, config.vocab_size)
    targets = some_ids(2, config.block_size, config.vocab_size, seed=5)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = torch.stack([reference(weights, config, row) for row in ids.tolist()])
    logits = model(ids)
    assert logits.std() > 0.1 or config.vocab_size == 1
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=1e-4, rtol=1e-4, msg=name
        )


def test_a_shorter_text_is_a_shorter_window():
    model, ids = perturbed(), some_ids(2, 6)
    whole = model(ids)
    for T in range(1, 6):
        torch.testing.assert_close(model(ids[:, :T]), whole[:, :T], atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="7 tokens, block_size 6"):
        model(some_ids(1, 7))


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_at_first_every_token_is_as_likely(sizes):
    model = build_model("gpt", **{**SIZES, **sizes})
    V, T = model.config.vocab_size, model.config.block_size
    logits = model(some_ids(4, T, V))
    assert logits.shape == (4, T, V) and not logits.any()
    loss = F.cross_entropy(logits.flatten(0, 1), some_ids(4, T, V, seed=9).flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=1e-6)


def test_a_token_reaches_those_behind_it_and_none_before():
    model, ids = perturbed(block_size=8), some_ids(1, 8)
    whole = model(ids)
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 9
        moved = (model(changed) - whole).abs().amax(dim=-1)[0]
        assert (moved[:t] == 0).all(), t
        assert (moved[t:] > 1e-4).all(), t


def test_texts_of_a_batch_know_nothing_of_each_other():
    model, ids = perturbed(), some_ids(5, 6)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient():
    model = perturbed()
    logits = model(some_ids(4, 6))
    F.cross_entropy(logits.flatten(0, 1), some_ids(4, 6, seed=4).flatten()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_names_and_shapes_of_the_weights_stay():
    model = build_model("gpt", **{**SIZES, "n_layer": 1})
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == {
        "token_embedding.weight": (9, 16),
        "pair_embedding.weight": (81, 16),
        "ngram_embeddings.0.weight": (729, 16),
        "blocks.0.attn.qkv.weight": (48, 16),
        "blocks.0.attn.proj.weight": (16, 16),
        "blocks.0.attn.value_embedding.weight": (9, 16),
        "blocks.0.mlp.fc.weight": (64, 16),
        "blocks.0.mlp.proj.weight": (16, 64),
        "lm_head.weight": (9, 16),
    }


# --- positions ------------------------------------------------------------------------------------


def test_only_distances_count():
    model, ids = perturbed(block_size=60), some_ids(2, 6)
    logits, table = model(ids), model.rotary
    for shift in (1, 7, 54):
        model.rotary = table[:, shift:]
        torch.testing.assert_close(model(ids), logits, atol=1e-5, rtol=0)
    model.rotary = table[:, ::2]  # twice as far apart
    assert (model(ids) - logits)[:, 1:].abs().amax() > 1e-2


def test_order_counts_without_n_grams_too():
    model = perturbed(n_layer=1, n_gram=2)
    with torch.no_grad():
        model.pair_embedding.weight.zero_()
    here, there = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[2, 1, 3, 4]]))
    assert (here - there)[:, -1].abs().amax() > 1e-3
    model.rotary = model.rotary[:, :1].expand_as(model.rotary)  # all in one place
    here, there = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[2, 1, 3, 4]]))
    torch.testing.assert_close(here[:, -1], there[:, -1], atol=1e-5, rtol=0)


def test_the_last_token_of_a_window_is_turned_by_its_angle():
    model = build_model("gpt", **{**SIZES, "block_size": 300})
    cos, sin = model.rotary[:, 299, 0, 0]  # heads of 8 channels: speeds 1, 1/10, 1/100, 1/1000
    angles = [299.0, 29.9, 2.99, 0.299]
    assert cos.tolist() == pytest.approx([math.cos(a) for a in angles] * 2, abs=1e-4)
    sines = [math.sin(a) for a in angles]
    assert sin.tolist() == pytest.approx([-s for s in sines] + sines, abs=1e-4)


# --- n-grams --------------------------------------------------------------------------------------


def rows_read(model, ids, cache=None):
    """Which rows of its n-grams' embeddings the model reads: pairs, triples, ..., as lists."""
    found = []
    tables = [model.pair_embedding, *model.ngram_embeddings]
    hooks = [t.register_forward_pre_hook(lambda _, args: found.append(args[0])) for t in tables]
    model(torch.tensor(ids), cache)
    for hook in hooks:
        hook.remove()
    return [rows.tolist() for rows in found]


def test_each_n_gram_has_a_row_in_a_small_vocabulary():
    model = build_model("gpt", **{**SIZES, "n_gram": 4})
    pairs, triples, fours = rows_read(model, [[2, 0, 8, 8]])
    assert pairs == [[20, 18, 8, 80]]
    assert triples == [[2 * 81 + 20, 2 * 81 + 18, 2 * 81 + 8, 80]]
    assert fours == [[2 * 729 + 182, 2 * 729 + 180, 2 * 729 + 170, 2 * 729 + 80]]
    every = torch.cartesian_prod(*[torch.arange(9)] * 4).tolist()
    for n, rows in enumerate(rows_read(model, every), start=2):
        assert sorted({row[-1] for row in rows}) == [*range(9**n)]


def test_n_grams_share_rows_in_a_large_vocabulary():
    model = build_model("gpt", **{**SIZES, "vocab_size": 200, "n_embd": 4})
    assert len(model.pair_embedding.weight) == 32768
    assert [len(table.weight) for table in model.ngram_embeddings] == [16381]
    pairs, triples = rows_read(model, [[163, 173, 1], [0, 5, 0], [199, 199, 199]])
    assert [row[1] for row in pairs] == [163 * 200 + 173 - 32768, 5, 199 * 200 + 199 - 32768]
    assert [row[2] for row in triples] == [6554601 % 16381, 1000, 7999999 % 16381]


def test_the_row_of_a_long_n_gram_depends_on_each_of_its_tokens():
    # 256 as for bytes: with a power of two as the number of rows the first would not count
    model = build_model("gpt", **{**SIZES, "block_size": 12, "vocab_size": 256, "n_gram": 12})
    ids = some_ids(1, 12, 256)
    rows = [row[0][-1] for row in rows_read(model, ids.tolist())]
    for back in range(12):
        changed = ids.clone()
        changed[0, -1 - back] = (changed[0, -1 - back] + 1) % 256
        others = [row[0][-1] for row in rows_read(model, changed.tolist())]
        # an n-gram longer than `back` tokens has changed, and a shorter one has not
        assert [a != b for a, b in zip(rows, others, strict=True)] == [
            n > back for n in range(2, 13)
        ]


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_n_grams_go_across_the_parts_of_a_text(chunk):
    model = perturbed(vocab_size=200, n_embd=4, n_gram=5)
    ids, cache = some_ids(2, 6, 200), new_cache(model, 2)
    parts = [rows_read(model, part.tolist(), cache) for part in ids.split(chunk, dim=1)]
    joined = [
        [[i for row in rows for i in row] for rows in zip(*tables, strict=True)]
        for tables in zip(*parts, strict=True)
    ]
    assert joined == rows_read(model, ids.tolist())


# --- the cache ------------------------------------------------------------------------------------

CACHED = {name: perturbed(name, block_size=12, n_layer=3, n_embd=24) for name in ("gpt", "lecture")}
CACHED["5-grams"] = perturbed(block_size=12, n_layer=2, n_gram=5)
CACHED["no layers"] = perturbed("lecture", block_size=12, n_layer=0, n_embd=24)


@pytest.mark.parametrize("name", CACHED)
@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    B=st.sampled_from([1, 3, FEW + 1]),
    step=st.sampled_from([5, STEP]),
)
def test_in_whatever_parts_a_text_comes_the_logits_are_those_of_the_whole(name, chunks, B, step):
    model = CACHED[name]
    T = min(sum(chunks), 12)
    ids, cache, found = some_ids(B, T), new_cache(model, B), []
    with torch.no_grad(), patch("gpt_lightning.model.attention.STEP", step):
        for chunk in chunks:
            part = ids[:, cache.length : cache.length + chunk]
            if part.shape[1]:
                found.append(model(part, cache))
        torch.testing.assert_close(torch.cat(found, dim=1), model(ids), atol=1e-5, rtol=0)
    assert cache.length == T


@torch.no_grad()
@pytest.mark.parametrize("B", [2, FEW + 1])
@pytest.mark.parametrize("name", CACHED)
def test_a_cleared_cache_is_as_good_as_new(name, B):
    model, cache = CACHED[name], new_cache(CACHED[name], B)
    model(some_ids(B, 12, seed=8), cache)
    with pytest.raises(AssertionError, match="13 tokens, block_size 12"):
        model(some_ids(B, 1), cache)
    cache.clear()
    ids = some_ids(B, 7)
    torch.testing.assert_close(model(ids, cache), model(ids), atol=1e-5, rtol=0)


def written(model, ids, n, seed=0, **sampling):
    found = generate(model, ids, n, Sampling(**sampling), seeded(seed))
    return [list(sample) for sample in zip(*found, strict=True)]


@pytest.mark.parametrize("prompt", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("block_size", [1, 2, 3, 6, 16])
def test_greedy_text_is_what_the_model_written_out_says_of_each_window(prompt, block_size):
    model, ids = perturbed(block_size=block_size), some_ids(2, prompt)
    weights, expected = model.state_dict(), []
    for text in ids.tolist():
        window = text[-block_size:]
        for _ in range(20):
            text.append(int(reference(weights, model.config, window)[-1].argmax()))
            if len(window) == block_size:  # a full one starts anew with its last three quarters
                window = window[block_size - block_size * 3 // 4 :]
            window = [*window, text[-1]]
        expected.append(text[prompt:])
    assert written(model, ids, 20, temperature=0) == expected


def test_a_batch_is_written_as_each_text_alone():
    model, ids = perturbed(), some_ids(4, 3)
    alone = [written(model, row[None], 25, temperature=0)[0] for row in ids]
    assert written(model, ids, 25, temperature=0) == alone


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(n_embd=6), "--model.n_embd=6 is not divisible by twice --model.n_head=2"),
        (dict(n_embd=15), "--model.n_embd=15 is not divisible by twice --model.n_head=2"),
        (dict(n_head=16), "--model.n_embd=16 is not divisible by twice --model.n_head=16"),
        (dict(n_layer=0), "--model.n_layer=0 must be at least 1"),
        (dict(n_head=0), "--model.n_head=0 must be at least 1"),
        (dict(n_embd=-4), "--model.n_embd=-4 must be at least 1"),
        (dict(vocab_size=0), "--model.vocab_size=0 must be at least 1"),
        (dict(block_size=0), "--model.block_size=0 must be at least 1"),
        (dict(n_gram=1), "--model.n_gram=1 must lie in [2, 16]"),
        (dict(n_gram=17), "--model.n_gram=17 must lie in [2, 16]"),
        (dict(dropout=1.0), "--model.dropout=1.0 must lie in [0, 1)"),
        (dict(dropout=-0.1), "--model.dropout=-0.1 must lie in [0, 1)"),
        (dict(dropout=math.nan), "--model.dropout=nan must lie in [0, 1)"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused_in_one_line(sizes, message):
    with pytest.raises(ValueError) as error:
        build_model("gpt", **{**SIZES, **sizes})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("bias", False),
        ("init_std", None),
        ("init_std", 0.5),
        ("scaled", False),
        ("ffwd", 0),
        ("residual", False),
        ("proj", False),
        ("norm", False),
        ("fused", False),
    ],
)
def test_a_switch_of_the_lecture_s_is_refused(switch, value):
    with pytest.raises(ValueError) as error:
        build_config("gpt", **SIZES, **{switch: value})
    assert str(error.value) == (
        f"--model.{switch}={value} is a setting of --model.name=lecture, not of --model.name=gpt"
    )


def test_the_lecture_s_switches_may_stand_there_as_they_are_by_default():
    switches = ("bias", "init_std", "scaled", "ffwd", "residual", "proj", "norm", "fused")
    lecture = LectureConfig(vocab_size=9, block_size=6)
    defaults = {switch: getattr(lecture, switch) for switch in switches}
    assert build_config("gpt", **SIZES, **defaults) == GPTConfig(**SIZES)


def test_a_model_can_be_built_again_from_its_settings():
    model = perturbed(dropout=0.25)
    settings_ = model_settings("gpt", model)
    assert settings_ == {"name": "gpt", **SIZES, "dropout": 0.25, "n_gram": 3}
    again = build_model(**settings_)
    assert isinstance(again, GPT)
    again.load_state_dict(model.state_dict())
    ids = some_ids(2, 6)
    assert torch.equal(again.eval()(ids), model(ids))


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only():
    plain, model, ids = perturbed(), perturbed(dropout=0.5), some_ids(2, 6)
    expected = plain(ids)
    assert torch.equal(plain.train()(ids), expected)
    assert torch.equal(model(ids), expected)
    model.train()
    torch.manual_seed(1)
    first = model(ids)
    assert not torch.equal(model(ids), first) and not torch.allclose(first, expected)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)


def test_dropout_takes_the_same_channels_at_all_positions_and_keeps_the_mean():
    block = Block(GPTConfig(**{**SIZES, "n_embd": 4000, "dropout": 0.25}), layer=0).train()
    torch.manual_seed(1)
    dropped = block.drop(torch.ones(2, 6, 4000))
    assert torch.equal(dropped, dropped[:, :1].expand(-1, 6, -1))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not torch.equal(dropped[0], dropped[1])  # each window has its own
    assert (dropped[:, 0] == 0).float().mean(1).sub(0.25).abs().max() < 0.03


def test_under_autocast_the_stream_is_narrow_and_the_logits_are_those_of_fp32_nearly():
    model, ids = perturbed(), some_ids(2, 6)
    found = []
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dtype))
    wide = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(ids)
    assert found == [torch.float32, torch.bfloat16]
    assert (narrow - wide).norm() / wide.norm() < 0.03


def test_generation_drops_nothing_and_leaves_the_model_in_training():
    plain, model, ids = perturbed(), perturbed(dropout=0.5).train(), some_ids(2, 4)
    assert written(model, ids, 20, seed=3) == written(plain, ids, 20, seed=3)
    assert model.training and not plain.training


# --- causal attention in bf16 on a CPU ------------------------------------------------------------


def heads(B=2, H=3, T=9, D=8, dtype=torch.bfloat16, seed=0):
    drawn = torch.randn(3, B, H, T, D, generator=seeded(seed))
    return [part.to(torch.bfloat16).to(dtype).requires_grad_() for part in drawn]


@pytest.mark.parametrize("scale", [8**-0.5, 1.0])
@pytest.mark.parametrize("shape", [dict(), dict(T=1), dict(B=1, H=1, D=2), dict(T=33)], ids=str)
def test_attention_in_bf16_is_that_in_fp32_as_far_as_bf16_can_tell(shape, scale):
    narrow, wide = heads(**shape), heads(**shape, dtype=torch.float32)
    found, expected = causal_attention(*narrow, scale), causal_attention(*wide, scale)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    weights = torch.randn(found.shape, generator=seeded(4))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(narrow, wide, strict=True):
        error = (a.grad.float() - b.grad).norm() / (b.grad.norm() + 1e-3)
        assert error < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_never_looks_ahead(dtype, dropout):
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
        gk, gv = torch.autograd.grad(out[:, :, t].float().sum(), [k, v], retain_graph=True)
        assert not gk[:, :, t + 1 :].any() and not gv[:, :, t + 1 :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropped_attention_is_the_same_on_average(dtype):
    q, k, v = (part.detach() for part in heads(B=1, H=1, T=6, D=4, dtype=dtype))
    torch.manual_seed(0)
    many = [part.expand(4000, 1, 6, 4).contiguous() for part in (q, k, v)]
    found = causal_attention(*many, 0.5, 0.25).float()
    expected = causal_attention(q, k, v, 0.5).float()
    torch.testing.assert_close(found.mean(0, keepdim=True), expected, atol=0.06, rtol=0)
    # the first takes of itself alone: all of it, and a third more, or nothing
    kept = found[:, 0, 0].abs().amax(-1) > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    ratio = found[kept][:, 0, 0] / v[0, 0, 0].float()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / 0.75), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["gpt", "lecture"])
def test_a_model_in_mixed_precision_is_near_to_itself_in_fp32(name):
    model, ids = perturbed(name, n_embd=32, dropout=0.0), some_ids(4, 6)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert (found.float() - expected).norm() < 0.03 * expected.norm()
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
