import math
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from gpt_lightning.data import datamodule, tokens
from gpt_lightning.data.datamodule import (
    BATCHES_AT_ONCE,
    ExactBatches,
    TextDataModule,
    WindowDataset,
)
from gpt_lightning.data.playwright import write_play
from gpt_lightning.data.tokenizers import CharTokenizer

TEXT = "".join(np.random.default_rng(0).choice(list("abcdefghij klmnop\n"), 1000))
MANY = "Gemüt, θάλασσα, 海, 🙂! " * 50  # characters of one to four bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path):
    """A data module of a text; its trainer stands where it is told to."""

    def make(text=TEXT, rank=0, world=1, step=0, accumulate=1, **settings):
        path = tmp_path / "text.txt"
        path.write_text(text, encoding="utf-8", newline="")
        settings = dict(corpus=str(path), block_size=8, batch_size=4) | settings
        data = TextDataModule(**settings)
        data.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=world,
            global_step=step,
            accumulate_grad_batches=accumulate,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        return data

    return make


def train(data, n):
    """The next n batches, epoch after epoch as a Trainer takes them."""
    loader, found = data.train_dataloader(), []
    while len(found) < n:
        epoch = list(loader)
        assert len(epoch) == len(loader)
        found += epoch
        data.trainer.global_step += len(epoch) // data.trainer.accumulate_grad_batches
    return found[:n]


def same(batches, others):
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def refused(make, text=TEXT, **settings) -> str:
    with pytest.raises(ValueError) as error:
        make(text, **settings)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- what a batch is ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["sliding", "random"])
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_batch_is_pieces_of_the_text_and_the_same_one_token_on(make, sampling, tokenizer):
    data = make(sampling=sampling, tokenizer=tokenizer)
    text = TEXT[: int(0.9 * len(TEXT))]
    for x, y in train(data, 30):
        assert x.shape == y.shape == (4, 8)
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x[:, 1:], y[:, :-1])
        for context, target in zip(x, y, strict=True):
            piece = data.tokenizer.decode(context.tolist() + target[-1:].tolist())
            assert len(piece) == 9 and piece in text


@pytest.mark.parametrize("sampling", ["sliding", "random"])
def test_batches_are_those_of_a_gather_window_by_window(make, sampling):
    data = make(sampling=sampling, split="blocks", val_fraction=0.3)
    ids = [sorted(set(TEXT)).index(c) for c in TEXT]
    n = 3 * len(data.windows) // 4  # three epochs of them, in batches of four
    for i, (x, y) in enumerate(train(data, n)):
        starts = data.windows.starts(np.arange(4 * i, 4 * i + 4)).tolist()
        assert x.tolist() == [ids[s : s + 8] for s in starts]
        assert y.tolist() == [ids[s + 1 : s + 9] for s in starts]


def test_an_epoch_of_batches_visits_every_character_of_its_stretch_once(make):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))  # no character twice
    data = make(text, batch_size=1)
    loader = data.train_dataloader()
    seen = torch.cat([x.flatten() for x, _ in loader])
    assert len(loader) == len(data.windows) >= 110
    assert len(seen) == len(seen.unique()) == 8 * len(loader)
    assert sorted(seen.tolist()) == list(range(seen.min(), seen.max() + 1))
    assert seen.max() < 899  # the 900 of the training part, of which the last is a target alone


def test_the_stride_is_block_size_unless_given(make):
    assert make().windows.stride == 8
    assert make(stride=3).windows.stride == 3
    assert len(make(stride=1).windows) == 900 - 8


