"""The modern GPT equals the same model written out in double precision."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import perturbed, seeded

from gpt_lightning.errors import UserError
from gpt_lightning.generation.generator import generate
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model import build_model
from gpt_lightning.model.gpt import Block, GPTConfig

SIZES = dict(vocab_size=9, block_size=6, n_layer=2, n_head=2, n_embd=16, multi_token_heads=0)


def build(**sizes):
    torch.manual_seed(1337)
    return build_model(GPTConfig(**{**SIZES, **sizes}))


def some_ids(B, T, vocab_size=9, seed=2):
    return torch.randint(vocab_size, (B, T), generator=seeded(seed))


def standard(x):
    """Mean 0 and variance 1 in every row."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotated(x):
    """(T, D): the halves of a row are real and imaginary parts of numbers that rotate."""
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
        buckets = [number % min(V**n, 16381) for number in numbers]
        x = x + w[f"ngram_embeddings.{n - 3}.weight"][buckets]
    x = standard(x)
    for layer in range(config.n_layer):
        block = f"blocks.{layer}."
        wq, wk, wv = w[block + "attn.qkv.weight"].split(C)
        own = w[block + "attn.value_embedding.weight"][ids]
        h, heads = standard(x), []
        for head in range(H):
            rows = slice(head * D, (head + 1) * D)
            q, k = rotated(standard(h @ wq[rows].T)), rotated(standard(h @ wk[rows].T))
            v = h @ wv[rows].T + own[:, rows]
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
    dict(n_head=8),  # heads of two channels
    dict(block_size=1, n_gram=2),
    dict(vocab_size=200, n_embd=4, n_layer=1),  # pairs and triples share rows
    dict(n_layer=3, block_size=11, vocab_size=30, n_embd=12, n_head=3, n_gram=5),
]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_logits_and_gradients_equal_the_model_written_out(sizes):
    model = perturbed(build(**sizes))
    config = model.config
    ids = some_ids(2, config.block_size, config.vocab_size)
    targets = some_ids(2, config.block_size, config.vocab_size, seed=5)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = torch.stack([reference(weights, config, row) for row in ids.tolist()])
    logits = model(ids)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        grad = weights[name].grad
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4, msg=name)


def test_more_tokens_than_block_size_are_rejected():
    with pytest.raises(AssertionError, match="7 tokens, block_size 6"):
        build()(some_ids(1, 7))


def test_a_token_changes_the_logits_from_its_position_on():
    model, ids = perturbed(build()), some_ids(1, 6)
    whole = model(ids)
    for t in range(6):
        torch.testing.assert_close(model(ids[:, : t + 1]), whole[:, : t + 1], atol=1e-5, rtol=0)
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 9
        moved = (model(changed) - whole).abs().amax(dim=-1)[0]
        assert (moved[:t] == 0).all() and (moved[t:] > 1e-4).all(), t


def test_state_dict_names_and_shapes_are_pinned():
    model = build(n_layer=1, multi_token_heads=1)
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
        "multi_token_heads.0.weight": (9, 16),
    }


def test_the_row_of_a_long_n_gram_depends_on_all_its_tokens():
    # V = 256, as for bytes: with 2**k rows, the n-gram's first tokens would have no effect
    model, found = build(block_size=12, vocab_size=256, n_gram=12), []
    for table in (model.pair_embedding, *model.ngram_embeddings):
        table.register_forward_pre_hook(lambda _, args: found.append(args[0][:, -1]))
    ids = some_ids(1, 12, 256).repeat(13, 1)
    for back in range(12):  # row 1 + back has another token there
        ids[1 + back, -1 - back] = (ids[0, -1 - back] + 1) % 256
    model(ids)
    for n, rows in enumerate(found, start=2):
        assert (rows[1:] != rows[0]).tolist() == [n > back for back in range(12)]


def test_multi_token_heads_leave_the_initial_weights_of_all_others():
    plain, model = build(), build(multi_token_heads=2)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.state_dict().items())
    assert not model(some_ids(4, 6)).any()  # the initial predictions are uniform


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(n_embd=6), "n_embd=6 must be a multiple of twice n_head=2"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(vocab_size=-1), "vocab_size=-1 must be at least 0"),
        (dict(n_gram=17), "n_gram=17 must be between 2 and 16"),
        (dict(dropout=math.nan), "dropout=nan must be in [0, 1)"),
    ],
    ids=str,
)
def test_config_rejects_values_out_of_range(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        GPTConfig(**{**SIZES, **settings})


def test_dropout_acts_in_training_only():
    plain, model, ids = perturbed(build()), perturbed(build(dropout=0.5)), some_ids(2, 6)
    expected = plain(ids)
    assert torch.equal(plain.train()(ids), expected)
    assert torch.equal(model(ids), expected)
    model.train()
    torch.manual_seed(1)
    first = model(ids)
    assert not torch.equal(model(ids), first) and not torch.allclose(first, expected)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)


def test_dropout_drops_the_same_channels_at_all_positions():
    block = Block(GPTConfig(**{**SIZES, "n_embd": 4000, "dropout": 0.25}), layer=0).train()
    torch.manual_seed(1)
    dropped = block.drop(torch.ones(2, 6, 4000))
    assert torch.equal(dropped, dropped[:, :1].expand(-1, 6, -1))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not torch.equal(dropped[0], dropped[1])  # each window has its own mask
    assert (dropped[:, 0] == 0).float().mean(1).sub(0.25).abs().max() < 0.03


def test_autocast_converts_the_residual_stream():
    model, found = build(), []
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(some_ids(2, 6))
    assert found == [torch.bfloat16]


@pytest.mark.parametrize(
    ("block_size", "prompt"), [(1, 5), (2, 6), (3, 1), (6, 6), (6, 20), (16, 7)]
)
def test_greedy_text_equals_the_model_written_out_on_each_window(block_size, prompt):
    model, ids = perturbed(build(block_size=block_size)), some_ids(2, prompt)
    weights, expected = model.state_dict(), []
    for text in ids.tolist():
        window = text[-block_size:]
        for _ in range(20):
            text.append(int(reference(weights, model.config, window)[-1].argmax()))
            if len(window) == block_size:  # a full window restarts with its last three quarters
                window = window[block_size - block_size * 3 // 4 :]
            window = [*window, text[-1]]
        expected.append(text[prompt:])
    steps = generate(model, ids, 20, Sampling(temperature=0), seeded())
    assert [list(sample) for sample in zip(*steps, strict=True)] == expected
