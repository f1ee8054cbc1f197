"""From a corpus to batches, in four steps:

1. the text is found (`corpus`) and encoded once into a memory-mapped file (`tokens`);
2. it is split into training and validation spans (`windows.split_spans`);
3. training windows are numbered without end, and each number has a start in the text (`windows`);
4. a batch gathers its windows: x (B, T), and y (B, T) one token further on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from gpt_lightning.data.corpus import Corpus, find_corpus
from gpt_lightning.data.documents import JSON_LINES, TABLES
from gpt_lightning.data.tokenizers import KINDS, UNKNOWN
from gpt_lightning.data.tokens import TokenFile, TokenizerSettings, floor_of_spans, prepare_tokens
from gpt_lightning.data.windows import (
    SPLITS,
    RandomWindows,
    SlidingWindows,
    Span,
    exact_windows,
    first_tokens,
    split_spans,
    windows_without_gradients,
)
from gpt_lightning.errors import UserError, at_least, one_of

SAMPLING = ("sliding", "random")
BATCHES_AT_ONCE = 64  # window starts are computed for this many batches together

Batch = tuple[torch.Tensor, torch.Tensor]  # x, y: (B, T) token ids each, y one token later


def gather(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """The windows that begin at `starts` (B,): inputs x and targets y, each (B, length) int64."""
    ids = tokens[starts[:, None] + np.arange(length + 1)]  # (B, T + 1)
    block = torch.from_numpy(ids.astype(np.int64))
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Name this setting, not `corpus`, in the message of an error about a corpus."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("corpus=", f"{setting}=", 1)) from error


class Loader:
    """An iterable of batches, for a Trainer or a plain loop.

    Subclasses define `batch_starts()`: window starts (B,) and window length of each batch of this
    rank.
    Lightning uses an iterable that is not a DataLoader as it is.
    """

    def __init__(self, data: "TextDataModule", tokens: np.ndarray):
        self.data, self.tokens = data, tokens

    def __iter__(self) -> Iterator[Batch]:
        pin = self.data.device_type == "cuda"
        for starts, length in self.batch_starts():
            x, y = gather(self.tokens, starts, length)
            yield (x.pin_memory(), y.pin_memory()) if pin else (x, y)

    # Lightning warns when a run resumes with loaders that lack these two.
    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class TrainLoader(Loader):
    """One epoch of training batches, from the trainer's current step on.

    Without a trainer, each iteration is the next epoch.
    """

    epoch = 0  # without a trainer

    def batch_starts(self) -> Iterator[tuple[np.ndarray, int]]:
        trainer, hparams = self.data.trainer, self.data.hparams
        rank, world_size = self.data.rank_and_world_size
        if trainer:
            batch = trainer.global_step * trainer.accumulate_grad_batches
        else:
            batch = self.epoch * len(self)
            self.epoch += 1
        within = np.arange(hparams.batch_size) + rank * hparams.batch_size
        for first in range(0, len(self), BATCHES_AT_ONCE):
            batches = batch + np.arange(first, min(first + BATCHES_AT_ONCE, len(self)))
            if hparams.overfit_batches:
                batches %= hparams.overfit_batches
            numbers = batches[:, None] * hparams.batch_size * world_size + within
            for starts in self.data.windows.starts(numbers.ravel()).reshape(numbers.shape):
                yield starts, hparams.block_size

    def __len__(self) -> int:
        trainer, (_, world_size) = self.data.trainer, self.data.rank_and_world_size
        accumulate = trainer.accumulate_grad_batches if trainer else 1
        return self.data.batches_per_epoch(world_size, accumulate)


class ExactLoader(Loader):
    """Batches of the validation text, divided among the ranks: each token is predicted once."""

    def __init__(self, data: "TextDataModule", batch_size: int):
        super().__init__(data, data.val_ids)
        rank, world_size = data.rank_and_world_size
        T = data.hparams.block_size
        batches = [
            (starts, length)
            for starts, length, _ in exact_windows(data.val_spans, T, T, batch_size)
        ]
        if len(batches) < world_size:
            raise UserError(
                f"block_size={T} leaves fewer validation windows ({len(batches)}) than processes "
                f"({world_size}): use fewer processes or a smaller block_size"
            )
        self.batches = batches[rank::world_size]

    def batch_starts(self) -> Iterator[tuple[np.ndarray, int]]:
        yield from self.batches

    def __len__(self) -> int:
        return len(self.batches)


class TextDataModule(LightningDataModule):
    """A text as windows of block_size tokens, split into training and validation.

    Args:
        corpus: `playwright` (the embedded corpus; `playwright:SEED:CHARS` generates another),
            `tinyshakespeare`, a file, a folder of files, a pattern such as `texts/**/*.md`, or a
            URL. See docs/data.md for the formats.
        val_corpus: a text of its own for validation: all of `corpus` is then training text, and
            `split` and `val_fraction` are not used.
        test_corpus: the text that `test` scores; the validation text by default.
        field: of .jsonl, .ndjson, .csv and .tsv files, the field whose text is read; each row is a
            document. Without it these files are read as plain text.
        encoding: of the files: a codec of Python, or `auto` to detect it file by file.
        separator: text between two documents (files, rows). Without one, a document that does not
            end with a newline gets one.
        tokenizer: `char` (the lecture's: sorted distinct characters), `byte` (UTF-8), `word` or
            `bpe` (byte pair encoding; needs the package tokenizers).
        block_size: T, the longest context in tokens.
        batch_size: B, windows per batch in each process.
        sampling: `sliding` (every window once an epoch, shuffled, with a new phase) or `random`
            (the lecture's get_batch, with replacement).
        stride: distance of neighboring sliding windows; block_size by default.
        split: `tail` holds out the end (the lecture's last 10%), `blocks` pieces throughout.
        val_fraction: share of the text that is held out; 1 to validate on all of it.
        max_val_tokens: validate on the first held-out tokens only; on all by default.
        unknown: characters that the vocabulary lacks: `error`, `drop` or `replace`. When not
            given: `replace` if min_count is above 1, else `error`.
        vocabulary: the characters of the vocabulary (for `word` and `bpe`: the string in their
            state); made from the text by default.
        vocabulary_corpus: another corpus to make the vocabulary from.
        min_count: how often a character must occur to be in the vocabulary of the text. U+FFFD
            replaces the others.
        max_vocab_size: largest number of tokens of `word` and `bpe`; 1000 when not given.
        overfit_batches: train on the first batches only, again and again; 0 for all.
        seed: chooses the order of the windows.

    Attributes (after `setup`):
        corpus, corpus_sha256: the text and the digest of its content.
        tokens: (N,) ids of the whole text, memory-mapped, in the smallest unsigned type that fits.
        val_text, val_ids: corpus and ids of the text that is validated; `corpus` and `tokens`
            unless `val_corpus` is given. After `setup("test")` those of `test_corpus`.
        val_characters: characters that the validation loss predicts: those that begin in its
            tokens.
        tokenizer, vocab_size: of this text.
        train_spans, val_spans: lists of (start, stop), of training text in `tokens` and of
            validation text in `val_ids`.
        windows: where training windows start.

    Raises:
        UserError: for invalid settings; `prepare_data` for a text that cannot be read;
            `setup` for a text that is too short.
    """

    def __init__(
        self,
        corpus: str = "playwright",
        val_corpus: str | None = None,
        test_corpus: str | None = None,
        field: str | None = None,
        encoding: str = "utf-8",
        separator: str = "",
        tokenizer: Literal["char", "byte", "word", "bpe"] = "char",
        block_size: int = 128,
        batch_size: int = 16,
        sampling: Literal["sliding", "random"] = "sliding",
        stride: int | None = None,
        split: Literal["tail", "blocks"] = "tail",
        val_fraction: float = 0.1,
        max_val_tokens: int | None = None,
        unknown: Literal["error", "drop", "replace"] | None = None,
        vocabulary: str | None = None,
        vocabulary_corpus: str | None = None,
        min_count: int = 1,
        max_vocab_size: int | None = None,
        overfit_batches: int = 0,
        seed: int = 1337,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        one_of(KINDS, tokenizer=tokenizer)
        one_of(SAMPLING, sampling=sampling)
        one_of(SPLITS, split=split)
        if unknown is not None:
            one_of(UNKNOWN, unknown=unknown)
        at_least(1, block_size=block_size, batch_size=batch_size, stride=stride)
        at_least(1, min_count=min_count, max_vocab_size=max_vocab_size)
        at_least(0, overfit_batches=overfit_batches)
        at_least(block_size + 1, max_val_tokens=max_val_tokens)
        if not 0 < val_fraction <= 1:
            raise UserError(f"val_fraction={val_fraction} must be above 0 and at most 1")
        self.token_file: TokenFile | None = None
        self.held_out: dict[str, TokenFile] = {}  # by setting
        self.windows: SlidingWindows | RandomWindows

    # --- Lightning's hooks ------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Find or download the text and encode it into the cache; a second call does nothing."""
        if self.token_file is not None:
            return
        hp, vocabulary_corpus = self.hparams, None
        corpus = self._find("corpus")
        if hp.vocabulary is None and hp.vocabulary_corpus is not None:
            with _named("vocabulary_corpus"):
                vocabulary_corpus = self._find("vocabulary_corpus")
        unknown = hp.unknown or ("replace" if hp.min_count > 1 else "error")
        settings = TokenizerSettings(
            hp.tokenizer, unknown, hp.vocabulary, hp.min_count, hp.max_vocab_size
        )
        token_file = prepare_tokens(corpus, settings, vocabulary_corpus)
        settings = replace(settings, vocabulary=token_file.tokenizer.state().get("vocabulary"))
        for setting in ("val_corpus", "test_corpus"):
            if hp[setting] is not None:
                with _named(setting):
                    self.held_out[setting] = prepare_tokens(self._find(setting), settings)
        texts = [corpus, vocabulary_corpus, *(file.corpus for file in self.held_out.values())]
        if hp.field is not None and not any(f.field for text in texts if text for f in text.files):
            kinds = ", ".join((*JSON_LINES, *TABLES))
            message = f"field={hp.field} is for files that end in {kinds}"
            raise UserError(f"{message}; corpus={corpus.name} has none")
        self.token_file, self.corpus = token_file, corpus

    def _find(self, setting: str) -> Corpus:
        """The corpus that a setting names."""
        hp = self.hparams
        return find_corpus(
            hp[setting], field=hp.field, encoding=hp.encoding, separator=hp.separator
        )

    def setup(self, stage: str | None = None) -> None:
        """Set the attributes; training windows only if `stage` is "fit" or None.

        With `stage="test"` the validation text is `test_corpus`, if there is one.
        """
        self.prepare_data()  # finds the files in the cache if another process has made them
        hp = self.hparams
        self.corpus_sha256 = self.token_file.corpus_sha256
        self.tokenizer = self.token_file.tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        setting = "test_corpus" if stage == "test" and hp.test_corpus else "val_corpus"
        self.val_file = self.held_out.get(setting, self.token_file)
        self.val_text = self.val_file.corpus
        self.train_spans, self.val_spans = self._split(hp.block_size)
        predicted = [self.val_ids[start + 1 : stop] for start, stop in self.val_spans]
        self.val_characters = sum(map(self.tokenizer.count_characters, predicted))
        if self.val_tokens < 1:
            share = ""
            if self.val_file is self.token_file:
                setting, share = "corpus", f" val_fraction={hp.val_fraction} of them"
            raise UserError(
                f"{setting}={self.val_text.name} has {len(self.val_ids):,} tokens, too few to "
                f"validate on{share}; give more text"
            )
        if stage not in (None, "fit"):
            return
        if hp.val_fraction == 1 and hp.val_corpus is None:
            raise UserError("val_fraction=1 leaves no text to train on; it is for validate")
        self.windows = self._windows(hp.block_size)
        if self._largest_batch(hp.block_size) < hp.batch_size:
            sizes, block_size = "", hp.block_size
            while block_size and not sizes:
                if batch_size := min(hp.batch_size, self._largest_batch(block_size)):
                    sizes = f"choose block_size={block_size} and batch_size={batch_size}, or "
                block_size //= 2
            raise UserError(
                f"block_size={hp.block_size} with batch_size={hp.batch_size} is too large for a "
                f"text of {len(self.tokens):,} tokens, validated on "
                f"{self.val_tokens + len(self.val_spans):,}; {sizes}give more text"
            )

    def _split(self, block_size: int) -> tuple[list[Span], list[Span]]:
        hp = self.hparams
        train, val = split_spans(len(self.tokens), hp.split, hp.val_fraction, block_size)
        if hp.val_corpus is not None:
            train = [(0, len(self.tokens))]
        if self.val_file is not self.token_file:
            val = [(0, len(self.val_ids))]
        return train, val if hp.max_val_tokens is None else first_tokens(val, hp.max_val_tokens)

    def _windows(self, block_size: int) -> SlidingWindows | RandomWindows:
        """The training windows of this size."""
        hp, (train_spans, _) = self.hparams, self._split(block_size)
        if hp.sampling == "random":
            return RandomWindows(train_spans, block_size, hp.seed)
        return SlidingWindows(train_spans, block_size, hp.stride or block_size, hp.seed)

    def _largest_batch(self, block_size: int) -> int:
        """The largest batch_size with windows of this size; 0 if none fits the held-out text."""
        longest = max((b - a for a, b in self._split(block_size)[1]), default=0)
        if longest <= block_size:
            return 0
        return len(self._windows(block_size)) // self.rank_and_world_size[1]

    def train_dataloader(self) -> TrainLoader:
        self.setup("fit")
        return TrainLoader(self, self.tokens)

    def val_dataloader(self) -> ExactLoader:
        return self._exact_loader("validate")

    def test_dataloader(self) -> ExactLoader:
        return self._exact_loader("test")

    predict_dataloader = val_dataloader

    def _exact_loader(self, stage: str) -> ExactLoader:
        self.setup(stage)
        T, B = self.hparams.block_size, self.hparams.batch_size
        most = min(16 * B, windows_without_gradients(T, self.vocab_size, self.device_type))
        share = self.val_tokens // T // self.rank_and_world_size[1]  # of each process
        return ExactLoader(self, max(1, min(max(B, most), share)))

    # --- what the rest of the package asks --------------------------------------------------------

    @property
    def tokens(self) -> np.ndarray:
        return self.token_file.ids

    @property
    def val_ids(self) -> np.ndarray:
        return self.val_file.ids

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        """Of this process; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def device_type(self) -> str:
        """Type of the trainer's device; "cpu" without a trainer."""
        return self.trainer.strategy.root_device.type if self.trainer else "cpu"

    @property
    def val_floor(self) -> float | None:
        """Nats per character that no model can beat on the validation text, if known."""
        if self.val_file.unknown:  # characters were replaced or dropped: it is another text
            return None
        return floor_of_spans(self.val_text, self.tokenizer, self.val_ids, self.val_spans)

    @property
    def tokens_per_character(self) -> float:
        """Of the validation text: turns nats per token into nats per character."""
        return self.val_tokens / self.val_characters

    @property
    def val_tokens(self) -> int:
        """Tokens that the validation loss predicts: all but the first of each span."""
        return sum(max(0, stop - start - 1) for start, stop in self.val_spans)

    def describe(self) -> dict[str, str | float | None]:
        """Texts and split in plain types, after `prepare_data`."""
        val_file = self.held_out.get("val_corpus")
        return {
            "name": self.corpus.name,
            "sha256": self.token_file.corpus_sha256,
            "val_name": val_file and val_file.corpus.name,
            "val_sha256": val_file and val_file.corpus_sha256,
            "split": self.hparams.split,
            "val_fraction": self.hparams.val_fraction,
        }

    def batches_per_epoch(self, world_size: int = 1, accumulate: int = 1) -> int:
        """Batches of each process in an epoch, for whole optimizer steps."""
        steps = len(self.windows) // (self.hparams.batch_size * world_size * accumulate)
        return max(1, steps) * accumulate

    def estimator_batches(
        self, part: Literal["train", "val"], n: int, rank: int, world: int
    ) -> Iterator[Batch]:
        """`n` random batches for the lecture's `estimate_loss`, divided among the ranks."""
        hp = self.hparams
        parts = {
            "train": (self.tokens, self.train_spans),
            "val": (self.val_ids, self.val_spans),
        }
        tokens, spans = parts[part]
        source = RandomWindows(spans, hp.block_size, hp.seed)
        for i in range(rank, n, world):
            # far beyond the numbers of training windows, so that no batch of training is repeated
            numbers = np.arange(i * hp.batch_size, (i + 1) * hp.batch_size) + (1 << 48)
            yield gather(tokens, source.starts(numbers), hp.block_size)
