"""Saving checkpoints: written completely or not at all, the best and the last kept."""

import contextlib
import math
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import filelock
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from gpt_lightning.checkpoint import read_checkpoint
from gpt_lightning.errors import UserError, at_least
from gpt_lightning.files import unused, write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step, so that a killed run always leaves a complete one.

    Lightning's own moves the file from $TMPDIR: across file systems a copy, which can be cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch's writer raises a RuntimeError when it closes a file that it could not write to
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise UserError(f"{path} could not be written ({reason})") from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(path)


class Interrupted(Exception):
    """Ctrl-C or another signal ended the run after a whole step, and `last.ckpt` is saved."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def optimizer_step_done(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the batch that has just ended completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class BestAndLast(Checkpoint):
    """Keeps `best.ckpt` (lowest loss/val) and `last.ckpt`.

    `last.ckpt` is saved at the start of the next batch, after any validation. A run that is killed
    in between resumes from the previous checkpoint and repeats the validation.

    The first Ctrl-C, SIGTERM or SIGHUP, and in a SLURM job SIGUSR1, saves after the current step
    and raises `Interrupted`. A second Ctrl-C acts at once.

    Args:
        every_n_train_steps: optimizer steps between two saves of `last.ckpt`; 0 saves at the end of
            the run only.
        folder: for the files; `checkpoints` in the Trainer's log folder by default.

    Raises:
        UserError: if the folder holds another run's checkpoints, or another process trains there.
    """

    def __init__(self, every_n_train_steps: int = 300, folder: Path | None = None):
        at_least(0, every_n_train_steps=every_n_train_steps)
        self.every_n_train_steps = every_n_train_steps
        self.best_val_loss, self.best_step = math.inf, 0
        self.folder = folder
        self.newest: tuple[Path, int] | None = None  # checkpoint of this run, and its step
        self.saved_step = 0  # of last.ckpt; the step that the run starts at needs no save
        self.lock: filelock.BaseFileLock | None = None
        self.signum: int | None = None
        self.old_handlers: dict[int, Any] = {}

    @property
    def best_path(self) -> Path:
        return self.folder / "best.ckpt"

    @property
    def last_path(self) -> Path:
        return self.folder / "last.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {"best_val_loss": self.best_val_loss, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_val_loss, self.best_step = state["best_val_loss"], state["best_step"]

    # start and end of a run

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self.folder is None:
            self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self.folder = trainer.strategy.broadcast(self.folder)  # the first process chose it
        if stage == "fit" and trainer.is_global_zero:
            self.claim()

    def claim(self) -> None:
        """Lock the folder until the run ends: two runs would mix their files."""
        if self.lock is not None:
            return
        lock = filelock.FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            self.lock = lock
        except filelock.Timeout:
            raise UserError(
                f"another process trains in {self.folder.parent}; wait for its end, or start "
                "a new run"
            ) from None
        except NotImplementedError:  # some network file systems have no locks
            pass
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written to ({error.strerror})") from error

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step, self.signum = trainer.global_step, None
        if trainer.ckpt_path is not None:
            self.newest = Path(trainer.ckpt_path), trainer.global_step
            if trainer.is_global_zero:
                self.keep_later_checkpoints(trainer)
        elif self.last_path.exists() or self.best_path.exists():
            raise UserError(
                f"{self.folder} holds another run's checkpoints; resume it with ckpt_path=last, or "
                "choose another default_root_dir"
            )
        if threading.current_thread() is threading.main_thread():
            signums = [signal.SIGINT, signal.SIGTERM]
            hangup = getattr(signal, "SIGHUP", None)  # Windows has none
            if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup sets it
                signums.append(hangup)
            if SLURMEnvironment.detect():  # in place of Lightning's, which saves within a step
                signums.append(signal.SIGUSR1)
            self.old_handlers = {n: signal.signal(n, self.on_signal) for n in signums}

    def keep_later_checkpoints(self, trainer: Trainer) -> None:
        """Rename the checkpoints of later steps, if the run resumes from an earlier one."""
        if Path(trainer.ckpt_path).resolve() == self.last_path.resolve():
            return  # best.ckpt may be newer if the run was killed; it is saved again
        for path in (self.last_path, self.best_path):
            with contextlib.suppress(UserError):  # missing or damaged: nothing to keep
                step = read_checkpoint(path)["global_step"]
                if step > trainer.global_step:
                    kept = path.replace(unused(path.with_stem(f"{path.stem}-step{step}")))
                    print(f"Resuming from an earlier step; {path.name} is kept as {kept}")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step > self.saved_step:
            self.save(trainer, self.last_path)

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.restore_handlers()
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    # signals

    def on_signal(self, signum: int, frame: Any) -> None:
        self.signum = signum
        self.restore_handlers()  # for a second signal
        if rank_zero_only.rank == 0:
            with contextlib.suppress(OSError):  # after a SIGHUP the terminal is gone
                sys.stderr.write("\nStopping after this step; press Ctrl-C to stop at once.\n")

    def restore_handlers(self) -> None:
        for signum, handler in self.old_handlers.items():
            signal.signal(signum, handler)
        self.old_handlers = {}

    def stop_requested(self, trainer: Trainer) -> bool:
        """Whether any process of the run got a signal; all must ask at the same step."""
        stop = self.signum is not None
        if trainer.world_size == 1:
            return stop
        if trainer.global_step % trainer.log_every_n_steps:  # asking takes time, so not every step
            return False
        return trainer.strategy.reduce_boolean_decision(stop, all=False)

    # saving

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        epoch_ends = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.global_step == trainer.max_steps or epoch_ends:
            trainer.should_stop = True  # the final step is validated, whatever the interval

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        val_loss = float(trainer.callback_metrics["loss/val"])
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = val_loss, trainer.global_step
            self.save(trainer, self.best_path)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        step, every = trainer.global_step, self.every_n_train_steps
        step_begins = batch_idx % trainer.accumulate_grad_batches == 0
        if not step_begins or step == self.saved_step:
            return
        stop = self.stop_requested(trainer)
        if stop or (every and step % every == 0):
            self.save(trainer, self.last_path)
        if stop:
            raise Interrupted(self.signum or signal.SIGTERM)

    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        # Lightning increments `ready` before `on_train_batch_start`, where we save, and does not
        # correct the total on resume: validations would come one batch early.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        total = progress["total"]
        if total["ready"] > total["started"]:
            total["ready"], progress["is_last_batch"] = total["completed"], False

    def save(self, trainer: Trainer, path: Path) -> None:
        trainer.lightning_module.check_finite(trainer.global_step)
        for logger in trainer.loggers:
            logger.save()  # no checkpoint may be ahead of the curves on disk
        trainer.save_checkpoint(path)
        self.newest = path, trainer.global_step
        if path == self.last_path:
            self.saved_step = trainer.global_step


def find_best_and_last(trainer: Trainer) -> BestAndLast | None:
    """The Trainer's `BestAndLast`, if it has one."""
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast)), None)
