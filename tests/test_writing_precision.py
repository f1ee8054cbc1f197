"""The weights that text is written with: what is rounded, by how much, and when."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt_lightning.generation import precision
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.precision import FEW, Int8Linear, for_writing
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model import build_model
from gpt_lightning.model.attention import KVCache

SIZES = dict(vocab_size=11, block_size=24, n_layer=2, n_head=2, n_embd=32)


def model(name: str, **sizes) -> nn.Module:
    """With weights that matter: the modern GPT's last matrices begin at zero."""
    torch.manual_seed(0)
    built = build_model(name, **(SIZES | sizes)).eval()
    with torch.no_grad():
        for weight in built.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return built


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(64, 48, bias=bias)


@pytest.mark.parametrize("laid_out", [precision.ONEDNN, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 40])
def test_a_rounded_layer_is_the_layer_with_weights_on_a_grid(rows, bias, laid_out, monkeypatch):
    monkeypatch.setattr(precision, "ONEDNN", laid_out)
    layer = linear(bias)
    rounded = Int8Linear(layer)
    x = torch.randn(2, rows, 64).bfloat16()[:1]
    steps = layer.weight.abs().amax(1, keepdim=True).double() / 127
    steps = steps.float().bfloat16().double()  # the grid's step is kept in bf16
    grid = (layer.weight.double() / steps).round().clamp(-127, 127) * steps
    expected = x.double() @ grid.T + (layer.bias.double() if bias else 0)
    assert rounded(x).shape == (1, rows, 48)
    assert torch.allclose(rounded(x).double(), expected, atol=0.02, rtol=0.02)


def test_rounding_moves_no_weight_by_more_than_half_a_step():
    layer = linear()
    rounded = Int8Linear(layer)
    back = rounded.weight.float() * rounded.scale.float()[:, None]
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    assert ((back - layer.weight).abs() <= step * 1.01).all()  # the scale is rounded to bf16 too
    assert ((back - layer.weight).abs() <= step * 0.5).float().mean() > 0.7


def test_rows_of_very_different_size_and_of_zeros_are_each_rounded_by_themselves():
    layer = nn.Linear(32, 3, bias=False)
    with torch.no_grad():
        layer.weight[0] = torch.linspace(-1e-4, 1e-4, 32)
        layer.weight[1] = torch.linspace(-100, 100, 32)
        layer.weight[2] = 0
    x = torch.eye(32).bfloat16()[-1:]
    assert torch.allclose(Int8Linear(layer)(x).float(), torch.tensor([1e-4, 100.0, 0.0]), rtol=0.01)


@pytest.mark.parametrize("name", ["gpt", "lecture", "bigram"])
@pytest.mark.parametrize("how", ["bf16", "int8"])
def test_the_model_itself_stays_as_it_was(name, how):
    original = model(name)
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    narrow = for_writing(original, how)
    assert narrow is not original
    after = original.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())


@pytest.mark.parametrize("name", ["gpt", "lecture"])
def test_every_linear_layer_is_rounded(name):
    kinds = [type(module) for module in for_writing(model(name), "int8").modules()]
    assert nn.Linear not in kinds
    originals = sum(isinstance(module, nn.Linear) for module in model(name).modules())
    assert kinds.count(Int8Linear) == originals


@pytest.mark.parametrize("name", ["gpt", "lecture"])
@pytest.mark.parametrize("how", ["bf16", "int8"])
def test_probabilities_stay_nearly_what_they_were(name, how):
    original = model(name)
    ids = torch.randint(11, (3, 24))
    with torch.no_grad():
        exact = F.log_softmax(original(ids), -1)
        rounded = F.log_softmax(for_writing(original, how)(ids).float(), -1)
    lost = F.kl_div(rounded, exact, log_target=True, reduction="sum") / ids.numel()
    assert 0 < lost < 0.02  # nats a token; weights of 0.3 make for logits of tens


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt", "lecture"])
@pytest.mark.parametrize("how", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [3, 20])  # few, and so many that keys and values are in bf16 too
def test_token_by_token_they_stay_so_too(name, how, rows):
    original, narrow = model(name), for_writing(model(name), how)
    ids = torch.randint(11, (rows, 24))
    cache = KVCache(narrow.config, rows, torch.device("cpu"), torch.bfloat16)
    exact = F.log_softmax(original(ids), -1)
    steps = torch.cat([narrow(part, cache) for part in ids.split(1, dim=1)], dim=1)
    rounded = F.log_softmax(steps.float(), -1)
    assert cache.keys[0].dtype == (torch.bfloat16 if rows == 20 else torch.float32)
    lost = F.kl_div(rounded, exact, log_target=True, reduction="sum") / ids.numel()
    assert 0 < lost < 0.02


@pytest.mark.parametrize("name", ["gpt", "lecture"])
@pytest.mark.parametrize("how", ["fp32", "bf16", "int8"])
def test_each_precision_writes_on_past_the_window(name, how):
    written = for_writing(model(name), how)
    prompt = torch.randint(11, (2, 20))
    texts = list(generate(written, prompt, 40, Sampling(1.0), torch.Generator().manual_seed(3)))
    again = list(generate(written, prompt, 40, Sampling(1.0), torch.Generator().manual_seed(3)))
    assert len(texts) == 40 and texts == again


def test_fp32_is_the_model_itself():
    original = model("gpt")
    assert for_writing(original, "fp32") is original


def test_a_small_model_is_not_measured_however_large_its_embeddings(monkeypatch):
    monkeypatch.setattr(precision, "token_seconds", lambda model: pytest.fail("measured"))
    for sizes in ({}, {"n_gram": 12, "vocab_size": 200}):
        original = model("gpt", **sizes)
        assert for_writing(original, "auto") is original
    assert sum(p.numel() for p in original.parameters()) > 2 * precision.LARGE


@pytest.mark.parametrize(("fp32", "int8", "rounds"), [(2.0, 1.0, True), (1.4, 1.0, False)])
def test_a_large_one_is_rounded_where_that_is_clearly_quicker(monkeypatch, fp32, int8, rounds):
    original = model("gpt")
    monkeypatch.setattr(precision, "LARGE", 10)
    monkeypatch.setattr(
        precision, "token_seconds", lambda which: fp32 if which is original else int8
    )
    assert (for_writing(original, "auto") is not original) == rounds


def test_another_device_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(precision, "LARGE", 10)
    original = model("gpt").to("meta")
    assert for_writing(original, "auto") is original
    with pytest.raises(ValueError, match="--precision=int8 is for a CPU, not for --device=meta"):
        for_writing(original, "int8")


def test_an_unknown_precision_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--precision=fp8 is unknown; choose one of auto, fp32"):
        for_writing(model("gpt"), "fp8")


def test_measuring_draws_no_random_numbers():
    original, before = model("gpt"), torch.get_rng_state()
    assert precision.token_seconds(original) > 0
    assert torch.equal(before, torch.get_rng_state())
