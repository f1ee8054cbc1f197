"""The checkpoint callback: what it keeps, when it saves, and that a resumed run is the same run."""

import shutil
import signal
import sys

import pytest
import torch
from kills import differences
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from gpt_lightning.checkpoint import KEY
from gpt_lightning.errors import UserError
from gpt_lightning.training.saving import AtomicCheckpointIO, BestAndLast, Interrupted

pytestmark = [  # about loaders that are simpler than ours
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
]
CORPUS = {"name": "a text", "sha256": "", "split": "tail", "val_fraction": 0.1}
DESCRIPTION = {"format": 1, "model": {}, "tokenizer": {}, "corpus": CORPUS, "settings": None}
EVERY_4 = {"val_check_interval": 4, "check_val_every_n_epoch": None}


class Batches(IterableDataset):
    """The batches 0, 1, 2, ... of a run, `epoch` of them in each epoch, from the current step."""

    def __init__(self, module, epoch):
        self.module, self.epoch = module, epoch

    def __len__(self):
        return self.epoch

    def __iter__(self):
        trainer = self.module.trainer
        first = trainer.global_step * trainer.accumulate_grad_batches
        yield from range(first, first - first % self.epoch + self.epoch)


class Tiny(LightningModule):
    """Notes each batch that it trains on, and each validation by its step."""

    def __init__(self, epoch):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.epoch = torch.nn.Linear(4, 1), epoch
        self.batches, self.validations = [], {}

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(batch))
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch, batch_idx):
        loss = (self.net.weight - 0.5).square().sum()  # rises again after some steps
        self.log("loss/val", loss, batch_size=1)
        self.validations[self.trainer.global_step] = float(loss)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(Batches(self, self.epoch), batch_size=None)

    def val_dataloader(self):
        return DataLoader(range(2), batch_size=None)

    def on_save_checkpoint(self, checkpoint):
        checkpoint[KEY] = DESCRIPTION

    def check_finite(self, step):
        pass


class Copies(BestAndLast):
    """Keeps a copy of each checkpoint that it saves."""

    state_key = "BestAndLast"

    def save(self, trainer, path):
        super().save(trainer, path)
        copies = self.folder.parent / "copies"
        copies.mkdir(exist_ok=True)
        shutil.copy(path, copies / f"{trainer.global_step}-{path.name}")


