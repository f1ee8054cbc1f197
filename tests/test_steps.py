"""Steps with static tensors against ordinary ones, also replayed without their Python code."""

import weakref

import pytest
import torch
from conftest import perturbed, seeded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt_lightning.generation import steps
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.generation.steps import GraphSteps, Steps
from gpt_lightning.model import CONFIGS, build_model

SIZES = dict(n_layer=2, n_head=2, n_embd=16)
SAMPLINGS = [Sampling(), Sampling(0), Sampling(0.9, top_k=5, top_p=0.9, repetition_penalty=1.3)]


class Tape(TorchDispatchMode):
    """Records the operations of a function on tensors, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, outputs in self.operations:
            for out, new in zip(
                tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if out.data_ptr() != new.data_ptr():  # not a view
                    out.copy_(new)


class Taped:
    """In place of `Recorded`: from the third call on it replays the second."""

    def __init__(self, device):
        self.tape, self.calls = Tape(), 0

    def __call__(self, function):
        self.calls += 1
        if self.calls == 2:
            with self.tape:
                self.output = function()
        elif self.calls > 2:
            self.tape.replay()
        return function() if self.calls == 1 else self.output


def build(name, block_size):
    torch.manual_seed(5)
    sizes = {} if name == "bigram" else SIZES
    return perturbed(build_model(CONFIGS[name](vocab_size=11, block_size=block_size, **sizes)))


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "greedy", "filters"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_static_steps_draw_the_same_tokens(name, sampling, replayed, monkeypatch):
    if replayed:
        monkeypatch.setattr(steps, "Recorded", Taped)
    for block_size, T in ((1, 1), (3, 2), (12, 1), (12, 10), (12, 30)):
        model = build(name, block_size)
        prompt, uniform = torch.randint(11, (3, T), generator=seeded(T)), torch.rand(30, 3)
        banned = torch.zeros(3, 11, dtype=torch.bool)
        plain, static = (kind(model, prompt, sampling, banned) for kind in (Steps, GraphSteps))
        for numbers in uniform:
            banned.copy_(torch.rand(3, 11) < 0.2)  # may change between steps
            expected = plain(numbers)
            assert torch.equal(static(numbers), expected)
            assert not banned.gather(1, expected[:, None]).any()


@torch.inference_mode()
def test_the_repetition_penalty_sees_the_window_only():
    model = build("bigram", 4)
    torch.nn.init.zeros_(model.token_embedding_table.weight).add_(torch.arange(11) * -1e-3 - 1)
    # negative logits, nearly equal: the penalty decides. A token is the least one not in the window
    found = Steps(model, torch.tensor([[0, 1]]), Sampling(0, repetition_penalty=1.5))
    numbers = torch.zeros(1)
    # windows 0 1, 0 1 2, 0 1 2 3, then 1 2 3 4, 2 3 4 0, ...
    assert [int(found(numbers)) for _ in range(6)] == [2, 3, 4, 0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "greedy", "filters"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_recorded_steps_draw_the_same_tokens_on_a_gpu(name, sampling):
    model = build(name, 12).cuda()
    prompt, uniform = torch.randint(11, (3, 5)), torch.rand(100, 3)
    plain, recorded = (kind(model, prompt, sampling) for kind in (Steps, GraphSteps))
    assert [plain(u).tolist() for u in uniform] == [recorded(u).tolist() for u in uniform]
    assert recorded.one_token.graph and recorded.restart.graph


def test_steps_are_freed_at_once():
    """Without a reference cycle, which would keep the memory of CUDA graphs."""
    found = GraphSteps(build("gpt", 4), torch.zeros(1, 1, dtype=torch.long), Sampling())
    for _ in range(9):
        found(torch.zeros(1))
    alive = weakref.ref(found)
    del found
    assert alive() is None
