import copy
import io
import math

import pytest
import torch
from torch import nn

from gpt_lightning.model import build_model
from gpt_lightning.training.optimizers import (
    MuonAdamW,
    adamw,
    muon,
    newton_schulz,
    orthogonalise,
    scheduled,
)

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


# --- Muon with AdamW ------------------------------------------------------------------------------

BETAS = (0.8, 0.9)


def model_and_optimizer(name="gpt", learning_rate=0.02, weight_decay=0.1, fused=True, **sizes):
    torch.manual_seed(3)
    model = build_model(name, **{**SIZES, **sizes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model, muon(model, learning_rate, weight_decay, BETAS, fused)


def draw_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def muon_of(*matrices, lr=0.1, weight_decay=0.0, **more):
    """An optimizer of these matrices, all in one muon group."""
    group = {"params": list(matrices), "muon": True, "weight_decay": weight_decay}
    return MuonAdamW([group], lr=lr, **more)


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_matrices_inside_the_blocks_of_the_gpt_are_muon_s():
    model, optimizer = model_and_optimizer(n_layer=2)
    block = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight"]
    assert names_by_decay(model, optimizer) == {
        0.0: [
            "token_embedding.weight",
            "pair_embedding.weight",
            "ngram_embeddings.0.weight",
            "blocks.0.attn.value_embedding.weight",
            "blocks.1.attn.value_embedding.weight",
            "lm_head.weight",
        ],
        0.1: [f"blocks.{layer}.{name}" for layer in range(2) for name in block],
    }
    assert [group["muon"] for group in optimizer.param_groups] == [False, True]
    assert all(g["lr"] == 0.02 and g["betas"] == BETAS for g in optimizer.param_groups)


def test_matrices_inside_the_blocks_of_the_lecture_s_model_are_muon_s():
    model = build_model("lecture", **SIZES)
    optimizer = muon(model, 0.02, 0.1, BETAS, embedding_weight_decay=0.3)
    assert names_by_decay(model, optimizer) == {
        0.3: ["token_embedding_table.weight", "position_embedding_table.weight", "lm_head.weight"],
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
        0.1: [
            "blocks.0.sa.qkv.weight",
            "blocks.0.sa.proj.weight",
            "blocks.0.ffwd.net.0.weight",
            "blocks.0.ffwd.net.2.weight",
        ],
    }
    assert [group["muon"] for group in optimizer.param_groups] == [False, False, True]


@pytest.mark.parametrize(("name", "sizes"), [("bigram", {}), ("lecture", dict(n_layer=0))])
def test_a_model_without_such_matrices_is_refused_in_one_line(name, sizes):
    with pytest.raises(ValueError) as error:
        muon(build_model(name, **{**SIZES, **sizes}), 0.02, 0.1, BETAS)
    message = str(error.value)
    assert message.startswith("--model.optimizer=muon") and "adamw" in message
    assert "\n" not in message


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["gpt", "lecture"])
def test_all_else_takes_the_very_steps_of_torch_s_adamw(name, fused):
    model, optimizer = model_and_optimizer(name, fused=fused)
    others = optimizer.param_groups[0]["params"]
    twins = [p.detach().clone().requires_grad_() for p in others]
    plain = torch.optim.AdamW(twins, lr=0.02, betas=BETAS, weight_decay=0.0, fused=fused)
    for step in range(6):
        draw_gradients(model, step)
        for p, twin in zip(others, twins, strict=True):
            twin.grad = p.grad.clone()
        for group in optimizer.param_groups + plain.param_groups:
            group["lr"] = 0.02 / (step + 1)  # as a schedule sets it
        optimizer.step()
        plain.step()
        for p, twin in zip(others, twins, strict=True):
            assert torch.equal(p, twin)


def test_a_matrix_moves_along_its_averaged_gradient_with_singular_values_near_1():
    lr, decay, p = 0.1, 0.5, nn.Parameter(matrix(16, 16))
    optimizer = muon_of(p, lr=lr, weight_decay=decay)
    average = torch.zeros(16, 16).double()
    for step in range(5):
        p.grad = matrix(16, 16, seed=step + 28)
        average = 0.9 * average + 0.1 * p.grad.double()
        ahead = 0.1 * p.grad.double() + 0.9 * average
        before = p.detach().clone()
        optimizer.step()
        update = ((before * (1 - lr * decay) - p.detach()) / lr).double()
        u, sizes, vh = torch.linalg.svd(ahead)
        assert sizes[-1] / sizes.norm() > 0.005  # smaller ones would need more than five steps
        found = u.T @ update @ vh.T
        values = found.diagonal()
        assert values.min() > 0.6 and values.max() < 1.25
        assert (found - values.diag()).norm() < 0.15  # the directions stay
        assert torch.cosine_similarity(update.flatten(), (u @ vh).flatten(), dim=0) > 0.97


def test_singular_values_of_every_size_come_near_1():
    U, V = (torch.linalg.qr(matrix(24, 24, seed))[0] for seed in (1, 2))
    S = torch.logspace(0, -2, 24)
    for factor in (1e-6, 1.0, 1e6):
        found = newton_schulz((U * S @ V.T * factor)[None])[0]
        values = torch.diagonal(U.T @ found @ V)
        assert values.min() > 0.6 and values.max() < 1.25
        assert (found - U * values @ V.T).norm() < 0.1  # the directions stay
    assert newton_schulz(torch.zeros(2, 3, 3)).tolist() == torch.zeros(2, 3, 3).tolist()


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (128, 32), (40, 24)])
def test_square_and_tall_matrices_take_the_steps_of_torch_s_muon(shape):
    p, twin = (nn.Parameter(matrix(*shape)) for _ in range(2))
    ours = muon_of(p, lr=0.1, weight_decay=0.3)
    theirs = torch.optim.Muon([twin], lr=0.1, weight_decay=0.3, momentum=0.9, nesterov=True)
    for step in range(6):
        p.grad = matrix(*shape, seed=step + 1)
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        # bf16 knows three digits; a step has entries of about 0.1 / sqrt(32) = 0.02
        torch.testing.assert_close(p, twin, atol=0.002 * (step + 1), rtol=0)
        assert (p - twin).square().mean().sqrt() < 0.0004 * (step + 1)


