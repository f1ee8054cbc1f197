"""The LightningModule under a real Trainer, against the definition of what it logs."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer

from gpt_lightning import GPTModule, TextDataModule
from gpt_lightning.training.callbacks import RunLog
from gpt_lightning.training.checkpointing import AtomicCheckpointIO, BestAndLast

TEXT = "".join(f"{i} times {i} is {i * i};\n" for i in range(200))
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)

    def make(**settings) -> TextDataModule:
        return TextDataModule(str(path), **{"block_size": 8, "batch_size": 4, **settings})

    return make


def module(data: TextDataModule, **settings) -> GPTModule:
    torch.manual_seed(0)
    sizes = {"vocab_size": data.vocab_size, "block_size": data.hparams.block_size}
    return GPTModule(**{**sizes, **SMALL, **settings})


def trainer(**settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    still = {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": -1}
    return Trainer(accelerator="cpu", **{**quiet, **still, **settings})


class Watch(Callback):
    """Keeps what each step was trained on and at which learning rates, AdamW's and Muon's."""

    def __init__(self):
        self.lrs, self.muon_lrs, self.batches = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        self.lrs += {group["lr"] for group in groups if not group.get("muon")}  # the same in all
        self.muon_lrs += [group["lr"] for group in groups if group.get("muon")]
        self.batches.append(batch)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rates_are_these_through_a_real_trainer(data, schedule, optimizer):
    watch, dm = Watch(), data()
    model = module(dm, learning_rate=1.0, min_lr=0.2, warmup_steps=3, muon_learning_rate=0.1,
                   schedule=schedule, optimizer=optimizer)  # fmt: skip
    trainer(max_steps=8, callbacks=[watch], limit_val_batches=0).fit(model, dm)
    left = [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]
    left = [1 - i / 5 for i in range(5)] if schedule == "linear" else left
    expected = [0.25, 0.5, 0.75, *(0.2 + 0.8 * share for share in left)]
    assert watch.lrs == pytest.approx(expected)
    expected = [0.1 * lr for lr in expected] if optimizer == "muon" else []
    assert watch.muon_lrs == pytest.approx(expected)


def test_learning_rates_that_are_left_to_us_fall_in_a_line_to_0(data):
    watch, dm = Watch(), data()
    trainer(max_steps=5, callbacks=[watch], limit_val_batches=0).fit(module(dm), dm)
    falling = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert watch.lrs == pytest.approx([8e-3 * share for share in falling])
    assert watch.muon_lrs == pytest.approx([0.02 * share for share in falling])


def test_muon_keeps_its_rate_where_adamw_has_none(data):
    watch, dm = Watch(), data()
    model = module(dm, learning_rate=0.0, muon_learning_rate=0.1)
    trainer(max_steps=2, callbacks=[watch], limit_val_batches=0).fit(model, dm)
    assert watch.lrs == [0.0, 0.0] and watch.muon_lrs == [0.1, 0.1]


def test_warmup_longer_than_the_run_just_rises(data):
    watch, dm = Watch(), data()
    model = module(dm, learning_rate=1.0, warmup_steps=9)
    trainer(max_steps=4, callbacks=[watch], limit_val_batches=0).fit(model, dm)
    assert watch.lrs == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_schedule_of_a_run_measured_in_epochs_ends_with_it(data):
    watch, dm = Watch(), data()
    model = module(dm, learning_rate=1.0, min_lr=0.0, warmup_steps=0)
    trainer(max_epochs=2, callbacks=[watch], limit_val_batches=0).fit(model, dm)
    steps = 2 * dm.batches_per_epoch()
    assert len(watch.lrs) == steps
    assert watch.lrs == pytest.approx([1 - i / steps for i in range(steps)])


@pytest.mark.parametrize("split", ["tail", "blocks"])
@pytest.mark.parametrize("batch_size", [3, 7])
def test_validation_loss_is_exact(data, split, batch_size):
    dm = data(split=split, batch_size=batch_size, val_fraction=0.3)
    model = module(dm, dropout=0.5)
    t = trainer()
    (found,) = t.validate(model, dm, verbose=False)
    nats, count = 0.0, 0
    model.eval()
    for start, stop in dm.val_spans:  # window by window, token by token
        text = torch.tensor(dm.tokens[start:stop].astype("int64"))
        for at in range(0, len(text) - 1, 8):
            x, y = text[at : at + 8][: len(text) - 1 - at], text[at + 1 : at + 9]
            logits = model(x[None])[0].double()
            for t_, target in enumerate(y):
                nats -= F.log_softmax(logits[t_], dim=-1)[target].item()
                count += 1
    assert count == sum(stop - start - 1 for start, stop in dm.val_spans)
    assert found["val/loss"] == pytest.approx(nats / count, abs=1e-6)
    assert found["val/bpc"] == pytest.approx(nats / count / math.log(2), abs=1e-6)


def test_validation_loss_of_bytes_is_told_per_character(data, tmp_path):
    (tmp_path / "text.txt").write_text("zwölf Boxkämpfer jagen Viktor über den Sylter Deich\n" * 40)
    dm = data(tokenizer="byte")
    model = module(dm)
    (found,) = trainer().validate(model, dm, verbose=False)
    held_out = bytes(dm.tokens[dm.val_spans[0][0] + 1 :])
    characters = len(held_out.decode("utf-8", "ignore"))
    per_byte = sum(
        model.loss(batch, reduction="sum").item() for batch in dm.val_dataloader()
    ) / len(held_out)
    assert characters < len(held_out)
    expected = per_byte * len(held_out) / characters
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5)


def test_lectures_estimator_is_the_mean_of_random_batches(data):
    dm = data()
    model = module(dm, eval_iters=200)
    (found,) = trainer().validate(model, dm, verbose=False)
    assert found["estimate/val"] == pytest.approx(found["val/loss"], abs=0.02)
    assert found["estimate/val"] != found["val/loss"]
    assert found["estimate/train"] == pytest.approx(found["val/loss"], abs=0.2)


def test_bf16_trains_in_bf16_and_validates_in_fp32(data):
    dm = data()
    model = module(dm)
    seen = {}

    def look(head, x, out):
        seen["train" if head.training else "val"] = out.dtype

    model.net.lm_head.register_forward_hook(look)
    trainer(precision="bf16-mixed", max_steps=2, val_check_interval=2,
            check_val_every_n_epoch=None).fit(model, dm)  # fmt: skip
    assert seen == {"train": torch.bfloat16, "val": torch.float32}


def test_logged_train_loss_and_grad_norm_are_those_of_the_step(data):
    class Keep(RunLog):
        def write(self, trainer, module):
            super().write(trainer, module)
            kept.append((float(trainer.callback_metrics["train/loss"]), float(module.grad_norm)))

    kept, watch = [], Watch()
    dm = data()
    rates = {"learning_rate": 0.0, "muon_learning_rate": 0.0}  # weights stand still
    model = module(dm, **rates)
    model.configure_callbacks = lambda: [Keep()]
    trainer(max_steps=3, log_every_n_steps=1, gradient_clip_val=0.01, callbacks=[watch],
            limit_val_batches=0, accumulate_grad_batches=2).fit(model, dm)  # fmt: skip
    assert len(kept) == 3 and len(watch.batches) == 6
    for step, (loss, norm) in enumerate(kept):
        model.zero_grad()
        batches = watch.batches[2 * step : 2 * step + 2]
        for batch in batches:
            (model.training_step(batch, 0)["loss"] / 2).backward()
        mean = sum(model.loss(batch) for batch in batches) / 2
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert loss == pytest.approx(mean.item(), abs=1e-5)
        assert norm == pytest.approx(grads.norm().item(), rel=1e-4)  # before clipping


@pytest.mark.parametrize(("limit", "longer"), [(0.01, True), (1e3, False), (None, False)])
def test_a_gradient_is_clipped_as_torch_does_it(data, limit, longer):
    class Watched(GPTModule):
        def configure_gradient_clipping(self, *args, **settings):
            expected = [p.grad.clone() for p in self.parameters()]
            copies = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in expected]
            for copy, grad in zip(copies, expected, strict=True):
                copy.grad = grad
            norm = torch.nn.utils.clip_grad_norm_(copies, limit or torch.inf)
            super().configure_gradient_clipping(*args, **settings)
            assert (limit is not None and norm > limit) == longer
            seen.append((copies, [p.grad.clone() for p in self.parameters()]))

    seen, dm = [], data()
    model = Watched(dm.vocab_size, dm.hparams.block_size, n_layer=2, n_head=2, n_embd=16)
    trainer(max_steps=3, gradient_clip_val=limit, limit_val_batches=0).fit(model, dm)
    assert len(seen) == 3
    for copies, found in seen:
        for copy, grad in zip(copies, found, strict=True):
            torch.testing.assert_close(grad, copy.grad)


def perturb(model):
    """Weights none of which are zero any more."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)


