import json
import math

import pytest
import torch
import torch.nn.functional as F
from lecture_oracle import BigramLanguageModel, from_model, oracle_of
from torch import nn

from gpt_lightning.model import build_model, model_settings
from gpt_lightning.model.lecture import Bigram, LectureConfig, LectureGPT

SHAPES = [
    dict(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8),
    dict(vocab_size=65, block_size=16, n_layer=3, n_head=4, n_embd=32),
    dict(vocab_size=2, block_size=5, n_layer=2, n_head=3, n_embd=12, bias=False),
    dict(vocab_size=65, block_size=16, n_layer=2, n_head=8, n_embd=8, bias=False),  # heads of one
    dict(vocab_size=7, block_size=1, n_layer=2, n_head=2, n_embd=8),
    dict(vocab_size=7, block_size=4, n_layer=0, n_head=1, n_embd=8),  # the lecture's first rungs
]


def random_model(**settings) -> nn.Module:
    """A model whose every weight matters: none is left at its initial 0 or 1."""
    torch.manual_seed(3)
    model = LectureGPT(LectureConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def some_ids(vocab_size, *shape) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(5))


def dropping(p):
    """In place of F.dropout: always the same elements of a tensor of some shape."""

    def drop(x, p_=0.5, training=True, inplace=False):
        assert p_ == p
        if not training or p == 0:
            return x
        generator = torch.Generator().manual_seed(
            sum(size * 31**i for i, size in enumerate(x.shape))
        )
        return x * (torch.rand(x.shape, generator=generator) >= p) / (1 - p)

    return drop