def test_a_wide_matrix_takes_the_steps_of_its_tall_twin():
    wide, tall = nn.Parameter(matrix(16, 64)), nn.Parameter(matrix(16, 64).mT.contiguous())
    ours, twin = muon_of(wide, lr=0.1), muon_of(tall, lr=0.1)
    for step in range(3):
        wide.grad = matrix(16, 64, seed=step + 1)
        tall.grad = wide.grad.mT.contiguous()
        ours.step()
        twin.step()
        torch.testing.assert_close(wide.mT, tall, atol=0.002, rtol=0)


@pytest.mark.parametrize("shape", [(48, 16), (64, 16), (16, 64), (16, 16), (5, 8), (20, 16)])
def test_a_step_changes_entries_by_as_much_in_every_shape(shape):
    U, S, Vh = torch.linalg.svd(matrix(*shape), full_matrices=False)
    (found,) = orthogonalise([U * torch.linspace(1, 0.1, len(S)) @ Vh])
    values = torch.linalg.svdvals(found) / math.sqrt(max(shape) / min(shape))
    assert values.min() > 0.6 and values.max() < 1.25
    root = found.square().mean().sqrt() * math.sqrt(min(shape))
    assert 0.6 < root < 1.25  # a square one of the short side: 1 / sqrt(short)


def test_matrices_of_many_sizes_each_get_their_own_back():
    shapes = [(8, 8), (24, 8), (4, 4), (8, 32), (5, 8), (8, 8), (8, 5), (4, 8)]
    matrices = [matrix(*shape, seed=i) for i, shape in enumerate(shapes)]
    before = [m.clone() for m in matrices]
    for m, found in zip(before, orthogonalise(matrices), strict=True):
        (alone,) = orthogonalise([m])
        assert found.shape == m.shape and found.dtype == m.dtype
        torch.testing.assert_close(found, alone, atol=0.02, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(matrices, before, strict=True))


def test_weight_decay_pulls_on_muon_s_matrices_only():
    model, optimizer = model_and_optimizer(weight_decay=0.5)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    hidden = {id(p) for p in optimizer.param_groups[1]["params"]}
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, old * (1 - 0.02 * 0.5 * (id(p) in hidden)))


@pytest.mark.parametrize("name", ["gpt", "lecture"])
def test_a_decay_of_its_own_pulls_on_embeddings_and_head_and_on_no_vector(name):
    torch.manual_seed(0)
    model = build_model(name, **SIZES)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    optimizer = muon(model, 0.02, 0.0, BETAS, embedding_weight_decay=0.3)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    pulled = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    tables = {key for key, p in model.named_parameters() if "embedding" in key or "head.w" in key}
    assert pulled == tables
    for key in pulled:
        torch.testing.assert_close(model.state_dict()[key], before[key] * (1 - 0.02 * 0.3))