class Do(Callback):
    """Calls `action` at the end of the batch that completes this step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.action()


def build(root, *callbacks, epoch=7, keeper=None, **settings):
    keeper = keeper or BestAndLast(every_n_train_steps=3)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root,
        callbacks=[*callbacks, keeper],
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        **{"max_steps": 24, **EVERY_4, **quiet, **settings},
    )
    return trainer, Tiny(epoch), keeper


def steps_of(folder):
    return {path.name: torch.load(path)["global_step"] for path in folder.glob("*.ckpt")}


# resuming


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epoch": 8, "accumulate_grad_batches": 2, "max_steps": 12},
        {"epoch": 8, "check_val_every_n_epoch": 1, "val_check_interval": 0.5},
        {"max_epochs": 3, "max_steps": -1},
        {"every": 1, "val_check_interval": 1, "max_steps": 16},
    ],
    ids=["mid-epoch", "accumulation", "twice an epoch", "max_epochs", "every"],
)
def test_a_run_resumed_from_any_of_its_checkpoints_is_the_uninterrupted_run(tmp_path, settings):
    settings = dict(settings)
    every = settings.pop("every", 3)
    trainer, whole, _ = build(tmp_path / "whole", keeper=Copies(every), **settings)
    trainer.fit(whole)
    end = torch.load(tmp_path / "whole/checkpoints/last.ckpt")
    resumed_from = 0
    for path in (tmp_path / "whole/copies").iterdir():
        step = torch.load(path)["global_step"]
        if step == trainer.global_step:
            continue
        resumed_from += 1
        again, module, keeper = build(tmp_path / path.stem, keeper=BestAndLast(every), **settings)
        again.fit(module, ckpt_path=path)
        assert module.batches == whole.batches[step * trainer.accumulate_grad_batches :]
        later = {s: loss for s, loss in whole.validations.items() if s > step}
        assert module.validations == later  # none is missing, none is made twice
        result = torch.load(keeper.last_path)
        for key in ("epoch", "global_step", "callbacks", "state_dict", "optimizer_states"):
            assert differences(result[key], end[key]) == []
    assert resumed_from > 3


def test_a_kill_between_validation_and_save_repeats_the_validation(tmp_path):
    class Kill(Callback):
        def on_validation_end(self, trainer, module):
            if trainer.global_step == 12:  # where a save is due too
                raise MemoryError

    trainer, module, keeper = build(tmp_path, Kill())
    with pytest.raises(MemoryError):
        trainer.fit(module)
    assert steps_of(keeper.folder)["last.ckpt"] == 9
    trainer, module, _ = build(tmp_path, max_steps=13)
    trainer.fit(module, ckpt_path=keeper.last_path)
    assert list(module.validations) == [12, 13]


# what is saved, and when


def test_last_is_saved_every_n_steps_and_at_the_end_best_when_the_loss_falls(tmp_path):
    trainer, module, keeper = build(tmp_path, keeper=Copies(3), max_steps=16)
    trainer.fit(module)
    best, lowest = [], float("inf")
    for step, loss in module.validations.items():
        if loss < lowest:
            best, lowest = [*best, step], loss
    assert list(module.validations) == [4, 8, 12, 16] and 16 not in best  # it rises in the end
    lasts = {f"{step}-last.ckpt": step for step in (3, 6, 9, 12, 15, 16)}
    assert steps_of(tmp_path / "copies") == lasts | {f"{step}-best.ckpt": step for step in best}
    assert (keeper.best_step, keeper.best_val_loss) == (best[-1], lowest)
    assert keeper.newest == (keeper.last_path, 16)


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"max_steps": -1, "max_epochs": 1}])
def test_the_final_step_is_validated_whatever_the_interval(tmp_path, settings):
    trainer, module, keeper = build(tmp_path, keeper=BestAndLast(0), epoch=5, **settings)
    trainer.fit(module)
    assert list(module.validations) == [4, 5]
    assert steps_of(keeper.folder)["last.ckpt"] == 5


# nothing of the user's is overwritten


def test_a_new_run_does_not_overwrite_anothers_checkpoints(tmp_path):
    build(tmp_path, max_steps=2)[0].fit(Tiny(7))
    with pytest.raises(UserError, match="holds another run's checkpoints"):
        build(tmp_path, max_steps=3)[0].fit(Tiny(7))
    assert steps_of(tmp_path / "checkpoints")["last.ckpt"] == 2


def test_later_checkpoints_are_kept_when_a_run_resumes_from_an_earlier_step(tmp_path, capsys):
    trainer, module, keeper = build(tmp_path, keeper=Copies(3), max_steps=9)
    trainer.fit(module)
    build(tmp_path, max_steps=5)[0].fit(Tiny(7), ckpt_path=tmp_path / "copies/3-last.ckpt")
    kept = keeper.folder / "last-step9.ckpt"
    assert f"last.ckpt is kept as {kept}" in capsys.readouterr().out
    steps = steps_of(keeper.folder)
    assert steps["last-step9.ckpt"] == 9 and steps["last.ckpt"] == 5


def test_resuming_from_last_does_not_keep_a_later_best(tmp_path):
    """It is of a run that was killed between the two, and comes again."""
    trainer, module, keeper = build(tmp_path, Do(5, lambda: 1 / 0), keeper=BestAndLast(3))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module)
    assert steps_of(keeper.folder) == {"last.ckpt": 3, "best.ckpt": 4}
    build(tmp_path, max_steps=6)[0].fit(Tiny(7), ckpt_path=keeper.last_path)
    assert sorted(steps_of(keeper.folder)) == ["best.ckpt", "last.ckpt"]


# signals

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture
def handlers():
    """The handlers during the test; those before it are restored."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    if "SIGHUP" in before:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
    yield {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name, step", list(zip(SIGNALS, (5, 8, 8), strict=False)))
def test_a_signal_saves_after_the_step_and_its_validation(tmp_path, handlers, capsys, name, step):
    signum = getattr(signal, name)
    trainer, module, keeper = build(tmp_path, Do(step, lambda: signal.raise_signal(signum)))
    with pytest.raises(Interrupted, match=f"stopped by {name}") as stop:
        trainer.fit(module)
    assert stop.value.signum == signum
    assert list(module.validations) == [s for s in (4, 8) if s <= step]
    assert steps_of(keeper.folder)["last.ckpt"] == step
    assert "Stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signum) == handlers[name]


def test_a_second_interrupt_does_not_wait(tmp_path, handlers):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start without
    twice = Do(5, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    trainer, module, keeper = build(tmp_path, twice)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module)
    assert steps_of(keeper.folder)["last.ckpt"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_nohup_is_respected(tmp_path, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trainer, module, _ = build(tmp_path, Do(5, lambda: signal.raise_signal(signal.SIGHUP)))
    trainer.fit(module)
    assert trainer.global_step == 24


def test_a_signal_in_the_final_step_changes_nothing(tmp_path, handlers):
    trainer, module, keeper = build(tmp_path, Do(24, lambda: signal.raise_signal(signal.SIGTERM)))
    trainer.fit(module)
    assert steps_of(keeper.folder)["last.ckpt"] == 24