@pytest.mark.parametrize("look_ahead", [0, 1, 2])
def test_looking_ahead_adds_what_the_tokens_after_the_next_one_cost(data, look_ahead):
    dm = data()
    model = module(dm, look_ahead=look_ahead).eval()
    perturb(model)
    V, T = dm.vocab_size, dm.hparams.block_size
    ids = torch.randint(V, (2, T + 1))
    kept = []
    model.net.lm_head.register_forward_pre_hook(lambda head, args: kept.append(args[0]))
    found = model.training_step((ids[:, :-1], ids[:, 1:]), 0)
    weights = [model.net.lm_head.weight, *(head.weight for head in model.ahead)]
    parts = []
    for n, weight in enumerate(weights):
        costs = [
            -torch.log_softmax(kept[0][row, t] @ weight.T, 0)[ids[row, t + 1 + n]]
            for row in range(2)
            for t in range(T - n)
        ]
        parts.append(torch.stack(costs).mean())
    expected = parts[0] + sum(0.3 / n * part for n, part in enumerate(parts) if n)
    assert len(parts) == look_ahead + 1 and len(kept) == 1
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["next"], parts[0].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.loss((ids[:, :-1], ids[:, 1:])), parts[0])


def test_heads_that_look_ahead_begin_at_zero_learn_and_are_no_part_of_the_model_that_writes(data):
    dm = data()
    model = module(dm)
    assert len(model.ahead) == 1 and not model.ahead[0].weight.any()
    trainer(max_steps=2, limit_val_batches=0).fit(model, dm)
    assert model.ahead[0].weight.abs().sum() > 0
    assert not any("ahead" in name for name in model.net.state_dict())