def test_seeds_have_batches_of_their_own(make):
    one, again, other = (train(make(seed=seed), 3) for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_are_characters(make):
    data = make(MANY)
    assert data.vocab_size == len(set(MANY))
    assert data.tokenizer.vocabulary == "".join(sorted(set(MANY)))
    assert data.tokens.dtype == np.uint8 and len(data.tokens) == len(MANY)
    assert data.tokenizer.decode(data.tokens) == MANY


def test_tokens_of_many_characters_take_the_smallest_type_that_holds_them(make):
    for size, dtype in [(255, np.uint8), (256, np.uint8), (257, np.uint16)]:
        text = "".join(map(chr, range(0x4E00, 0x4E00 + size)))
        data = make(text * 2)
        assert data.vocab_size == size and data.tokens.dtype == dtype


def test_tokens_are_bytes(make):
    data = make(MANY, tokenizer="byte")
    assert data.vocab_size == 256 and data.tokens.dtype == np.uint8
    assert data.tokens.tobytes() == MANY.encode()


def test_a_given_vocabulary_replaces_the_text_s_own(make):
    data = make("abcab" * 50, vocabulary="cbax")
    assert data.vocab_size == 4 and data.tokens[:5].tolist() == [2, 1, 0, 2, 1]


@pytest.mark.parametrize(("split", "fraction"), [("tail", 0.1), ("tail", 0.23), ("blocks", 0.4)])
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_predicted_characters_are_counted_apart_from_tokens(make, tokenizer, split, fraction):
    data = make(MANY * 2, tokenizer=tokenizer, split=split, val_fraction=fraction)
    whole = MANY * 2 if tokenizer == "char" else (MANY * 2).encode()
    assert len(data.val_spans) > (split == "blocks")
    predicted = [whole[start + 1 : stop] for start, stop in data.val_spans]
    assert data.val_tokens == sum(map(len, predicted))
    if tokenizer == "byte":  # a byte that begins no character is 10xxxxxx
        predicted = ["".join("c" for byte in piece if byte >> 6 != 2) for piece in predicted]
        assert data.val_tokens > data.val_characters
    assert data.val_characters == sum(map(len, predicted))


@pytest.mark.parametrize("split", ["tail", "blocks"])
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_the_floor_is_what_the_held_out_characters_cost(make, split, tokenizer):
    data = make(corpus="playwright:7:30000", split=split, tokenizer=tokenizer)
    _, ends, nats = write_play(7, 30_000)
    ends, nats = ends.tolist(), nats.tolist()
    # what each character costs: its line's cost in equal shares
    costs = []
    for end, cost in zip(ends, nats, strict=True):
        costs += [cost / (end - len(costs))] * (end - len(costs))
    assert len(costs) == len(data.tokens)
    predicted = [costs[i] for a, b in data.val_spans for i in range(a + 1, b)]
    assert len(predicted) == data.val_characters
    assert data.val_floor == pytest.approx(sum(predicted) / len(predicted), rel=1e-9)
    assert len(data.val_spans) > (split == "blocks")


def test_a_text_of_unknown_entropy_has_no_floor(make):
    assert make().val_floor is None
    data = make(corpus="playwright:7:30000", unknown="drop", vocabulary="\nabc")
    assert data.val_floor is None  # not the corpus's text any more


# --- loaders --------------------------------------------------------------------------------------


def test_batches_are_the_same_with_any_number_of_workers(make):
    alone, helped = make(step=3), make(step=3, num_workers=2)
    assert helped.train_dataloader().num_workers == 2
    assert same(train(alone, 40), train(helped, 40))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("step", [1, 7, 30, 100])
def test_a_loader_that_begins_at_a_step_goes_on_as_if_never_interrupted(make, step, accumulate):
    uninterrupted = train(make(accumulate=accumulate), step * accumulate + 10)
    resumed = train(make(step=step, accumulate=accumulate), 10)
    assert same(resumed, uninterrupted[step * accumulate :])


def test_the_step_is_read_when_iteration_begins(make):
    data = make()
    loader = data.train_dataloader()
    data.trainer.global_step = 5
    assert same(list(loader)[:3], train(make(step=5), 3))
    assert loader.state_dict() == {}  # there is no position to save


def test_batches_do_not_depend_on_how_many_are_worked_out_at_once(make):
    n = BATCHES_AT_ONCE + 5
    assert len(make(batch_size=1).train_dataloader()) > n  # in one epoch
    whole = train(make(batch_size=1), n)
    assert same(whole[3:], train(make(batch_size=1, step=3), n - 3))


@pytest.mark.parametrize("sampling", ["sliding", "random"])
def test_the_batches_of_two_ranks_are_one_process_s_batch_of_twice_the_size(make, sampling):
    ranks = [train(make(sampling=sampling, rank=rank, world=2, step=2), 60) for rank in range(2)]
    alone = train(make(sampling=sampling, batch_size=8, step=2), 60)
    together = [
        [torch.cat(parts) for parts in zip(*both, strict=True)] for both in zip(*ranks, strict=True)
    ]
    assert same(together, alone)


@pytest.mark.parametrize(
    ("world", "accumulate", "length"), [(1, 1, 27), (2, 1, 13), (1, 5, 25), (3, 2, 8), (1, 50, 50)]
)
def test_an_epoch_has_whole_steps_and_no_window_more_than_once(make, world, accumulate, length):
    data = make(world=world, accumulate=accumulate)
    assert len(data.windows) == 111  # of 899 characters that have a next one
    assert len(data.train_dataloader()) == length
    assert data.batches_per_epoch(world, accumulate) == length


def test_overfitting_goes_round_the_first_batches(make):
    plain = train(make(), 3)
    assert same(train(make(overfit_batches=3), 9), plain * 3)
    assert same(train(make(overfit_batches=3, step=4), 2), plain[1:])


class Recorder(LightningModule):
    """Keeps what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_sees_the_batches_in_their_order_across_epochs(make):
    data, model = make(batch_size=20), Recorder()
    expected = train(data, 12)  # an epoch has five, of which four make whole steps
    trainer = Trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        barebones=True,
        accelerator="cpu",
        devices=1,
    )
    trainer.fit(model, datamodule=data)
    assert trainer.current_epoch == 3  # of two steps, four batches each
    assert same(model.seen, expected)


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("split", "fraction"), [("tail", 0.1), ("tail", 0.9), ("blocks", 0.5)])
def test_validation_predicts_each_held_out_character_but_the_first_once(
    make, world, split, fraction
):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))  # an id is its character's place
    settings = dict(split=split, val_fraction=fraction, block_size=16, world=world)
    predicted = []
    for rank in range(world):
        data = make(text, rank=rank, **settings)
        loader = data.val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        for x, y in batches:
            assert x.shape == y.shape and 1 <= x.shape[1] <= 16
            assert torch.equal(y, x + 1)  # the next token
            predicted += y.flatten().tolist()
    expected = [i for start, stop in data.val_spans for i in range(start + 1, stop)]
    assert sorted(predicted) == expected
    assert len(predicted) == data.val_tokens


def test_validation_is_the_same_at_every_step_and_batch_size(make):
    batches = list(make().val_dataloader())
    assert same(list(make(step=9).val_dataloader()), batches)
    large = list(make(batch_size=50).test_dataloader())
    flat = [[row.tolist() for x, _ in found for row in x] for found in (batches, large)]
    assert flat[0] == flat[1]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_validation_takes_whole_windows_in_order_and_then_the_short_ones(batch_size, world):
    spans = [(3, 60), (70, 71), (80, 120), (130, 139), (150, 155)]  # 56, 0, 39, 8 and 4 targets
    starts = [i for a, b in spans for i in range(a, b - 8, 8)]
    batches = [(starts[i : i + batch_size], 8) for i in range(0, len(starts), batch_size)]
    batches += [([112], 7), ([150], 4)]
    for rank in range(world):
        trainer = SimpleNamespace(global_rank=rank, world_size=world)
        sampler = ExactBatches(spans, 8, batch_size, trainer)
        for _ in range(2):
            found = [(starts.tolist(), length) for starts, length in sampler]
            assert found == batches[rank::world] and len(sampler) == len(found)


@pytest.mark.parametrize("split", ["tail", "blocks"])
@pytest.mark.parametrize("most", [9, 10, 200, 201, 10**9])
def test_validation_can_be_of_the_first_held_out_tokens_only(make, split, most):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))  # an id is its character's place
    whole = make(text, split=split, val_fraction=0.2)
    data = make(text, split=split, val_fraction=0.2, max_val_tokens=most)
    assert data.train_spans == whole.train_spans and same(train(data, 5), train(whole, 5))
    first = [i for start, stop in whole.val_spans for i in range(start, stop)][:most]
    begins = {start for start, _ in whole.val_spans}
    predicted = [i for x, y in data.val_dataloader() for i in y.flatten().tolist()]
    assert sorted(predicted) == [i for i in first if i not in begins]
    assert len(predicted) == data.val_tokens == data.val_characters
    for x, _ in data.estimator_batches(data.val_spans, 20, 0, 1):
        assert set(x.flatten().tolist()) <= set(first)


def test_the_floor_is_that_of_the_tokens_validated(make):
    data = make(corpus="playwright:7:30000", max_val_tokens=1000)
    start = data.val_spans[0][0]
    assert data.val_spans == [(start, start + 1000)]
    assert data.val_floor == data.corpus.floor(start + 1, start + 1000)
    assert data.val_floor != make(corpus="playwright:7:30000").val_floor


@pytest.mark.skipif(sys.platform == "win32", reason="files have no holes there")
def test_a_text_of_five_billion_tokens_is_read_in_place(make, tmp_path, monkeypatch):
    count, header = 5 * 10**9, tokens._header(np.dtype(np.uint8), 5 * 10**9)
    path = tmp_path / "tokens.npy"
    with path.open("wb") as file:  # nearly all of it a hole that takes no room on the disk
        file.write(header)
        file.truncate(len(header) + count)
        file.seek(len(header) + count - 1000)
        file.write(bytes(i % 251 for i in range(1000)))
    coder = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 251))))
    there = tokens.TokenFile(path, coder, "")
    monkeypatch.setattr(datamodule, "prepare_tokens", lambda *_: there)
    tracemalloc.start()
    data = make(batch_size=64)
    assert data.train_spans == [(0, 4_500_000_000)]
    starts, _ = next(iter(data.train_dataloader().sampler))
    assert starts.max() > 2**32 - 2**29 and len(np.unique(starts)) == 64
    sampler = data.val_dataloader().sampler
    assert len(data.val_dataloader()) == len(sampler) == -(-62_499_999 // 256) + 1
    assert next(iter(sampler))[0].tolist() == [4_500_000_000 + 8 * i for i in range(256)]
    assert tracemalloc.get_traced_memory()[1] < 16e6
    tracemalloc.stop()
    x, y = WindowDataset(data.tokens)[np.array([count - 1000, count - 9, 0]), 8]
    assert x.tolist() == [[*range(8)], [i % 251 for i in range(991, 999)], [0] * 8]
    assert y[0].tolist() == [*range(1, 9)] and y[1, -1] == 999 % 251


# --- the lecture's estimator ----------------------------------------------------------------------


def test_estimator_batches_are_random_windows_shared_out_over_the_ranks(make):
    data = make()
    alone = list(data.estimator_batches(data.val_spans, 7, 0, 1))
    assert len(alone) == 7
    for x, y in alone:
        assert x.shape == y.shape == (4, 8) and torch.equal(x[:, 1:], y[:, :-1])
        for row in torch.cat([x, y[:, -1:]], dim=1):
            assert data.tokenizer.decode(row.tolist()) in TEXT[900:]
    assert len({tuple(row.tolist()) for x, _ in alone for row in x}) > 14
    shared = [list(data.estimator_batches(data.val_spans, 7, rank, 3)) for rank in range(3)]
    assert [len(batches) for batches in shared] == [3, 2, 2]
    assert same([shared[i % 3][i // 3] for i in range(7)], alone)
    assert same(list(data.estimator_batches(data.val_spans, 7, 0, 1)), alone)  # each time


def test_estimator_batches_are_not_those_that_training_sees(make):
    data = make(sampling="random")
    estimated = list(data.estimator_batches(data.train_spans, 5, 0, 1))
    trained = train(data, 5)
    assert not any(same([a], [b]) for a in estimated for b in trained)


# --- what cannot be -------------------------------------------------------------------------------


def test_an_empty_text_is_refused(make):
    assert "--data.corpus=" in (message := refused(make, "")) and "empty" in message


def test_a_text_too_short_for_its_windows_is_refused(make):
    message = refused(make, "To be, or not to be", block_size=8)
    assert "19 tokens" in message and "--data.block_size=8" in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("block_size", 0),
        ("block_size", -1),
        ("batch_size", 0),
        ("num_workers", -1),
        ("overfit_batches", -1),
        ("stride", 0),
        ("stride", -2),
        ("max_val_tokens", 8),  # one less than a window and the token after it
        ("max_val_tokens", -1),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("val_fraction", math.nan),
        ("sampling", "sometimes"),
        ("split", "middle"),
        ("tokenizer", "word"),
        ("unknown", "ignore"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_flag(make, flag, value):
    message = refused(make, **{flag: value})
    assert f"--data.{flag}=" in message and str(value) in message


def test_a_batch_larger_than_the_text_is_refused(make):
    make(batch_size=111)
    message = refused(make, batch_size=112)
    assert "--data.batch_size=112" in message and "111" in message
    data = make(batch_size=60, world=2)
    with pytest.raises(ValueError, match="--data.batch_size=60 in each of 2 processes"):
        data.train_dataloader()


def test_a_character_that_a_given_vocabulary_lacks_is_named(make):
    message = refused(make, TEXT + "☃" + TEXT, vocabulary="".join(sorted(set(TEXT))))
    assert "'☃'" in message and "position 1000" in message
