"""Quantised weights: what is rounded, by how much, and when."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt_lightning.errors import UserError
from gpt_lightning.generation import quantize as module
from gpt_lightning.generation.quantize import FEW, Int8Linear, quantize
from gpt_lightning.model import CONFIGS, build_model
from gpt_lightning.model.attention import KVCache

SIZES = dict(vocab_size=11, block_size=24, n_layer=2, n_head=2, n_embd=32)


def model(name: str, **sizes) -> nn.Module:
    """A model whose weights are not zero, as some of the modern GPT's are initially."""
    torch.manual_seed(0)
    fields = CONFIGS[name].__dataclass_fields__
    settings = {key: value for key, value in (SIZES | sizes).items() if key in fields}
    built = build_model(CONFIGS[name](**settings)).eval()
    with torch.no_grad():
        for weight in built.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return built


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_a_rounded_layer_equals_a_layer_with_weights_on_a_grid(rows, bias):
    torch.manual_seed(1)
    layer = nn.Linear(64, 48, bias=bias)
    rounded = Int8Linear(layer)
    x = torch.randn(1, rows, 64).bfloat16()
    steps = layer.weight.abs().amax(1, keepdim=True).double() / 127
    steps = steps.float().bfloat16().double()  # scales are bf16
    grid = (layer.weight.double() / steps).round().clamp(-127, 127) * steps
    expected = x.double() @ grid.T + (layer.bias.double() if bias else 0)
    assert rounded(x).shape == (1, rows, 48)
    assert torch.allclose(rounded(x).double(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ["gpt", "lecture", "bigram"])
def test_linear_layers_are_rounded_in_a_copy(name):
    original = model(name)
    before = copy.deepcopy(original.state_dict())
    narrow = quantize(original, "int8")
    for key, tensor in original.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(before[key], tensor)
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    kinds = [type(layer) for layer in narrow.modules()]
    linear_layers = sum(isinstance(layer, nn.Linear) for layer in original.modules())
    assert nn.Linear not in kinds and kinds.count(Int8Linear) == linear_layers


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt", "lecture"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [3, 20])  # a cache in fp32 and one in bf16
def test_probabilities_stay_close_token_by_token(name, precision, rows):
    original, narrow = model(name), quantize(model(name), precision)
    ids = torch.randint(11, (rows, 24))
    cache = KVCache(block_size=24)
    exact = F.log_softmax(original(ids), -1)
    steps = torch.cat([narrow(ids[:, :stop], cache) for stop in range(1, 25)], dim=1)
    rounded = F.log_softmax(steps.float(), -1)
    assert cache.layers[0][0].dtype == (torch.bfloat16 if rows == 20 else torch.float32)
    lost = F.kl_div(rounded, exact, log_target=True, reduction="sum") / ids.numel()
    assert 0 < lost < 0.02


def test_auto_does_not_measure_small_models_with_large_embeddings(monkeypatch):
    monkeypatch.setattr(module, "token_seconds", lambda model: pytest.fail("measured"))
    for sizes in ({}, {"n_gram": 12, "vocab_size": 200}):
        original = model("gpt", **sizes)
        assert quantize(original, "auto") is quantize(original, "fp32") is original
    assert sum(p.numel() for p in original.parameters()) > 2 * module.LARGE


@pytest.mark.parametrize(("fp32", "int8", "rounds"), [(2.0, 1.0, True), (1.4, 1.0, False)])
def test_auto_rounds_a_large_model_only_if_int8_is_clearly_faster(monkeypatch, fp32, int8, rounds):
    original = model("gpt")
    monkeypatch.setattr(module, "LARGE", 10)
    monkeypatch.setattr(module, "token_seconds", lambda which: fp32 if which is original else int8)
    assert (quantize(original, "auto") is not original) == rounds


def test_int8_is_for_a_cpu_only(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 10)
    original = model("gpt").to("meta")
    assert quantize(original, "auto") is original
    with pytest.raises(UserError, match="^precision=int8 is for a CPU, not for device=meta"):
        quantize(original, "int8")


def test_an_unknown_precision_raises():
    with pytest.raises(UserError, match="^precision=fp8 must be one of auto, fp32"):
        quantize(model("gpt"), "fp8")