@pytest.mark.parametrize("name", ["gpt", "lecture", "bigram"])
def test_the_confidence_penalty_is_so_many_times_the_entropy_of_what_is_predicted(data, name):
    dm = data()
    settings = {"name": name, "optimizer": "adamw", "look_ahead": 0}
    model = module(dm, confidence_penalty=0.25, **settings).eval()
    perturb(model)
    ids = torch.randint(dm.vocab_size, (2, dm.hparams.block_size + 1))
    batch = ids[:, :-1], ids[:, 1:]
    found = model.training_step(batch, 0)
    entropy = torch.distributions.Categorical(logits=model(batch[0]).double()).entropy().mean()
    expected = model.loss(batch).double() - 0.25 * entropy
    assert entropy > 0.1
    torch.testing.assert_close(found["loss"].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["next"], model.loss(batch).detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lecture", "look_ahead": 1}, "--model.look_ahead=1 is for --model.name=gpt"),
        ({"name": "bigram", "n_gram": 2}, "--model.n_gram=2 is for --model.name=gpt"),
        ({"look_ahead": -1}, "--model.look_ahead=-1 must be 0 or more"),
        ({"look_ahead": 8, "block_size": 8}, "--model.look_ahead=8 must be below --data.block"),
    ],
)
def test_what_only_the_modern_gpt_has_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTModule(**({"vocab_size": 5, "block_size": 8, "n_embd": 16} | settings))