def test_parameters_without_a_gradient_stay():
    model, optimizer = model_and_optimizer()
    draw_gradients(model, 0)
    left = [model.blocks[0].attn.proj.weight, model.lm_head.weight]
    for parameter in left:
        parameter.grad = None
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert same == ["blocks.0.attn.proj.weight", "lm_head.weight"]
    assert not any(optimizer.state.get(p) for p in left)
    draw_gradients(model, 1)  # one that comes later starts from its own first step
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in left] == [1, 1]


def test_without_any_gradient_nothing_happens():
    model, optimizer = model_and_optimizer()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gradients_are_left_as_they_are():
    model, optimizer = model_and_optimizer()
    draw_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_saved_optimizer_goes_on_as_if_it_had_never_stopped():
    model, optimizer = model_and_optimizer(n_layer=2)
    for step in range(3):
        draw_gradients(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, fresh = model_and_optimizer(n_layer=2, learning_rate=9.0)
    again.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert [group["muon"] for group in fresh.param_groups] == [False, True]
    assert [group["lr"] for group in fresh.param_groups] == [0.02, 0.02]
    for step in range(3, 7):
        draw_gradients(model, step)
        draw_gradients(again, step)
        optimizer.step()
        fresh.step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        ours, theirs = optimizer.state[a], fresh.state[b]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_each_kind_of_parameter_has_its_state():
    model, optimizer = model_and_optimizer()
    for step in range(2):
        draw_gradients(model, step)
        optimizer.step()
    others, hidden = (group["params"] for group in optimizer.param_groups)
    assert all(optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} for p in others)
    assert all(optimizer.state[p].keys() == {"step", "momentum"} for p in hidden)
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_the_closure_is_run_once_with_gradients_and_its_loss_returned():
    (model, optimizer), (twin, plain) = model_and_optimizer(), model_and_optimizer()
    ids, losses = torch.tensor([[1, 2, 3, 4]]), []

    def closure():
        optimizer.zero_grad()
        losses.append(model(ids).square().mean())
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0] and len(losses) == 1
    twin(ids).square().mean().backward()
    assert plain.step() is None
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_the_groups_are_the_same_after_a_step():
    model, optimizer = model_and_optimizer()
    groups = optimizer.param_groups
    draw_gradients(model, 0)
    optimizer.step()
    assert optimizer.param_groups is groups and len(groups) == 2


def test_the_groups_are_the_same_after_a_step_that_fails():
    model, optimizer = model_and_optimizer()
    groups = optimizer.param_groups
    draw_gradients(model, 0)
    model.lm_head.weight.grad = model.lm_head.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.param_groups is groups


def test_hooks_of_a_step_are_run_once():
    model, optimizer = model_and_optimizer()
    adamw(model, 1e-3, 0.1, BETAS)  # that torch has prepared AdamW's own step makes no difference
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    draw_gradients(model, 0)
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("name", ["gpt", "lecture"])
def test_it_learns(name):
    model, optimizer = model_and_optimizer(name, n_embd=16)
    ids = torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        logits = model(ids[:, :-1])
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# --- the learning rate ----------------------------------------------------------------------------


def rates(steps, *settings, **more):
    return [scheduled(step, *settings, **more) for step in range(steps)]


def test_learning_rates_are_these():
    expected = [0.2, 0.4, 0.6, 0.8, 1.0]  # warm-up: step 4 is the first at the peak
    expected += [0.96574579, 0.86819805, 0.72220754, 0.55, 0.37779246, 0.23180195, 0.13425421]
    expected += [0.1, 0.1, 0.1]  # from step 12 on
    assert rates(15, 1.0, 0.1, 4, 12) == pytest.approx(expected, abs=1e-8)


def test_learning_rates_of_a_linear_fall_are_these():
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]
    expected += [0.1, 0.1, 0.1]  # from step 12 on
    assert rates(15, 1.0, 0.1, 4, 12, shape="linear") == pytest.approx(expected)
    assert rates(4, 1.0, 0.0, 0, 2, shape="linear") == [1.0, 0.5, 0.0, 0.0]
    assert rates(4, 1.0, 0.1, 9, 3, shape="linear") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates(5, 1.0, 0.1, 1, 0, shape="linear") == [0.5, 1.0, 1.0, 1.0, 1.0]


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
    assert scheduled(10**9, 2.0, 0.1, 3, decay_steps) == 2.0


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
