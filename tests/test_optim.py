"""Optimizers against torch's own and against their definitions in double precision."""

import copy
import io
import math

import pytest
import torch
from conftest import perturbed, seeded
from torch import nn

from gpt_lightning.errors import UserError
from gpt_lightning.model import BigramConfig, GPTConfig, LectureConfig, build_model
from gpt_lightning.training import optim
from gpt_lightning.training.hardware import compiler_fault
from gpt_lightning.training.optim import (
    MuonAdamW,
    OptimizerConfig,
    build_optimizer,
    learning_rate_at,
    newton_schulz,
)

SIZES = dict(vocab_size=7, block_size=4)
GPT = GPTConfig(n_layer=2, n_head=2, n_embd=8, **SIZES)
LECTURE = LectureConfig(n_layer=1, n_head=2, n_embd=8, **SIZES)
BIGRAM = BigramConfig(**SIZES)
BF16 = torch.finfo(torch.bfloat16).eps


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=seeded(seed))


def random_gradients(model, seed):
    generator = seeded(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer", "sgd", "optimizer=sgd must be muon or adamw"),
        ("schedule", "step", "schedule=step must be linear or cosine"),
        ("min_lr", math.nan, "min_lr=nan must be a number of at least 0"),
        ("lr_decay_steps", -1, "lr_decay_steps=-1 must be a number of at least 0"),
        ("beta1", 1.0, "beta1=1.0 must be at least 0 and below 1"),
    ],
)
def test_a_value_out_of_range_raises_an_error_that_names_the_field(field, value, message):
    with pytest.raises(UserError, match=f"^{message}"):
        OptimizerConfig(**{field: value})


def test_muon_for_a_model_without_hidden_matrices_is_a_user_error():
    with pytest.raises(UserError, match="^optimizer=muon .* use optimizer=adamw"):
        build_optimizer(build_model(BIGRAM), OptimizerConfig())


@pytest.mark.parametrize(
    ("config", "settings", "decay", "hidden_decay", "muon"),
    [
        (LECTURE, dict(optimizer="adamw"), 0.1, 0.1, False),
        (LECTURE, dict(weight_decay=0.2, embedding_weight_decay=0.3), 0.3, 0.2, True),
        (GPT, dict(), 0.1, 0.0, True),
    ],
)
def test_parameters_are_grouped_by_optimizer_and_weight_decay(
    config, settings, decay, hidden_decay, muon
):
    model = build_model(config)
    model.lm_head.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(beta1=0.8, beta2=0.95, **settings))
    expected = {}
    for name, p in model.named_parameters():
        if name == "lm_head.weight":
            continue  # frozen
        if name.startswith("blocks.") and p.ndim == 2 and "embedding" not in name:
            expected[p] = hidden_decay, muon
        else:
            expected[p] = decay if p.ndim == 2 else 0.0, False
    found = {}
    for group in optimizer.param_groups:
        muon = bool(group.get("muon"))
        assert group["lr"] == (0.02 if muon else 8e-3) and group["betas"] == (0.8, 0.95)
        found |= {p: (group["weight_decay"], muon) for p in group["params"]}
    assert found == expected


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("config", [GPT, LECTURE])
def test_all_other_parameters_take_the_steps_of_torch_adamw(config, fused):
    model = perturbed(build_model(config))
    settings = OptimizerConfig(weight_decay=0.1, embedding_weight_decay=0.3)
    optimizer = build_optimizer(model, settings, fused)
    groups = [group for group in optimizer.param_groups if not group["muon"]]
    others = [p for group in groups for p in group["params"]]
    twins = [p.detach().clone().requires_grad_() for p in others]
    decays = [0.3 if p.ndim == 2 else 0.0 for p in others]
    pairs = [dict(params=[p], weight_decay=d) for p, d in zip(twins, decays, strict=True)]
    plain = torch.optim.AdamW(pairs, lr=0.02, betas=(0.9, 0.99))
    for step in range(6):
        random_gradients(model, step)
        for p, twin in zip(others, twins, strict=True):
            twin.grad = p.grad.clone()
        for group in groups + plain.param_groups:
            group["lr"] = 0.02 / (step + 1)  # as a schedule sets it
        optimizer.step()
        plain.step()
        torch.testing.assert_close(others, twins)


def muon_of(*matrices, lr=0.1, weight_decay=0.0):
    return MuonAdamW([dict(params=list(matrices), muon=True)], lr, weight_decay=weight_decay)


def relative_error(found, expected):
    return (found.double() - expected).norm() / expected.norm()