# --- equal to the lecture -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_logits_are_the_lecture_s(settings):
    model = random_model(**settings)
    oracle = oracle_of(model)
    for T in {1, (settings["block_size"] + 1) // 2, settings["block_size"]}:
        ids = some_ids(settings["vocab_size"], 3, T)
        logits = model(ids)
        assert logits.shape == (3, T, settings["vocab_size"])
        assert logits.std() > 0.1  # or equality would say little
        torch.testing.assert_close(logits, oracle(ids)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_gradients_are_the_lecture_s(settings):
    model = random_model(**settings)
    oracle = oracle_of(model)
    ids = some_ids(settings["vocab_size"], 4, settings["block_size"])
    targets = ids.roll(-1, dims=1)
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    oracle(ids, targets)[1].backward()
    ours = from_model({n: p.grad for n, p in model.named_parameters()}, model.config.n_head)
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=1e-4, msg=name)
    if settings["block_size"] > 1:  # else attention has no choice to learn from
        assert all(grad.abs().max() > 0 for grad in ours.values())


def test_the_bigram_is_the_lecture_s():
    torch.manual_seed(3)
    model, oracle = Bigram(LectureConfig(vocab_size=9, block_size=4)), BigramLanguageModel(9)
    oracle.load_state_dict(model.state_dict())
    ids = some_ids(9, 3, 4)
    targets = ids.roll(-1, dims=1)
    assert torch.equal(model(ids), oracle(ids)[0])
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    oracle(ids, targets)[1].backward()
    torch.testing.assert_close(
        model.token_embedding_table.weight.grad, oracle.token_embedding_table.weight.grad
    )
    assert list(model.state_dict()) == ["token_embedding_table.weight"]


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_is_at_the_lecture_s_places(monkeypatch):
    """With the same elements dropped, training mode gives the oracle's logits and gradients."""
    p = 0.3
    model = random_model(**SHAPES[1], dropout=p).train()
    oracle = oracle_of(model)
    drop = dropping(p)

    def attention(q, k, v, dropout_p=0.0, is_causal=False, scale=None):
        assert is_causal and dropout_p == p
        T = q.shape[2]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        # each head as the oracle's: its own softmax dropped in its own shape (B, T, T)
        wei = torch.stack([drop(head, p) for head in scores.softmax(-1).unbind(1)], dim=1)
        return wei @ v

    monkeypatch.setattr(F, "dropout", drop)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    ids = some_ids(65, 3, 16)
    logits, expected = model(ids), oracle(ids)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (oracle.eval()(ids)[0] - expected).abs().max() > 0.1
    logits.square().sum().backward()
    expected.square().sum().backward()
    ours = from_model({n: q.grad for n, q in model.named_parameters()}, model.config.n_head)
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_attention_dropout_drops_that_share_of_the_weights():
    """Values of one, a score of 0: what comes out tells which weights were dropped."""
    p, T = 0.25, 64
    model = LectureGPT(LectureConfig(3, T, n_layer=1, n_head=1, n_embd=T, dropout=p))
    attention = model.blocks[0].sa.train()
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.weight[2 * T :] = torch.eye(T)  # v is x
        attention.proj.weight.copy_(torch.eye(T))
        attention.proj.bias.zero_()
    torch.manual_seed(0)
    with torch.no_grad():
        said = attention(torch.eye(T).expand(20, T, T))  # weights (T, T), dropped twice
    kept = said.tril().count_nonzero() / (20 * T * (T + 1) / 2)
    assert abs(kept - (1 - p) ** 2) < 0.01  # once in the softmax, once behind the projection
    assert abs(said.sum(-1).mean() - 1) < 0.02  # the weights of a position sum to 1 on average


def test_dropout_acts_in_training_only():
    model = random_model(**SHAPES[1], dropout=0.4)
    plain = random_model(**SHAPES[1], dropout=0.0)
    ids = some_ids(65, 2, 16)
    assert torch.equal(model.eval()(ids), plain.eval()(ids))
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(plain.train()(ids), plain(ids))
    model.train()
    first, second = model(ids), model(ids)
    assert not torch.allclose(first, second, atol=1e-2)
    torch.manual_seed(8)
    again = model(ids)
    torch.manual_seed(8)
    assert torch.equal(model(ids), again)


# --- causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SHAPES[1:4], ids=str)
def test_changing_a_token_changes_no_earlier_logit(settings):
    V, T = settings["vocab_size"], settings["block_size"]
    model = random_model(**settings).eval()
    ids = some_ids(V, 1, T)
    before = model(ids)
    for at in range(T):
        changed = ids.clone()
        changed[0, at] = (ids[0, at] + 1) % V
        after = model(changed)
        torch.testing.assert_close(after[0, :at], before[0, :at], rtol=0, atol=1e-6)
        for later in range(at, T):  # and it reaches every later one
            assert not torch.allclose(after[0, later], before[0, later], atol=1e-6)


def test_a_gradient_flows_from_a_logit_to_the_tokens_up_to_it_only():
    model = random_model(**SHAPES[1])
    embedded = []
    table = model.token_embedding_table
    table.register_forward_hook(lambda *found: embedded.append(found[2]) or found[2].retain_grad())
    model(some_ids(65, 1, 16))[0, 6].sum().backward()
    reached = embedded[0].grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 7 + [False] * 9


def test_more_tokens_than_block_size_are_not_taken():
    with pytest.raises(AssertionError, match="9 tokens, block_size 8"):
        random_model(**SHAPES[0])(some_ids(11, 1, 9))


# --- initialisation -------------------------------------------------------------------------------


def test_initial_weights_have_the_standard_deviation_asked_for():
    for std in (0.02, 0.1):
        torch.manual_seed(1)
        sizes = dict(n_layer=2, n_head=4, n_embd=128)
        model = LectureGPT(LectureConfig(300, 200, init_std=std, **sizes))
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
        torch.manual_seed(1)
        table = Bigram(LectureConfig(200, 8, init_std=std)).token_embedding_table.weight
        assert abs(table.std() / std - 1) < 0.05


def test_without_init_std_the_weights_are_torch_s_own():
    config = LectureConfig(11, 8, n_layer=2, n_head=2, n_embd=8, init_std=None)
    torch.manual_seed(4)
    found = LectureGPT(config).state_dict()
    torch.manual_seed(4)
    expected = [nn.Embedding(11, 8).weight, nn.Embedding(8, 8).weight]
    for _ in range(2):
        expected += nn.LayerNorm(8).parameters()
        expected.append(nn.Linear(8, 24, bias=False).weight)
        expected += nn.Linear(8, 8).parameters()
        expected += nn.LayerNorm(8).parameters()
        expected += nn.Linear(8, 32).parameters()
        expected += nn.Linear(32, 8).parameters()
    expected += [*nn.LayerNorm(8).parameters(), *nn.Linear(8, 11).parameters()]
    assert len(found) == len(expected)
    for (name, ours), torchs in zip(found.items(), expected, strict=True):
        assert torch.equal(ours, torchs), name
    torch.manual_seed(4)
    table = Bigram(config).token_embedding_table.weight
    torch.manual_seed(4)
    assert torch.equal(table, nn.Embedding(11, 11).weight)


@pytest.mark.parametrize("name", ["lecture", "bigram"])
def test_the_first_loss_is_near_that_of_a_uniform_guess(name):
    torch.manual_seed(2)
    model = build_model(name, vocab_size=65, block_size=32)
    ids = some_ids(65, 16, 33)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(65)) < 0.05


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


