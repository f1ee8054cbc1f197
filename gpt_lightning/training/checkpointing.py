"""Lightning's side of checkpoints: written whole or not at all, the best and the last kept."""

import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from gpt_lightning.checkpoint import read_checkpoint
from gpt_lightning.data.files import remove_orphans, why, write_atomically
from gpt_lightning.training.callbacks import stepped

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not kept apart there
    fcntl = None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, syncs it to the disk, then takes the target's place.

    At every moment the target is the old file, whole, or the new one, whole. Lightning's own
    writes to $TMPDIR and moves: across file systems that is a copy, which can be cut short.

    Raises:
        ValueError: in one line, if it cannot be written: a full disk, a read-only folder.
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
            # torch's writer, closing a file that it could not write to, raises over the reason
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise ValueError(f"{path} could not be written ({why(reason)})") from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read one, to the CPU, as everything here does."""
        return read_checkpoint(path)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run after a whole step, and its last checkpoint is saved."""

    def __init__(self, signum: int, path: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {path}")
        self.signum, self.path = signum, path


class BestAndLast(Checkpoint):
    """Keeps `best.ckpt` (lowest val/loss) and `last.ckpt` in the run's `checkpoints` folder.

    One callback for both, so that `last` always knows of `best`. A `last` that falls due on a step
    with a validation is written after that: a run killed in between does it again on resuming,
    and no point of the curve is missing. The first Ctrl-C or SIGTERM saves after the present step
    and raises `Interrupted`; a second one is not waited for.

    Args:
        every_n_train_steps: optimizer steps from one `last` to the next; the run's final step is
            saved in any case. 0 saves that only.

    Raises:
        ValueError: if the folder already holds another run's checkpoints, or another process is
            training there.

    Attributes:
        safe: the newest checkpoint that this run has, and its step; None before the first.
    """

    def __init__(self, every_n_train_steps: int = 300):
        if every_n_train_steps < 0:
            raise ValueError(
                f"--checkpoint.every_n_train_steps={every_n_train_steps} must be 0 or more"
            )
        self.every_n_train_steps = every_n_train_steps
        self.best_val_loss, self.best_step, self.last_step = float("inf"), 0, -1
        self.folder: Path | None = None
        self.safe: tuple[Path, int] | None = None
        self.lock: int | None = None
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

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            self.claim(self.folder)

    def claim(self, folder: Path) -> None:
        """Hold `folder` for as long as this process lives: two runs would mix their files.

        Raises:
            ValueError: if another process holds it.
        """
        if fcntl is None or self.lock is not None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(folder, os.O_RDONLY)
        # loader workers must not hold it: they outlive a killed run by seconds
        os.register_at_fork(after_in_child=self._let_go)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {folder.parent}; let it end, or choose another "
                "--trainer.default_root_dir"
            ) from None
        except OSError:  # some network file systems have no locks
            pass

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            self.last_step = trainer.global_step
            self.safe = Path(trainer.ckpt_path), trainer.global_step
            if trainer.is_global_zero and self.folder.exists():
                for name in ("last", "best"):  # a save that a kill cut short
                    remove_orphans(self.folder, f"{name}.ckpt", age=0)
                self._keep_later(trainer)
        elif self.last_path.exists() or self.best_path.exists():
            raise ValueError(
                f"{self.folder} holds an earlier run's checkpoints; resume that with "
                "--ckpt_path=last, or choose another --trainer.default_root_dir"
            )
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.old_handlers[signum] = signal.signal(signum, self._on_signal)

    def _keep_later(self, trainer: Trainer) -> None:
        """Going on from an earlier step must not cost the user the later states that are there."""
        if Path(trainer.ckpt_path).resolve() == self.last_path.resolve():
            return  # a best.ckpt ahead of it is of a run killed between the two; it comes again
        for path in (self.last_path, self.best_path):
            if not path.exists() or path.resolve() == Path(trainer.ckpt_path).resolve():
                continue
            try:
                step = read_checkpoint(path)["global_step"]
                label = f"step{step}"
            except ValueError:
                step, label = math.inf, "unreadable"  # not ours to throw away
            if step > trainer.global_step:
                kept, n = path.with_name(f"{path.stem}-{label}.ckpt"), 1
                while kept.exists():
                    kept, n = path.with_name(f"{path.stem}-{label}-{n}.ckpt"), n + 1
                os.replace(path, kept)
                print(f"Going on from step {trainer.global_step}; {path.name} is kept as {kept}")

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            self._restore_handlers()
            signal.raise_signal(signum)
        self.signum = signum
        if rank_zero_only.rank == 0:
            sys.stderr.write("\nStopping after this step; once more to stop at once.\n")

    def _restore_handlers(self) -> None:
        for signum, handler in self.old_handlers.items():
            signal.signal(signum, handler)
        self.old_handlers = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if not stepped(trainer, batch_idx):
            return
        if ends(trainer):
            trainer.should_stop = True  # so that the final step is validated, whatever the interval
        if not validation_follows(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.fast_dev_run:
            return
        val_loss = float(trainer.callback_metrics["val/loss"])
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = val_loss, trainer.global_step
            self._save(trainer, self.best_path)
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        step, every = trainer.global_step, self.every_n_train_steps
        stop = self.signum is not None
        if trainer.world_size > 1:  # all ranks must agree; asking costs, so not on every step
            stop = step % trainer.log_every_n_steps == 0 and (
                trainer.strategy.reduce_boolean_decision(stop, all=False)
            )
        if not trainer.fast_dev_run and (stop or (every and step % every == 0)):
            self._save(trainer, self.last_path)
        if stop:
            raise Interrupted(self.signum or signal.SIGTERM, self.last_path)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._restore_handlers()
        if self.last_step != trainer.global_step and not trainer.fast_dev_run:
            self._save(trainer, self.last_path)

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        self._restore_handlers()
        self._let_go()

    def _save(self, trainer: Trainer, path: Path) -> None:
        trainer.lightning_module.refuse_not_finite(trainer.global_step)
        for logger in trainer.loggers:
            logger.save()  # no checkpoint may be ahead of the curves on disk
        trainer.save_checkpoint(path)
        self.safe = path, trainer.global_step
        if path == self.last_path:
            self.last_step = trainer.global_step


def ends(trainer: Trainer) -> bool:
    """Whether the training batch that has just ended is the run's last."""
    if trainer.global_step == trainer.max_steps:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def validation_follows(trainer: Trainer) -> bool:
    """Whether the Trainer is about to validate, seen from the end of a training batch."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
