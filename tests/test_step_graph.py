"""A training step as a CUDA graph: when it is used, and that it changes nothing."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from gpt_lightning import GPTConfig, GPTModule, OptimizerConfig, TextDataModule
from gpt_lightning.training import step_graph

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1)


class LooksAtGradients(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        pass


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({}, True),
        ({"gradient_clip_val": 1.0}, True),
        ({"callbacks": [Callback()]}, True),
        ({"accumulate_grad_batches": 2}, False),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, False),
        ({"callbacks": [LooksAtGradients()]}, False),
        ({"strategy": "ddp"}, False),
    ],
)
def test_steps_are_recorded_only_where_nothing_needs_the_gradients(monkeypatch, settings, possible):
    trainer = Trainer(accelerator="cpu", **QUIET, **settings)
    assert not step_graph.can_record(trainer), "not on a CPU"
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda"))
    assert step_graph.can_record(trainer) is possible


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recorded_steps_are_bit_equal_to_eager_ones(optimizer, precision):
    weights = []
    for cuda_graph in (False, True):
        seed_everything(1)
        module = GPTModule(
            GPTConfig(n_layer=2, n_head=2, n_embd=32, dropout=0.1),
            OptimizerConfig(optimizer, learning_rate=1e-3, weight_decay=0.1),
            cuda_graph=cuda_graph,
        )
        data = TextDataModule("playwright:1:20000", block_size=32, batch_size=4)
        trainer = Trainer(
            accelerator="gpu", precision=precision, max_steps=20, gradient_clip_val=0.5, **QUIET
        )
        trainer.fit(module, data)
        weights.append(module.net.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