def newton_schulz_in_double(x):
    """The five steps as in the definition: a polynomial of one wide matrix, in double precision."""
    x = x.double() / x.double().norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    return x


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (24, 40)])
def test_muon_steps_follow_its_definition(shape, bf16, monkeypatch):
    monkeypatch.setattr(optim, "computes_bf16", lambda device: bf16)
    lr, decay, p = 0.1, 0.5, nn.Parameter(matrix(*shape))
    optimizer = muon_of(p, lr=lr, weight_decay=decay)
    average = torch.zeros(shape).double()
    for step in range(4):
        p.grad = matrix(*shape, seed=step + 1)
        average = 0.9 * average + 0.1 * p.grad.double()
        ahead = 0.1 * p.grad.double() + 0.9 * average  # Nesterov momentum
        wide = ahead if shape[0] <= shape[1] else ahead.mT
        expected = newton_schulz_in_double(wide) * math.sqrt(max(shape) / min(shape))
        before = p.detach().clone()
        optimizer.step()
        update = (before * (1 - lr * decay) - p.detach()) / lr
        update = update if shape[0] <= shape[1] else update.mT
        # the steps magnify rounding errors of the small singular values about tenfold
        assert relative_error(update, expected) < (30 * BF16 if bf16 else 1e-4)


def test_newton_schulz_of_zeros_is_zero():
    assert not newton_schulz(torch.zeros(2, 3, 3)).any()


def test_matrices_of_many_sizes_each_get_their_own_update():
    shapes = [(8, 8), (24, 8), (4, 4), (8, 32), (5, 8), (8, 8), (8, 5), (4, 8)]
    together = [nn.Parameter(matrix(*shape, seed=i)) for i, shape in enumerate(shapes)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [muon_of(*together), *(muon_of(p) for p in alone)]
    for step in range(3):
        for i, (p, twin) in enumerate(zip(together, alone, strict=True)):
            p.grad = matrix(*p.shape, seed=10 * step + i)
            twin.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for i, (p, twin) in enumerate(zip(together, alone, strict=True)):
        moved = (twin - matrix(*p.shape, seed=i)).double().detach()
        assert relative_error((p - matrix(*p.shape, seed=i)).detach(), moved) < 30 * BF16


def test_without_gradients_nothing_changes():
    model = build_model(GPT)
    optimizer = build_optimizer(model, OptimizerConfig())
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    random_gradients(model, 0)
    model.lm_head.weight.grad = None  # a parameter of AdamW's may lack one
    optimizer.step()
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert same == ["lm_head.weight"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_saved_optimizer_continues_with_identical_steps(kind):
    model, again = build_model(GPT), build_model(GPT)
    optimizer = build_optimizer(model, OptimizerConfig(kind, weight_decay=0.1))
    for step in range(3):
        random_gradients(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    resumed = build_optimizer(again, OptimizerConfig(kind, learning_rate=9.0))
    resumed.load_state_dict(state)
    for step in range(3, 6):
        for net, its_optimizer in ((model, optimizer), (again, resumed)):
            random_gradients(net, step)
            its_optimizer.step()
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


LINEAR = [0.2, 0.4, 0.6, 0.8, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1, 0.1]
COSINE = [
    0.2, 0.4, 0.6, 0.8, 1.0, 0.96574579, 0.86819805, 0.72220754, 0.55, 0.37779246, 0.23180195,
    0.13425421, 0.1, 0.1,
]  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "peak", "low", "warmup", "decay", "expected"),
    [
        ("linear", 1.0, 0.1, 4, 12, LINEAR),
        ("cosine", 1.0, 0.1, 4, 12, COSINE),
        ("cosine", 1.0, 0.1, 9, 3, [0.1, 0.2, 0.3, 0.4, 0.5]),  # the warm-up is longer than the run
        ("linear", 2.0, 0.1, 3, 0, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),  # no decay
    ],
)
def test_learning_rates_are_these(schedule, peak, low, warmup, decay, expected):
    config = OptimizerConfig(learning_rate=peak, schedule=schedule, min_lr=low, warmup_steps=warmup)
    found = [learning_rate_at(step, config, decay) for step in range(len(expected))]
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.slow
def test_muons_compiled_step_equals_the_eager_one():
    if compiler_fault(torch.device("cpu")):
        pytest.skip("there is no C++ compiler")
    results = []
    for update in (optim.muon_update, torch.compile(optim.muon_update)):
        params = [matrix(8, 24), matrix(24, 8, seed=1)]
        momentum = torch.zeros(2, 8, 24)
        for step in range(2):
            grads = [matrix(8, 24, seed=2 + step), matrix(24, 8, seed=4 + step)]
            lr = torch.tensor(0.1 / (step + 1))
            update(params, grads, momentum, lr, 0.5, 0.9, torch.float32)
        results.append([*params, momentum])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
