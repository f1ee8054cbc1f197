import math

import pytest
import torch
from torch import nn

from gpt_lightning.model import build_model
from gpt_lightning.training.optimizers import adamw, warmup_cosine

SIZES = dict(vocab_size=7, block_size=4, n_layer=1, n_head=2, n_embd=8)


def names_by_decay(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["weight_decay"]: [names[id(parameter)] for parameter in group["params"]]
        for group in optimizer.param_groups
    }


# --- AdamW ----------------------------------------------------------------------------------------


def test_weight_decay_pulls_on_matrices_only():
    model = build_model("lecture", **SIZES)
    optimizer = adamw(model, 1e-3, 0.1, (0.9, 0.99))
    assert names_by_decay(model, optimizer) == {
        0.1: [
            "token_embedding_table.weight",
            "position_embedding_table.weight",
            "blocks.0.sa.qkv.weight",
            "blocks.0.sa.proj.weight",
            "blocks.0.ffwd.net.0.weight",
            "blocks.0.ffwd.net.2.weight",
            "lm_head.weight",
        ],
        0.0: [
            "blocks.0.ln1.weight",
            "blocks.0.ln1.bias",
            "blocks.0.sa.proj.bias",
            "blocks.0.ln2.weight",
            "blocks.0.ln2.bias",
            "blocks.0.ffwd.net.0.bias",
            "blocks.0.ffwd.net.2.bias",
            "ln_f.weight",
            "ln_f.bias",
            "lm_head.bias",
        ],
    }
    assert all(g["lr"] == 1e-3 and g["betas"] == (0.9, 0.99) for g in optimizer.param_groups)


def test_a_model_of_matrices_alone_has_one_group():
    model = build_model("bigram", vocab_size=7, block_size=4)
    optimizer = adamw(model, 1e-3, 0.1, (0.9, 0.99))
    assert names_by_decay(model, optimizer) == {0.1: ["token_embedding_table.weight"]}


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert names_by_decay(model, adamw(model, 1e-3, 0.1, (0.9, 0.99))) == {0.1: ["weight"]}


def test_steps_are_those_of_adamw_s_formula():
    lr, decay, (b1, b2), eps = 0.05, 0.2, (0.8, 0.9), 1e-8
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.7)
        model.bias.fill_(-0.4)
    optimizer = adamw(model, lr, decay, (b1, b2))
    expected = {"weight": 0.7, "bias": -0.4}
    moments = {"weight": (0.0, 0.0), "bias": (0.0, 0.0)}
    gradients = {"weight": [0.3, -1.2, 0.5, 0.0], "bias": [2.0, 0.1, -0.7, 0.4]}
    for step in range(4):
        for name, parameter in model.named_parameters():
            g = gradients[name][step]
            parameter.grad = torch.full_like(parameter, g)
            m = b1 * moments[name][0] + (1 - b1) * g
            v = b2 * moments[name][1] + (1 - b2) * g * g
            moments[name] = m, v
            m, v = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
            w = expected[name]
            pull = decay if name == "weight" else 0.0
            expected[name] = w - lr * pull * w - lr * m / (math.sqrt(v) + eps)
        optimizer.step()
        found = {name: parameter.item() for name, parameter in model.named_parameters()}
        assert found == pytest.approx(expected, rel=1e-9)


# --- the learning rate ----------------------------------------------------------------------------


def rates(steps, *settings):
    return [warmup_cosine(step, *settings) for step in range(steps)]


def test_learning_rates_are_these():
    expected = [0.2, 0.4, 0.6, 0.8, 1.0]  # warm-up: step 4 is the first at the peak
    expected += [0.96574579, 0.86819805, 0.72220754, 0.55, 0.37779246, 0.23180195, 0.13425421]
    expected += [0.1, 0.1, 0.1]  # from step 12 on
    assert rates(15, 1.0, 0.1, 4, 12) == pytest.approx(expected, abs=1e-8)


def test_without_warmup_the_first_step_is_at_the_peak():
    high, low = (1 + math.sqrt(0.5)) / 2, (1 - math.sqrt(0.5)) / 2
    expected = [1.0, high, 0.5, low, 0.0, 0.0]
    assert rates(6, 1.0, 0.0, 0, 4) == pytest.approx(expected, abs=1e-12)


def test_a_warmup_longer_than_the_run_just_rises():
    assert rates(5, 1.0, 0.1, 9, 3) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("decay_steps", [0, -1])
def test_without_a_known_end_it_stays_at_the_peak(decay_steps):
    expected = [0.5, 1.0, 1.5] + [2.0] * 5
    assert rates(8, 2.0, 0.1, 3, decay_steps) == pytest.approx(expected)
    assert warmup_cosine(10**9, 2.0, 0.1, 3, decay_steps) == 2.0


def test_a_floor_at_the_peak_gives_a_constant_rate():
    assert rates(9, 0.3, 0.3, 0, 5) == pytest.approx([0.3] * 9)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 1000), (100, 1000), (1, 2000), (500, 1000)])
def test_it_rises_then_falls_without_a_jump(warmup, decay):
    found = rates(decay + 50, 1.0, 0.1, warmup, decay)
    steepest = max(1 / (warmup + 1) if warmup else 0, 0.9 * math.pi / 2 / (decay - warmup))
    changes = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(map(abs, changes)) <= steepest * (1 + 1e-9)
    assert all(change > 0 for change in changes[:warmup])
    assert all(change < 0 for change in changes[warmup:decay])
    assert all(change == 0 for change in changes[decay:])
    assert max(found) == found[warmup] == 1.0 and found[-1] == 0.1