def test_the_names_in_a_checkpoint_are_these():
    sizes = dict(n_layer=1, n_head=2, n_embd=8)
    found = LectureGPT(LectureConfig(11, 6, **sizes)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == KEYS
    found = LectureGPT(LectureConfig(11, 6, bias=False, **sizes)).state_dict()
    assert list(found) == [k for k in KEYS if not k.endswith("bias") or k == "lm_head.bias"]


@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_the_number_of_parameters_is_known(settings):
    model = LectureGPT(LectureConfig(**settings))
    V, T, L, C = (settings[k] for k in ("vocab_size", "block_size", "n_layer", "n_embd"))
    b = settings.get("bias", True)
    block = 3 * C * C + C * C + 8 * C * C + b * (C + 4 * C + C) + 2 * (C + b * C)
    expected = V * C + T * C + L * block + (C + b * C) + (C * V + V)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_lecture_s_last_model_has_its_10_788_929_parameters():
    # 10.788929 M parameters is what the lecture's own script prints for Shakespeare's 65 characters
    with torch.device("meta"):
        model = LectureGPT(LectureConfig(65, 256, n_layer=6, n_head=6, n_embd=384))
    assert sum(parameter.numel() for parameter in model.parameters()) == 10_788_929


# --- settings -------------------------------------------------------------------------------------

GOOD = dict(vocab_size=5, block_size=4, n_layer=1, n_head=2, n_embd=8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", -1),
        ("block_size", 0),
        ("n_layer", -1),
        ("n_head", 0),
        ("n_head", -2),
        ("n_head", 3),
        ("n_embd", 0),
        ("n_embd", -8),
        ("n_embd", 9),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", math.nan),
        ("init_std", -0.02),
        ("init_std", math.nan),
        ("init_std", math.inf),
    ],
)
@pytest.mark.parametrize("model", ["lecture", "bigram"])
def test_settings_that_cannot_be_are_refused_in_one_line(model, name, value):
    with pytest.raises(ValueError) as error:
        build_model(model, **{**GOOD, name: value})
    message = str(error.value)
    assert "\n" not in message and f"--model.{name}={value}" in message


def test_an_unknown_model_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError) as error:
        build_model("lectern", **GOOD)
    assert str(error.value) == "--model.name=lectern is unknown; choose one of lecture, bigram"


@pytest.mark.parametrize("name", ["lecture", "bigram"])
def test_a_model_is_built_again_from_its_settings(name):
    torch.manual_seed(0)
    model = build_model(name, **GOOD, dropout=0.25, bias=False, init_std=None)
    kept = model_settings(name, model)
    expected = {**GOOD, "name": name, "dropout": 0.25, "bias": False, "init_std": None}
    assert kept == expected
    assert json.loads(json.dumps(kept)) == kept  # plain types
    again = build_model(**kept)
    assert type(again) is type(model) and again.config == model.config
    again.load_state_dict(model.state_dict())
    ids = some_ids(5, 2, 4)
    assert torch.equal(again.eval()(ids), model.eval()(ids))
