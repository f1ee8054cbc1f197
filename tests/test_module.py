"""GPTModule under a real Trainer, against the definition of what it computes and logs."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import perturbed
from lightning.pytorch import Callback, Trainer

from gpt_lightning import (
    BigramConfig,
    GPTConfig,
    GPTModule,
    LectureConfig,
    OptimizerConfig,
    TextDataModule,
    TextGenerator,
    UserError,
)
from gpt_lightning.checkpoint import KEY
from gpt_lightning.training import optim
from gpt_lightning.training.hardware import compiler_fault
from gpt_lightning.training.saving import AtomicCheckpointIO

TEXT = "".join(f"{i} times {i} is {i * i};\n" for i in range(200))
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)

    def make(**settings) -> TextDataModule:
        dm = TextDataModule(str(path), **{"block_size": 8, "batch_size": 4, **settings})
        dm.prepare_data()
        dm.setup()
        return dm

    return make


def module(data: TextDataModule, config=None, optimizer=None, **settings) -> GPTModule:
    """A module whose network is built."""
    config = config or GPTConfig(**SMALL)
    config.vocab_size, config.block_size = data.vocab_size, data.hparams.block_size
    built = GPTModule(config, OptimizerConfig(**(optimizer or {})), **settings)
    built.configure_model()
    return built


def trainer(**settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": -1}
    return Trainer(accelerator="cpu", **{**quiet, **settings})


def next_token_loss(model: GPTModule, batch) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


class Recorder(Callback):
    """Keeps the batches, and both learning rates of each step."""

    def __init__(self):
        self.lrs, self.muon_lrs, self.batches = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        self.lrs += {group["lr"] for group in groups if not group.get("muon")}
        self.muon_lrs += [group["lr"] for group in groups if group.get("muon")]
        self.batches.append(batch)


PEAKS = {"learning_rate": 1.0, "min_lr": 0.2, "warmup_steps": 2, "muon_learning_rate": 0.1}
LINEAR = [1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4]
COSINE = [1 / 3, 2 / 3, 1.0, 0.88284271, 0.6, 0.31715729]


@pytest.mark.parametrize(
    ("settings", "lrs", "muon_lrs"),
    [
        (PEAKS, LINEAR, [0.1 * lr for lr in LINEAR]),
        ({**PEAKS, "optimizer": "adamw", "schedule": "cosine"}, COSINE, []),
        ({"learning_rate": 0.0, "muon_learning_rate": 0.1}, [0.0] * 6, [0.1] * 6),
    ],
)
def test_learning_rates_of_a_real_trainer_are_these(data, settings, lrs, muon_lrs):
    recorder, dm = Recorder(), data()
    fit = {"max_steps": 6, "callbacks": [recorder], "limit_val_batches": 0}
    trainer(**fit).fit(module(dm, optimizer=settings), dm)
    assert recorder.lrs == pytest.approx(lrs) and recorder.muon_lrs == pytest.approx(muon_lrs)


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"max_epochs": 2}])
def test_default_learning_rates_fall_linearly_to_zero_at_the_end_of_the_run(data, length):
    recorder, dm = Recorder(), data()
    trainer(**length, callbacks=[recorder], limit_val_batches=0).fit(module(dm), dm)
    steps = length.get("max_steps") or 2 * dm.batches_per_epoch()
    falling = [1 - i / steps for i in range(steps)]
    assert recorder.lrs == pytest.approx([8e-3 * part for part in falling])
    assert recorder.muon_lrs == pytest.approx([0.02 * part for part in falling])


@pytest.mark.parametrize("split", ["tail", "blocks"])
@pytest.mark.parametrize("batch_size", [3, 7])
def test_validation_loss_is_exact(data, split, batch_size):
    dm = data(split=split, batch_size=batch_size, val_fraction=0.3)
    model = perturbed(module(dm, GPTConfig(**SMALL, dropout=0.5)), 0.2).train()
    (found,) = trainer().validate(model, dm, verbose=False)
    model.eval()
    nats, count = 0.0, 0
    for start, stop in dm.val_spans:  # window by window, token by token
        text = torch.tensor(dm.tokens[start:stop].astype("int64"))
        for at in range(0, len(text) - 1, 8):
            x, y = text[at : at + 8][: len(text) - 1 - at], text[at + 1 : at + 9]
            log_probs = F.log_softmax(model(x[None])[0].double(), dim=-1)
            nats -= log_probs[range(len(y)), y].sum().item()
            count += len(y)
    assert count == sum(stop - start - 1 for start, stop in dm.val_spans)
    assert found["loss/val"] == pytest.approx(nats / count, rel=1e-5)
    assert found["loss/val_bits"] == pytest.approx(nats / count / math.log(2), rel=1e-5)


def test_validation_loss_of_bytes_is_per_character(data, tmp_path):
    (tmp_path / "text.txt").write_text("zwölf Boxkämpfer jagen Viktor über den Sylter Deich\n" * 40)
    dm = data(tokenizer="byte")
    model = module(dm)
    (found,) = trainer().validate(model, dm, verbose=False)
    held_out = bytes(dm.tokens[dm.val_spans[0][0] + 1 :])
    characters = len(held_out.decode("utf-8", "ignore"))
    with torch.no_grad():
        nats = sum(
            next_token_loss(model, batch).item() * batch[1].numel() for batch in dm.val_dataloader()
        )
    assert characters < len(held_out)
    assert found["loss/val"] == pytest.approx(nats / characters, rel=1e-5)


def test_lectures_estimate_is_the_mean_of_random_batches(data):
    dm = data()
    (found,) = trainer().validate(module(dm, eval_iters=200), dm, verbose=False)
    assert found["estimate/val"] == pytest.approx(found["loss/val"], abs=0.02)
    assert found["estimate/val"] != found["loss/val"]
    assert found["estimate/train"] == pytest.approx(found["loss/val"], abs=0.2)


def test_bf16_mixed_trains_in_bf16_and_validates_in_fp32(data):
    dm = data()
    model = module(dm)
    seen = {}

    def look(head, x, out):
        seen["train" if head.training else "val"] = out.dtype

    model.net.lm_head.register_forward_hook(look)
    fit = {"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer(precision="bf16-mixed", **fit).fit(model, dm)
    assert seen == {"train": torch.bfloat16, "val": torch.float32}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_weights_do_not_sum_the_loss_in_half_precision(data, precision):
    dm = data(val_fraction=0.5, batch_size=1)
    model = module(dm)
    (exact,) = trainer().validate(model, dm, verbose=False)
    (found,) = trainer(precision=precision).validate(model, dm, verbose=False)
    # the logits are zero at first, so that half-precision weights cost nothing
    assert found["loss/val"] == pytest.approx(exact["loss/val"], rel=1e-4)


@pytest.mark.parametrize("limit", [0.01, 1e3, None])
def test_logged_values_and_clipped_gradients_are_those_of_the_step(data, limit):
    logged, recorder, dm = [], Recorder(), data()
    model = module(dm, optimizer={"learning_rate": 0.0, "muon_learning_rate": 0.0})
    model.log_to_loggers = logged.append
    fit = {"max_steps": 3, "log_every_n_steps": 1, "accumulate_grad_batches": 2}
    settings = {"gradient_clip_val": limit, "callbacks": [recorder], "limit_val_batches": 0}
    trainer(**fit, **settings).fit(model, dm)
    found = [p.grad.clone() for p in model.parameters()]  # of the last step
    assert len(logged) == 3 and len(recorder.batches) == 6
    for step, metrics in enumerate(logged):
        model.zero_grad()
        batches = recorder.batches[2 * step : 2 * step + 2]
        for batch in batches:
            (model.training_step(batch, 0)["loss"] / 2).backward()
        mean = sum(next_token_loss(model, batch) for batch in batches) / 2
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or torch.inf)
        assert metrics["loss/train"] == pytest.approx(mean.item(), rel=1e-5)
        assert metrics["optimizer/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert (norm > 0.01) and (norm < 1e3)
    for grad, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(data):
    dm = data()
    model = module(dm, optimizer={"learning_rate": 1e30})
    with pytest.raises(UserError, match="lower learning_rate"):
        trainer(max_steps=20, limit_val_batches=0).fit(model, dm)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("heads", [0, 2, 9])
def test_multi_token_heads_add_the_weighted_losses_of_further_tokens(data, heads):
    dm = data()
    model = perturbed(module(dm, GPTConfig(**SMALL, multi_token_heads=heads)), 0.2)
    V, T = dm.vocab_size, dm.hparams.block_size
    ids, kept = torch.randint(V, (2, T + 1)), []
    model.net.lm_head.register_forward_pre_hook(lambda head, args: kept.append(args[0]))
    found = model.training_step((ids[:, :-1], ids[:, 1:]), 0)
    further = [head.weight for head in model.net.multi_token_heads]
    parts = []
    for n, weight in enumerate([model.net.lm_head.weight, *further[: T - 1]]):
        costs = [  # heads beyond that have no targets
            -torch.log_softmax(kept[0][row, t] @ weight.T, 0)[ids[row, t + 1 + n]]
            for row in range(2)
            for t in range(T - n)
        ]
        parts.append(torch.stack(costs).mean())
    expected = parts[0] + sum(0.3 / n * part for n, part in enumerate(parts) if n)
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["next"], parts[0].detach(), atol=1e-5, rtol=1e-5)


def test_confidence_penalty_subtracts_a_multiple_of_the_entropy(data):
    dm = data()
    config = GPTConfig(**SMALL, multi_token_heads=0)
    model = perturbed(module(dm, config, confidence_penalty=0.25), 0.2)
    ids = torch.randint(dm.vocab_size, (2, dm.hparams.block_size + 1))
    batch = ids[:, :-1], ids[:, 1:]
    entropy = torch.distributions.Categorical(logits=model(batch[0]).double()).entropy().mean()
    found, next_token = model.training_step(batch, 0), next_token_loss(model, batch)
    assert entropy > 0.1
    expected = (next_token.double() - 0.25 * entropy).float()
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["next"], next_token.detach())


@pytest.mark.parametrize("config, optimizer", [(GPTConfig, "muon"), (LectureConfig, "adamw")])
def test_two_accumulated_half_batches_equal_one_batch(data, config, optimizer, monkeypatch):
    # in bf16 one number that Muon rounds the other way grows to 1e-3 in these ten steps
    monkeypatch.setattr(optim, "computes_bf16", lambda device: False)
    results = []
    for accumulate in (1, 2):
        dm = data(batch_size=8 // accumulate)
        model = module(dm, config(**SMALL), {"optimizer": optimizer})
        fit = {"max_steps": 10, "limit_val_batches": 0, "accumulate_grad_batches": accumulate}
        trainer(**fit).fit(model, dm)
        results.append(dict(model.state_dict()))
    torch.testing.assert_close(*results, atol=5e-5, rtol=1e-4)


def test_initial_weights_depend_on_the_seed_alone(data):
    dm, weights = data(), []
    for global_seed, seed in ((1, 1337), (2, 1337), (2, 7)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        built = module(dm, seed=seed)
        weights.append(torch.nn.utils.parameters_to_vector(built.parameters()))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_model_sizes_come_from_the_data(data):
    dm, model = data(), GPTModule(GPTConfig(**SMALL))
    trainer(max_steps=1, limit_val_batches=0).fit(model, dm)
    assert (model.config.vocab_size, model.config.block_size) == (dm.vocab_size, 8)
    with pytest.raises(UserError, match="block_size=16 of the model is not the data's 8"):
        trainer(max_steps=1).fit(GPTModule(GPTConfig(**SMALL, block_size=16)), dm)


def test_compiling_keeps_the_names_of_the_weights(data):
    dm = data()
    plain, compiled = module(dm), module(dm, compile=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())


@pytest.mark.slow
def test_a_compiled_step_has_the_losses_and_gradients_of_an_eager_one(data):
    if compiler_fault(torch.device("cpu")):
        pytest.skip("there is no C++ compiler")
    dm = data()
    found = []
    for compile in (False, True):
        config = GPTConfig(**SMALL, multi_token_heads=2)
        model = module(dm, config, compile=compile, confidence_penalty=0.1)
        perturbed(model.net).train()
        outputs = model.losses(next(iter(dm.train_dataloader())))
        outputs["loss"].backward()
        found.append({name: p.grad for name, p in model.net.named_parameters()} | outputs)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_missing_compiler_is_a_users_mistake(data, monkeypatch):
    def fails(function):
        raise RuntimeError("no compiler\nand a long explanation")

    dm = data()
    model = module(dm, compile=True)
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"^compile=true: .*\(no compiler\)"):
        trainer(max_steps=1).fit(model, dm)


def test_loaders_of_a_users_own_need_no_length(data):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)

    loader = torch.utils.data.DataLoader(Endless(), batch_size=2)
    model = GPTModule(GPTConfig(**SMALL, vocab_size=3, block_size=8))
    fitting = trainer(max_steps=2, val_check_interval=1, limit_val_batches=2)
    fitting.fit(model, loader, loader)
    assert fitting.global_step == 2 and fitting.callback_metrics["loss/val"] > 0


def test_a_plain_trainers_checkpoint_loads_in_lightning_and_in_the_generator(data, tmp_path):
    dm = data()
    model = module(dm)
    t = trainer(max_steps=5, limit_val_batches=0, plugins=[AtomicCheckpointIO()])
    t.fit(model, dm)
    t.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)[KEY]["model"]["n_embd"] == 16
    loaded = GPTModule.load_from_checkpoint(tmp_path / "a.ckpt").state_dict()
    torch.testing.assert_close(dict(loaded), dict(model.state_dict()), rtol=0, atol=0)
    text = TextGenerator.load(tmp_path / "a.ckpt").generate("12 times", max_new_tokens=20, seed=3)
    assert text[0].startswith("12 times") and len(text[0]) == 28


def test_impossible_settings_name_the_field():
    with pytest.raises(UserError, match=r"^eval_iters=-5 must be"):
        GPTModule(eval_iters=-5)
    with pytest.raises(UserError, match="use optimizer=adamw"):
        GPTModule(BigramConfig())