@pytest.mark.parametrize("n_gram, rows", [(None, [125]), (2, []), (4, [125, 625])])
def test_up_to_triples_n_grams_have_embeddings_unless_told_otherwise(n_gram, rows):
    tables = GPTModule(5, 8, n_embd=16, n_gram=n_gram).net.ngram_embeddings
    assert [len(table.weight) for table in tables] == rows


def test_a_window_of_one_token_has_nothing_further_ahead():
    assert len(GPTModule(5, 1, n_embd=16).ahead) == 0
    assert len(GPTModule(5, 8, name="lecture").ahead) == 0


@pytest.mark.parametrize("name, optimizer", [("gpt", "muon"), ("lecture", "adamw")])
def test_accumulating_twice_half_a_batch_is_one_batch(data, name, optimizer, monkeypatch):
    # in bf16, one number that Muon rounds the other way grows to 1e-3 in these ten steps
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    results = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        dm = data(batch_size=batch_size)
        model = module(dm, name=name, optimizer=optimizer)
        trainer(max_steps=10, limit_val_batches=0, accumulate_grad_batches=accumulate).fit(
            model, dm
        )
        results.append(model.state_dict())
    for key, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][key], atol=5e-5, rtol=1e-4)


def test_overfitting_one_batch_learns_it_by_heart(data):
    watch, dm = Watch(), data(overfit_batches=1)
    model = module(dm, learning_rate=1e-2, warmup_steps=5, lr_decay_steps=0)
    trainer(max_steps=200, callbacks=[watch], limit_val_batches=0).fit(model, dm)
    assert all(torch.equal(x, watch.batches[0][0]) for x, _ in watch.batches)
    # what is left is not knowing how a window that begins anywhere goes on
    assert model.loss(watch.batches[0]).item() < 0.35


def test_compile_keeps_the_names_of_the_weights(data):
    dm = data()
    plain, compiled = module(dm), module(dm, compile=True)
    compiled.configure_model()
    assert compiled.net._compiled_call_impl is not None
    assert list(plain.state_dict()) == list(compiled.state_dict())


def test_plain_trainer_saves_what_generate_reads(data, tmp_path):
    dm = data()
    model = module(dm)
    t = trainer(max_steps=5, limit_val_batches=0, plugins=[AtomicCheckpointIO()])
    t.fit(model, dm)
    t.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["gpt_lightning"]["model"]["n_embd"] == 16
    loaded = GPTModule.load_from_checkpoint(tmp_path / "a.ckpt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])

    from gpt_lightning import Writer

    text = Writer.load(tmp_path / "a.ckpt").write("12 times", max_new_tokens=20, seed=3)[0]
    assert text.startswith("12 times") and len(text) == 28


def test_a_run_does_not_overwrite_anothers_checkpoints(data, tmp_path):
    dm = data()
    keep = {"enable_checkpointing": True, "limit_val_batches": 0, "default_root_dir": tmp_path}
    trainer(max_steps=2, callbacks=[BestAndLast()], **keep).fit(module(dm), dm)
    before = (tmp_path / "checkpoints/last.ckpt").read_bytes()
    with pytest.raises(ValueError, match="earlier run's checkpoints"):
        trainer(max_steps=2, callbacks=[BestAndLast()], **keep).fit(module(dm), dm)
    assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == before


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"a": lambda: None}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    "flag, value",
    [("learning_rate", -1.0), ("warmup_steps", -1), ("beta1", 1.0), ("weight_decay", math.nan),
     ("eval_iters", -5), ("name", "gtp")],
)  # fmt: skip
def test_impossible_settings_are_named_in_one_line(flag, value):
    with pytest.raises(ValueError, match=f"--model.{flag}=") as error:
        GPTModule(vocab_size=5, block_size=8, **{flag: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer, decay", [("muon", 0.0), ("adamw", 0.1)])
def test_weight_decay_unless_given_follows_the_optimizer(data, optimizer, decay):
    settings = {"name": "gpt", "optimizer": optimizer}
    assert module(data(), **settings).hparams.weight_decay == decay
    assert module(data(), **settings, weight_decay=0.3).hparams.weight_decay == 0.3
