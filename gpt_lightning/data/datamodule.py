"""From a corpus to batches, in four steps:

1. the text is found (`corpora`) and encoded once into a memory-mapped file (`tokens`);
2. it is split into training and validation spans (`windows.split_spans`);
3. training windows are numbered without end, and each number has its place (`windows`);
4. a batch gathers its windows at once: x (B, T), and y (B, T) one token further on.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from gpt_lightning.data import windows
from gpt_lightning.data.corpora import find_corpus
from gpt_lightning.data.tokenizers import choose
from gpt_lightning.data.tokens import prepare_tokens

MOST = 10**15  # of anything that is counted: numbers stay within 64 bits
BATCHES_AT_ONCE = 64  # window starts are worked out for this many batches in one go


class WindowDataset(Dataset):
    """Looked up by (starts, length), it gathers a whole batch: x and y, each (B, T) int64."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    def __getitem__(self, where: tuple[np.ndarray, int]) -> tuple[torch.Tensor, torch.Tensor]:
        starts, length = where
        block = self.tokens[starts[:, None] + np.arange(length + 1)]  # (B, T + 1)
        block = torch.from_numpy(block.astype(np.int64))
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


class TrainBatches(DistributedSampler):
    """The window starts of one rank's training batches, from the trainer's present step on.

    The base class only tells Lightning that ranks are already told apart. The position is read when
    iteration begins, in the main process, so a resumed run goes on at its step with any number of
    workers.
    """

    def __init__(self, data: "TextDataModule", length: int):
        self.source, self.trainer, self.length = data.windows, data.trainer, length
        self.batch_size, self.block_size = data.hparams.batch_size, data.hparams.block_size
        self.overfit_batches = data.hparams.overfit_batches

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batch = self.trainer.global_step * self.trainer.accumulate_grad_batches
        within = np.arange(self.batch_size) + rank * self.batch_size
        for first in range(0, self.length, BATCHES_AT_ONCE):
            batches = batch + np.arange(first, min(first + BATCHES_AT_ONCE, self.length))
            if self.overfit_batches:
                batches %= self.overfit_batches
            numbers = batches[:, None] * self.batch_size * world + within
            for starts in self.source.starts(numbers.ravel()).reshape(numbers.shape):
                yield starts, self.block_size

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the window's number tells the epoch."""


