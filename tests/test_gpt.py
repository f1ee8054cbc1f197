"""The modern GPT equals the same model written out in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from gpt_lightning.errors import UserError
from gpt_lightning.generation.generator import generate
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model import build_model, num_parameters
from gpt_lightning.model.gpt import Block, GPTConfig

SIZES = dict(vocab_size=9, block_size=6, n_layer=2, n_head=2, n_embd=16, multi_token_heads=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perturbed(seed=3, **sizes):
    """A model with every weight moved away from its initial value."""
    torch.manual_seed(seed)
    model = build_model(GPTConfig(**{**SIZES, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def some_ids(B, T, vocab_size=9, seed=2):
    return torch.randint(vocab_size, (B, T), generator=seeded(seed))


# --- the model written out in double precision ----------------------------------------------------


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
    {},
    dict(n_head=1),
    dict(n_head=8),  # heads of two channels
    dict(block_size=1),
    dict(n_layer=1, n_embd=2, n_head=1),
    dict(vocab_size=1),
    dict(n_gram=2),
    dict(n_gram=5),
    dict(vocab_size=200, n_embd=4, n_layer=1),  # pairs and triples share rows
    dict(n_layer=3, block_size=11, vocab_size=30, n_embd=12, n_head=3),
]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_logits_and_gradients_equal_the_model_written_out(sizes):
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


def test_a_prefix_has_the_same_logits():
    model, ids = perturbed(), some_ids(2, 6)
    whole = model(ids)
    for T in range(1, 6):
        torch.testing.assert_close(model(ids[:, :T]), whole[:, :T], atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="7 tokens, block_size 6"):
        model(some_ids(1, 7))


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_initial_predictions_are_uniform(sizes):
    model = build_model(GPTConfig(**{**SIZES, **sizes}))
    V, T = model.config.vocab_size, model.config.block_size
    logits = model(some_ids(4, T, V))
    assert logits.shape == (4, T, V) and not logits.any()
    loss = F.cross_entropy(logits.flatten(0, 1), some_ids(4, T, V, seed=9).flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=1e-6)


def test_a_token_changes_the_logits_from_its_position_on():
    model, ids = perturbed(block_size=8), some_ids(1, 8)
    whole = model(ids)
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 9
        moved = (model(changed) - whole).abs().amax(dim=-1)[0]
        assert (moved[:t] == 0).all(), t
        assert (moved[t:] > 1e-4).all(), t


def test_texts_of_a_batch_are_independent():
    model, ids = perturbed(), some_ids(5, 6)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient():
    model = perturbed()
    logits = model(some_ids(4, 6))
    F.cross_entropy(logits.flatten(0, 1), some_ids(4, 6, seed=4).flatten()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_state_dict_names_and_shapes_are_pinned():
    model = build_model(GPTConfig(**{**SIZES, "n_layer": 1, "multi_token_heads": 1}))
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


# --- positions ------------------------------------------------------------------------------------


def test_logits_depend_on_distances_only():
    model, ids = perturbed(block_size=60), some_ids(2, 6)
    logits, table = model(ids), model.rotary
    for shift in (1, 7, 54):
        model.rotary = table[:, shift:]
        torch.testing.assert_close(model(ids), logits, atol=1e-5, rtol=0)
    model.rotary = table[:, ::2]  # twice as far apart
    assert (model(ids) - logits)[:, 1:].abs().amax() > 1e-2


def test_token_order_changes_the_logits_without_n_grams():
    model = perturbed(n_layer=1, n_gram=2)
    with torch.no_grad():
        model.pair_embedding.weight.zero_()
    here, there = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[2, 1, 3, 4]]))
    assert (here - there)[:, -1].abs().amax() > 1e-3
    model.rotary = model.rotary[:, :1].expand_as(model.rotary)  # all at the same position
    here, there = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[2, 1, 3, 4]]))
    torch.testing.assert_close(here[:, -1], there[:, -1], atol=1e-5, rtol=0)


def test_rotary_angles_of_the_last_position():
    model = build_model(GPTConfig(**{**SIZES, "block_size": 300}))
    cos, sin = model.rotary[:, 299, 0, 0]  # heads of 8 channels: speeds 1, 1/10, 1/100, 1/1000
    angles = [299.0, 29.9, 2.99, 0.299]
    assert cos.tolist() == pytest.approx([math.cos(a) for a in angles] * 2, abs=1e-4)
    sines = [math.sin(a) for a in angles]
    assert sin.tolist() == pytest.approx([-s for s in sines] + sines, abs=1e-4)


# --- n-grams --------------------------------------------------------------------------------------


def rows_read(model, ids):
    """The rows of the n-gram embeddings that the model reads: pairs, triples, ..."""
    found = []
    tables = [model.pair_embedding, *model.ngram_embeddings]
    hooks = [t.register_forward_pre_hook(lambda _, args: found.append(args[0])) for t in tables]
    model(torch.tensor(ids))
    for hook in hooks:
        hook.remove()
    return [rows.tolist() for rows in found]


def test_every_n_gram_has_its_own_row_in_a_small_vocabulary():
    model = build_model(GPTConfig(**{**SIZES, "n_gram": 4}))
    pairs, triples, fours = rows_read(model, [[2, 0, 8, 8]])
    assert pairs == [[20, 18, 8, 80]]
    assert triples == [[2 * 81 + 20, 2 * 81 + 18, 2 * 81 + 8, 80]]
    assert fours == [[2 * 729 + 182, 2 * 729 + 180, 2 * 729 + 170, 2 * 729 + 80]]
    every = torch.cartesian_prod(*[torch.arange(9)] * 4).tolist()
    for n, rows in enumerate(rows_read(model, every), start=2):
        assert sorted({row[-1] for row in rows}) == [*range(9**n)]


def test_n_grams_share_rows_in_a_large_vocabulary():
    model = build_model(GPTConfig(**{**SIZES, "vocab_size": 200, "n_embd": 4}))
    assert len(model.pair_embedding.weight) == 32768
    assert [len(table.weight) for table in model.ngram_embeddings] == [16381]
    pairs, triples = rows_read(model, [[163, 173, 1], [0, 5, 0], [199, 199, 199]])
    assert [row[1] for row in pairs] == [163 * 200 + 173 - 32768, 5, 199 * 200 + 199 - 32768]
    assert [row[2] for row in triples] == [6554601 % 16381, 1000, 7999999 % 16381]


def test_the_row_of_a_long_n_gram_depends_on_all_its_tokens():
    # V = 256, as for bytes: with 2**k rows, the n-gram's first tokens would have no effect
    model = build_model(GPTConfig(**{**SIZES, "block_size": 12, "vocab_size": 256, "n_gram": 12}))
    ids = some_ids(1, 12, 256)
    rows = [row[0][-1] for row in rows_read(model, ids.tolist())]
    for back in range(12):
        changed = ids.clone()
        changed[0, -1 - back] = (changed[0, -1 - back] + 1) % 256
        others = [row[0][-1] for row in rows_read(model, changed.tolist())]
        # exactly the n-grams with more than `back` tokens change
        assert [a != b for a, b in zip(rows, others, strict=True)] == [
            n > back for n in range(2, 13)
        ]


# --- multi-token heads ----------------------------------------------------------------------------


def test_multi_token_loss_equals_its_definition():
    model = perturbed(multi_token_heads=3)
    ids, targets = some_ids(2, 6), some_ids(2, 6, seed=5)
    features = []
    model.lm_head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    logits, loss = model(ids, targets=targets)
    torch.testing.assert_close(logits, model(ids))
    expected = 0.0
    for n, head in enumerate(model.multi_token_heads, start=1):
        nats = []
        for row in range(2):
            for t in range(6 - n):
                logs = (head.weight @ features[0][row, t]).double().log_softmax(0)
                nats.append(-logs[targets[row, t + n]].item())
        expected += 0.3 / n * sum(nats) / len(nats)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_heads_beyond_the_window_are_skipped():
    model = perturbed(multi_token_heads=3, block_size=2)
    ids, targets = some_ids(2, 2), some_ids(2, 2, seed=5)
    loss = model(ids, targets=targets)[1]
    model.multi_token_heads = model.multi_token_heads[:1]
    assert torch.equal(model(ids, targets=targets)[1], loss)
    assert model(ids[:, :1], targets=targets[:, :1])[1] == 0


def test_multi_token_heads_change_nothing_else():
    torch.manual_seed(1337)
    plain = build_model(GPTConfig(**SIZES))
    torch.manual_seed(1337)
    model = build_model(GPTConfig(**{**SIZES, "multi_token_heads": 2}))
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.state_dict().items())
    assert not any(head.weight.any() for head in model.multi_token_heads)
    assert (
        num_parameters(model)
        == num_parameters(plain)
        == sum(parameter.numel() for parameter in plain.parameters())
    )


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(n_embd=6), "n_embd=6 must be a multiple of twice n_head=2: "),
        (dict(n_embd=15), "n_embd=15 must be a multiple of twice n_head=2: "),
        (dict(n_head=16, n_embd=16), "n_embd=16 must be a multiple of twice n_head=16: "),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(n_head=0), "n_head=0 must be at least 1"),
        (dict(n_embd=-4), "n_embd=-4 must be at least 1"),
        (dict(vocab_size=-1), "vocab_size=-1 must be at least 0"),
        (dict(block_size=-1), "block_size=-1 must be at least 0"),
        (dict(multi_token_heads=-1), "multi_token_heads=-1 must be at least 0"),
        (dict(n_gram=1), "n_gram=1 must be between 2 and 16"),
        (dict(n_gram=17), "n_gram=17 must be between 2 and 16"),
        (dict(dropout=1.0), "dropout=1.0 must be in [0, 1)"),
        (dict(dropout=-0.1), "dropout=-0.1 must be in [0, 1)"),
        (dict(dropout=math.nan), "dropout=nan must be in [0, 1)"),
    ],
    ids=str,
)
def test_config_rejects_values_out_of_range(settings, message):
    with pytest.raises(UserError) as error:
        GPTConfig(**{**SIZES, **settings})
    assert str(error.value).startswith(message)
    assert str(error.value).startswith(message.split("=")[0])


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


def test_dropout_drops_the_same_channels_at_all_positions():
    block = Block(GPTConfig(**{**SIZES, "n_embd": 4000, "dropout": 0.25}), layer=0).train()
    torch.manual_seed(1)
    dropped = block.drop(torch.ones(2, 6, 4000))
    assert torch.equal(dropped, dropped[:, :1].expand(-1, 6, -1))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not torch.equal(dropped[0], dropped[1])  # each window has its own mask
    assert (dropped[:, 0] == 0).float().mean(1).sub(0.25).abs().max() < 0.03


def test_autocast_converts_the_residual_stream_and_keeps_the_logits():
    model, ids = perturbed(), some_ids(2, 6)
    found = []
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dtype))
    wide = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(ids)
    assert found == [torch.float32, torch.bfloat16]
    assert (narrow - wide).norm() / wide.norm() < 0.03


def test_generation_uses_no_dropout_and_restores_training_mode():
    plain, model, ids = perturbed(), perturbed(dropout=0.5).train(), some_ids(2, 4)
    assert generated(model, ids, 20, seed=3) == generated(plain, ids, 20, seed=3)
    assert model.training and not plain.training


# --- generation -----------------------------------------------------------------------------------


def generated(model, ids, n, seed=0, **sampling):
    found = generate(model, ids, n, Sampling(**sampling), seeded(seed))
    return [list(sample) for sample in zip(*found, strict=True)]


@pytest.mark.parametrize("prompt", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("block_size", [1, 2, 3, 6, 16])
def test_greedy_text_equals_the_model_written_out_on_each_window(prompt, block_size):
    model, ids = perturbed(block_size=block_size), some_ids(2, prompt)
    weights, expected = model.state_dict(), []
    for text in ids.tolist():
        window = text[-block_size:]
        for _ in range(20):
            text.append(int(reference(weights, model.config, window)[-1].argmax()))
            if len(window) == block_size:  # a full window restarts with its last three quarters
                window = window[block_size - block_size * 3 // 4 :]
            window = [*window, text[-1]]
        expected.append(text[prompt:])
    assert generated(model, ids, 20, temperature=0) == expected


def test_samples_of_a_batch_are_generated_independently():
    model, ids = perturbed(), some_ids(4, 3)
    alone = [generated(model, row[None], 25, temperature=0)[0] for row in ids]
    assert generated(model, ids, 25, temperature=0) == alone