class ExactBatches(DistributedSampler):
    """Held-out windows, every token once over all ranks; short last windows in batches of one."""

    def __init__(self, spans: list[windows.Span], block_size: int, batch_size: int, trainer):
        self.windows, self.batch_size = windows.ExactWindows(spans, block_size), batch_size
        self.full = -(-len(self.windows) // batch_size)  # batches of windows of block_size
        self.trainer = trainer

    def _numbers(self) -> range:
        """Those of all batches that fall to this rank."""
        total = self.full + len(self.windows.short)
        return range(self.trainer.global_rank, total, self.trainer.world_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        size, count = self.batch_size, len(self.windows)
        for i in self._numbers():
            if i < self.full:
                numbers = np.arange(i * size, min((i + 1) * size, count), dtype=np.int64)
                yield self.windows.starts(numbers), self.windows.block_size
            else:
                start, length = self.windows.short[i - self.full]
                yield np.array([start], np.int64), length

    def __len__(self) -> int:
        return len(self._numbers())

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the order is fixed."""


STOPS = {signal.SIGINT, signal.SIGTERM}
OBEYS = hasattr(signal, "sigwaitinfo")  # neither on macOS nor on Windows


def obey_the_run_alone(worker: int) -> None:
    """Let a loader's worker end at a signal of its run and no other.

    Ctrl-C and a shutdown reach all processes, and a run needs its workers until it has saved.
    """

    def wait() -> None:
        while signal.sigwaitinfo(STOPS).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    threading.Thread(target=wait, daemon=True).start()


class ResumableLoader(DataLoader):
    """A loader whose position is the trainer's step, so that its own state is empty.

    Lightning warns of loaders without these two methods when a run resumes within an epoch.
    """

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if not self.num_workers or not OBEYS:
            return super().__iter__()
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # for new workers too
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class TextDataModule(LightningDataModule):
    """A text as sliding block windows, split into training and validation.

    The text is read and encoded when this is built (from a cache, after the first time), since the
    model needs the vocabulary's size.

    Args:
        corpus: `playwright` (the embedded corpus; `playwright:SEED:CHARS` writes another),
            `tinyshakespeare`, a text file, a folder of text files, or a URL.
        tokenizer: `char` (the lecture's: sorted distinct characters) or `byte` (UTF-8).
        block_size: T, the longest context in tokens.
        batch_size: B, windows a batch in each process.
        sampling: `sliding` (every window once an epoch, shuffled, at a fresh phase) or `random`
            (the lecture's get_batch, with replacement).
        stride: distance of neighbouring sliding windows; block_size unless given.
        split: `tail` holds out the end (the lecture's last 10%), `blocks` pieces throughout.
        val_fraction: how much of the text is held out.
        max_val_tokens: validate on the first so many held-out tokens only, where the text is large;
            on all unless given.
        unknown: characters that a given vocabulary lacks: `error`, `drop` or `replace`.
        vocabulary: the characters of the vocabulary, where they are not to be the text's own.
        overfit_batches: train on the first so many batches alone, over and over; 0 on all.
        num_workers: loader processes; batches are the same with any number.
        seed: chooses the order of the windows.

    Attributes:
        tokenizer, vocab_size: of this text.
        tokens: (N,) the whole text, memory-mapped, in the smallest unsigned type that fits.
        train_spans, val_spans: lists of (start, stop) in tokens; val_spans of what is validated.

    Raises:
        ValueError: in one line, for whatever is wrong with the text or the settings.
    """

    def __init__(
        self,
        corpus: str = "playwright",
        tokenizer: Literal["char", "byte"] = "char",
        block_size: int = 128,
        batch_size: int = 16,
        sampling: Literal["sliding", "random"] = "sliding",
        stride: int | None = None,
        split: Literal["tail", "blocks"] = "tail",
        val_fraction: float = 0.1,
        max_val_tokens: int | None = None,
        unknown: Literal["error", "drop", "replace"] = "error",
        vocabulary: str | None = None,
        overfit_batches: int = 0,
        num_workers: int = 0,
        seed: int = 1337,
    ):
        super().__init__()
        for flag, value, least, most in (
            ("block_size", block_size, 1, MOST),
            ("batch_size", batch_size, 1, MOST),
            ("stride", stride, 1, MOST),
            ("num_workers", num_workers, 0, 1000),
            ("overfit_batches", overfit_batches, 0, MOST),
            # a window and the token after it
            ("max_val_tokens", max_val_tokens, block_size + 1, MOST),
        ):
            if value is not None and value < least:
                raise ValueError(f"--data.{flag}={value} must be at least {least}")
            if value is not None and value > most:
                raise ValueError(f"--data.{flag}={value} must be at most {most}")
        self.save_hyperparameters(logger=False)
        self.corpus = find_corpus(corpus)
        token_file = prepare_tokens(self.corpus, tokenizer, unknown, vocabulary)
        self.corpus_sha256 = token_file.corpus_sha256
        self.tokenizer = token_file.tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        self.tokens = token_file.open()
        self.train_spans, self.val_spans = windows.split_spans(
            len(self.tokens), split, val_fraction, block_size
        )
        if max_val_tokens is not None:
            self.val_spans = windows.first_tokens(self.val_spans, max_val_tokens)
        if choose("--data.sampling", sampling, ("sliding", "random")) == "sliding":
            stride = block_size if stride is None else stride
            self.windows = windows.SlidingWindows(self.train_spans, block_size, stride, seed)
        else:
            self.windows = windows.RandomWindows(self.train_spans, block_size, seed)
        self._check_batch_size(1)

    def _check_batch_size(self, world_size: int) -> None:
        batch_size = self.hparams.batch_size
        if batch_size * world_size > len(self.windows):
            processes = f" in each of {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"--data.batch_size={batch_size}{processes} is more than the {len(self.windows):,} "
                "training windows of this text; choose a smaller batch_size or block_size"
            )

    @property
    def val_floor(self) -> float | None:
        """Nats per character that no model can beat on the validation text, where it is known.

        A token of the embedded corpus is a character, whichever the tokenizer: it is ASCII.
        """
        if self.hparams.unknown != "error":
            return None
        spans = [(start + 1, stop) for start, stop in self.val_spans]
        costs = [self.corpus.floor(start, stop) for start, stop in spans]
        if None in costs:
            return None
        sizes = [stop - start for start, stop in spans]
        return float(np.average(costs, weights=sizes))

    @property
    def val_characters(self) -> int:
        """Characters that the validation loss predicts (not tokens: a byte is less than one)."""
        return sum(
            self.tokenizer.count_characters(self.tokens[start + 1 : stop])
            for start, stop in self.val_spans
        )

    @property
    def val_tokens(self) -> int:
        """Tokens that the validation loss predicts: all but the first of each span."""
        return sum(stop - start - 1 for start, stop in self.val_spans)

    def batches_per_epoch(self, world_size: int = 1, accumulate: int = 1) -> int:
        """Batches in which each process sees its share of an epoch, whole optimizer steps only."""
        steps = len(self.windows) // (self.hparams.batch_size * world_size * accumulate)
        return max(1, steps) * accumulate

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        self._check_batch_size(trainer.world_size)
        length = self.batches_per_epoch(trainer.world_size, trainer.accumulate_grad_batches)
        return self._loader(TrainBatches(self, length), self.hparams.num_workers)

    def val_dataloader(self) -> DataLoader:
        # Without gradients memory is no limit: as much as fills a GPU, or a CPU's caches.
        tokens = 1 << 11 if self.trainer.strategy.root_device.type == "cpu" else 1 << 16
        batch_size = max(self.hparams.batch_size, tokens // self.hparams.block_size)
        sampler = ExactBatches(self.val_spans, self.hparams.block_size, batch_size, self.trainer)
        return self._loader(sampler, num_workers=0)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def estimator_batches(self, spans: list[windows.Span], n: int, rank: int, world: int):
        """`n` random batches of the lecture's `estimate_loss`, shared out over the ranks."""
        batch_size, block_size = self.hparams.batch_size, self.hparams.block_size
        source = windows.RandomWindows(spans, block_size, self.hparams.seed)
        dataset = WindowDataset(self.tokens)
        for i in range(rank, n, world):
            # counted from the far end, so that they are not the batches that training begins with
            numbers = np.arange(i * batch_size, (i + 1) * batch_size) + (1 << 48)
            yield dataset[source.starts(numbers), block_size]

    def _loader(self, sampler: DistributedSampler, num_workers: int) -> DataLoader:
        return ResumableLoader(
            WindowDataset(self.tokens),
            sampler=sampler,
            batch_size=None,  # the dataset gathers whole batches
            num_workers=num_workers,
            worker_init_fn=obey_the_run_alone if OBEYS else None,
            pin_memory=torch.cuda.is_available(),
        )
