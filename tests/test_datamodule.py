"""TextDataModule: what a batch is, position, ranks, exact validation, sizes that do not fit."""

import math
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from gpt_lightning.compatibility import check_corpus
from gpt_lightning.data.datamodule import BATCHES_AT_ONCE, TextDataModule
from gpt_lightning.data.playwright import write_lines
from gpt_lightning.data.windows import SlidingWindows
from gpt_lightning.errors import UserError

TEXT = "".join(np.random.default_rng(0).choice(list("abcdefghij klmnop\n"), 1000))
MANY = "Gemüt, θάλασσα, 海, 🙂! " * 50  # characters of one to four bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))


def distinct(count: int) -> str:
    """A text in which the id of each character is its position."""
    return "".join(map(chr, range(0x4E00, 0x4E00 + count)))


def trainer_at(rank=0, world=1, step=0, accumulate=1, device="cpu"):
    return SimpleNamespace(
        global_rank=rank,
        world_size=world,
        global_step=step,
        accumulate_grad_batches=accumulate,
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )


@pytest.fixture
def make(tmp_path):
    """A data module for a text, with a trainer in the given position."""

    def make(text=TEXT, rank=0, world=1, step=0, accumulate=1, stage=None, **settings):
        path = tmp_path / "text.txt"
        path.write_text(text, encoding="utf-8", newline="")
        data = TextDataModule(**dict(corpus=str(path), block_size=8, batch_size=4) | settings)
        data.trainer = trainer_at(rank, world, step, accumulate)
        data.prepare_data()
        data.setup(stage)
        return data

    return make


@pytest.fixture
def other(tmp_path):
    """The name of a file with this text."""

    def write(text, name="other.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        return str(tmp_path / name)

    return write


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


# --- what a batch is ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["sliding", "random"])
def test_batches_equal_those_gathered_window_by_window(make, sampling):
    data = make(sampling=sampling, split="blocks", val_fraction=0.3)
    ids = [sorted(set(TEXT)).index(c) for c in TEXT]
    n = 3 * len(data.windows) // 4  # three epochs, in batches of four
    for i, (x, y) in enumerate(train(data, n)):
        starts = data.windows.starts(np.arange(4 * i, 4 * i + 4)).tolist()
        assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        assert x.tolist() == [ids[s : s + 8] for s in starts]
        assert y.tolist() == [ids[s + 1 : s + 9] for s in starts]


def test_loaders_work_in_a_plain_loop_without_trainer_or_setup(make, tmp_path):
    expected = make()
    data = TextDataModule(str(tmp_path / "text.txt"), block_size=8, batch_size=4)
    loader = data.train_dataloader()
    n = len(loader)
    assert same([*loader, *loader], train(expected, 2 * n))
    assert same(list(data.val_dataloader()), list(expected.val_dataloader()))


def test_a_pickled_module_carries_the_paths_of_its_ids(make, other):
    data = make(TEXT * 100, val_corpus=other(TEXT))
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000 < len(data.tokens)
    copy = pickle.loads(pickled)
    assert same(train(copy, 3), train(data, 3))
    assert same(list(copy.val_dataloader()), list(data.val_dataloader()))


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "fraction"), [("tail", 0.23), ("blocks", 0.4)])
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_predicted_characters_and_tokens_are_counted(make, tokenizer, split, fraction):
    data = make(MANY * 2, tokenizer=tokenizer, split=split, val_fraction=fraction)
    whole = MANY * 2 if tokenizer == "char" else (MANY * 2).encode()
    assert len(data.val_spans) > (split == "blocks")
    predicted = [whole[start + 1 : stop] for start, stop in data.val_spans]
    assert data.val_tokens == sum(map(len, predicted))
    if tokenizer == "byte":  # 10xxxxxx continues a character
        predicted = ["".join("c" for byte in piece if byte >> 6 != 2) for piece in predicted]
        assert data.val_tokens > data.val_characters
    assert data.val_characters == sum(map(len, predicted))


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(split="blocks", tokenizer="byte"),
        dict(max_val_tokens=1000),
        dict(split="blocks", tokenizer="word"),
        dict(corpus="playwright:3:60000", val_corpus="playwright:7:9000"),
    ],
)
def test_the_floor_is_the_mean_cost_of_the_validated_characters(make, settings):
    data = make(**dict(corpus="playwright:7:30000") | settings)
    costs, lines = [], write_lines(7)
    decode = data.tokenizer.decode
    while len(costs) < len(decode(data.val_ids)):  # each character has an equal share of its line's
        line, nats = next(lines)
        costs += [nats / len(line)] * len(line)
    spans = [[len(decode(data.val_ids[:n])) for n in (a + 1, b)] for a, b in data.val_spans]
    predicted = [costs[i] for a, b in spans for i in range(a, b)]
    assert len(predicted) == data.val_characters
    assert data.val_floor == pytest.approx(sum(predicted) / len(predicted), rel=1e-9)


def test_a_text_of_unknown_entropy_has_no_floor(make):
    assert make().val_floor is None
    data = make(corpus="playwright:7:30000", unknown="drop", vocabulary="\nabc")
    assert data.val_floor is None  # characters are left out, so it is another text
    assert make(test_corpus="playwright:7:9000", unknown="replace").val_floor is None


# --- position and ranks ---------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "accumulate"), [(1, 1), (30, 1), (7, 3)])
def test_a_loader_that_starts_at_a_step_continues_the_uninterrupted_run(make, step, accumulate):
    uninterrupted = train(make(accumulate=accumulate), step * accumulate + 10)
    resumed = train(make(step=step, accumulate=accumulate), 10)
    assert same(resumed, uninterrupted[step * accumulate :])


def test_the_step_is_read_when_iteration_begins(make):
    data = make()
    loader = data.train_dataloader()
    data.trainer.global_step = 5
    assert same(list(loader)[:3], train(make(step=5), 3))
    assert loader.state_dict() == {}


def test_batches_do_not_depend_on_how_many_are_computed_together(make):
    n = BATCHES_AT_ONCE + 5
    assert len(make(batch_size=1).train_dataloader()) > n  # in one epoch
    whole = train(make(batch_size=1), n)
    assert same(whole[3:], train(make(batch_size=1, step=3), n - 3))


@pytest.mark.parametrize("sampling", ["sliding", "random"])
def test_batches_of_two_ranks_are_one_batch_of_twice_the_size(make, sampling):
    ranks = [train(make(sampling=sampling, rank=rank, world=2, step=2), 60) for rank in range(2)]
    alone = train(make(sampling=sampling, batch_size=8, step=2), 60)
    together = [
        [torch.cat(parts) for parts in zip(*both, strict=True)] for both in zip(*ranks, strict=True)
    ]
    assert same(together, alone)


@pytest.mark.parametrize(("world", "accumulate", "length"), [(1, 1, 27), (3, 2, 8), (1, 50, 50)])
def test_an_epoch_has_whole_steps_and_no_window_twice(make, world, accumulate, length):
    data = make(world=world, accumulate=accumulate)
    assert len(data.windows) == 111  # of 899 characters that have a next one
    assert len(data.train_dataloader()) == length


def test_overfit_batches_repeats_the_first_batches(make):
    plain = train(make(), 3)
    assert same(train(make(overfit_batches=3), 9), plain * 3)
    assert same(train(make(overfit_batches=3, step=4), 2), plain[1:])


class Recorder(LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch)
        return torch.zeros(1)

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**settings):
    return Trainer(barebones=True, accelerator="cpu", devices=1, **settings)


def test_a_trainer_gets_the_batches_in_order_across_epochs(make):
    expected = train(make(batch_size=20), 12)  # an epoch has five, of which four fill whole steps
    data, model = make(batch_size=20), Recorder()
    fitting = trainer(max_steps=6, accumulate_grad_batches=2, limit_val_batches=0)
    fitting.fit(model, datamodule=data)
    assert fitting.current_epoch == 3  # of two steps, four batches each
    assert same(model.seen, expected)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_a_trainer_evaluates_every_batch_without_warnings(make, loop):
    data, model = make(val_fraction=0.5), Recorder()
    expected = list(data.val_dataloader())
    getattr(trainer(), loop)(model, datamodule=data)
    assert same(model.seen, expected)


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(("split", "fraction"), [("tail", 0.9), ("blocks", 0.5)])
def test_validation_predicts_each_held_out_character_but_the_first_once(
    make, world, split, fraction
):
    settings = dict(split=split, val_fraction=fraction, block_size=16)
    settings |= dict(world=world, stage="validate")
    predicted = []
    for rank in range(world):
        data = make(distinct(3000), rank=rank, **settings)
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


@pytest.mark.parametrize("split", ["tail", "blocks"])
@pytest.mark.parametrize("most", [9, 201, 10**9])
def test_max_val_tokens_validates_the_first_held_out_tokens(make, split, most):
    text = distinct(2000)
    whole = make(text, split=split, val_fraction=0.2)
    data = make(text, split=split, val_fraction=0.2, max_val_tokens=most)
    assert data.train_spans == whole.train_spans and same(train(data, 5), train(whole, 5))
    first = [i for start, stop in whole.val_spans for i in range(start, stop)][:most]
    begins = {start for start, _ in whole.val_spans}
    predicted = [i for x, y in data.val_dataloader() for i in y.flatten().tolist()]
    assert sorted(predicted) == [i for i in first if i not in begins]
    assert len(predicted) == data.val_tokens == data.val_characters


@pytest.mark.parametrize(
    ("vocab_size", "block_size", "batch_size", "device", "expected"),
    [
        (65, 128, 16, "cpu", 16),
        (65, 8, 16, "cpu", 256),
        (65, 8, 4, "cpu", 64),  # at most 16 times the training batch
        (65, 128, 16, "cuda", 256),
        (20_000, 128, 16, "cuda", 26),  # 26 * 128 * 20,000 fp32 logits: 266 MB
        (300_000, 1024, 5, "cuda", 5),  # never below the training batch
    ],
)
def test_the_validation_batch_fits_vocabulary_and_device(
    make, vocab_size, block_size, batch_size, device, expected
):
    data = make(TEXT * 400, stage="validate", block_size=block_size, batch_size=batch_size)
    data.trainer = trainer_at(device=device)
    data.token_file.tokenizer.vocab_size = vocab_size
    assert max(len(starts) for starts, _ in data.val_dataloader().batches) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_of_many_ranks_gets_batches_of_a_short_validation_text(make, device):
    predicted = []
    for rank in range(8):
        data = make(distinct(3000), stage="validate", batch_size=16, rank=rank, world=8)
        data.trainer.strategy.root_device = torch.device(device)
        loader = data.val_dataloader()
        assert len(loader) > 0
        predicted += [
            i + 1 for starts, n in loader.batches for s in starts for i in range(s, s + n)
        ]
    assert sorted(predicted) == list(range(2701, 3000))


def test_more_ranks_than_validation_windows_are_refused(make):
    with pytest.raises(UserError, match="fewer validation windows \\(2\\) than processes \\(3\\)"):
        make(val_fraction=0.01, stage="validate", rank=1, world=3).val_dataloader()


@pytest.mark.parametrize("text", ["ab", TEXT[:500]])
def test_validation_works_on_a_text_too_short_for_training(make, text):
    data = make(text, stage="validate", val_fraction=1, block_size=500)
    assert data.val_spans == [(0, len(text))]
    predicted = [data.tokenizer.decode(y.flatten()) for _, y in data.val_dataloader()]
    assert "".join(predicted) == text[1:]
    with pytest.raises(UserError, match="leaves no text to train on"):
        data.train_dataloader()


# --- texts of their own for validation and test ---------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
def test_a_validation_text_is_predicted_as_a_whole(make, other, world):
    name = other(distinct(3000)[::-1][:700])
    predicted = []
    for rank in range(world):
        data = make(distinct(3000), val_corpus=name, rank=rank, world=world)
        predicted += [i for _, y in data.val_dataloader() for i in y.flatten().tolist()]
    assert sorted(predicted) == sorted(range(2300, 2999))  # all but the first, id 2999
    assert data.val_tokens == data.val_characters == 699
    assert data.train_spans == [(0, 3000)] and data.vocab_size == 3000


def test_with_a_validation_text_all_of_the_corpus_is_trained_on(make, other):
    data = make(distinct(1001), val_corpus=other(distinct(500)), stride=8)
    seen = {
        i for x, y in train(data, len(data.train_dataloader()) * 3) for i in x.unique().tolist()
    }
    assert len(seen) > 990 and max(seen) > 990
    # the windows are those of a run that has nothing held out
    expected = SlidingWindows([(0, 1001)], 8, 8, 1337).starts(np.arange(4))
    assert data.windows.starts(np.arange(4)).tolist() == expected.tolist()


def test_the_test_text_is_for_the_test_stage_only(make, other):
    data = make(TEXT, test_corpus=other(TEXT[:50]))
    plain = make(TEXT)
    assert same(list(data.val_dataloader()), list(plain.val_dataloader()))
    assert data.train_spans == plain.train_spans and data.val_characters == 99
    tested = "".join(data.tokenizer.decode(y.flatten()) for _, y in data.test_dataloader())
    assert tested == TEXT[1:50] and data.val_characters == 49
    assert same(list(data.val_dataloader()), list(plain.val_dataloader()))
    assert data.val_characters == 99
    assert same(list(plain.test_dataloader()), list(plain.val_dataloader()))


@pytest.mark.parametrize("tokenizer", ["byte", "word", "bpe"])
def test_a_validation_text_is_encoded_by_the_tokenizer_of_the_training_text(make, other, tokenizer):
    data = make(TEXT, tokenizer=tokenizer, val_corpus=other(TEXT[300:500]))
    alone = make(TEXT, tokenizer=tokenizer)
    assert data.tokenizer.state() == alone.tokenizer.state()
    assert data.tokenizer.decode(data.val_ids) == TEXT[300:500]


def test_characters_that_the_training_text_lacks_are_named(make, other):
    name = other("ab\nc\u00fc")
    for setting in ("val_corpus", "test_corpus"):
        with pytest.raises(UserError, match=rf"^{setting}=.*other.txt: the character 'ü'"):
            make(TEXT, **{setting: name})
    data = make(TEXT, val_corpus=name, unknown="replace", stage="validate")
    assert data.tokenizer.decode(data.val_ids) == "ab\nc "  # the first replacement in the text
    assert data.val_floor is None


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a", {}, "^val_corpus=.*other.txt has 1 tokens, too few"),
        ("", {}, "^val_corpus=.*other.txt has no text in it"),
        ("abc", {}, "^block_size=8 with batch_size=4 is too large for .*validated on 3; choose"),
        ("abc" * 9, dict(field="text"), "^field=text is for files that end in"),
        ("abc" * 9, dict(encoding="utf9"), "^encoding=utf9 is neither"),
    ],
)
def test_a_validation_text_that_cannot_be_used_is_refused(make, other, text, settings, message):
    with pytest.raises(UserError, match=message):
        make(TEXT, val_corpus=other(text), **settings)


def test_the_settings_of_files_are_for_every_text(make, other):
    rows = other('{"body": "ab"}\n{"body": "cd"}\n', "rows.jsonl")
    settings = dict(field="body", separator="|", stage="validate", block_size=2, batch_size=1)
    data = make(corpus=rows, val_corpus=rows, **settings)
    assert data.tokenizer.decode(data.val_ids) == data.tokenizer.decode(data.tokens) == "ab|cd"
    assert data.token_file.documents == 2 and data.token_file.characters == 5


def test_a_checkpoint_tells_the_validation_text(make, other):
    before = make(TEXT, val_corpus=other(TEXT[:100])).describe()
    check_corpus(before, before, "a.ckpt", fitting=True)
    another = make(TEXT, val_corpus=other(TEXT[:101], "b.txt")).describe()
    check_corpus(before, another, "a.ckpt", fitting=False)
    for now in (another, make(TEXT).describe()):
        with pytest.raises(UserError, match="is not its val_corpus"):
            check_corpus(before, now, "a.ckpt", fitting=True)
    changed = make(TEXT, val_corpus=other(TEXT[:101])).describe()
    with pytest.raises(UserError, match="val_corpus=.* has changed since"):
        check_corpus(before, changed, "a.ckpt", fitting=False)
    own = make(TEXT + "more\n", val_corpus=other(TEXT[:100])).describe()
    check_corpus(before, own, "a.ckpt", fitting=False)  # only the text that is scored counts


def test_text_that_a_checkpoint_was_trained_on_is_not_validated(make, other):
    own = make(TEXT).describe()
    cases = [
        (make(TEXT, val_corpus=other(TEXT[:100])).describe(), own, "was trained on all of corpus="),
        (own, make(TEXT, val_fraction=1, stage="validate").describe(), "^val_fraction=1: "),
        (own, make(TEXT, split="blocks").describe(), "^split=blocks: .* with split=tail"),
        (own, make(TEXT + "more\n").describe(), "corpus=.* has changed since its training"),
    ]
    for before, now, message in cases:
        with pytest.raises(UserError, match=message):
            check_corpus(before, now, "a.ckpt", fitting=False)
    check_corpus(own, make(TEXT, val_corpus=other(TEXT[:100])).describe(), "a.ckpt", False)


def test_estimator_batches_of_validation_are_from_its_own_text(make, other):
    data = make(TEXT, val_corpus=other("abcdefgh" * 9))
    for x, _ in data.estimator_batches("val", 3, 0, 1):
        assert all(data.tokenizer.decode(row) in "abcdefgh" * 3 for row in x)
    rows = [row for x, _ in data.estimator_batches("train", 3, 0, 1) for row in x]
    assert all(data.tokenizer.decode(row) in TEXT for row in rows)


# --- the lecture's estimator ----------------------------------------------------------------------


def test_estimator_batches_are_random_windows_divided_among_the_ranks(make):
    data = make()
    alone = list(data.estimator_batches("val", 7, 0, 1))
    for x, y in alone:
        assert x.shape == y.shape == (4, 8) and torch.equal(x[:, 1:], y[:, :-1])
        rows = torch.cat([x, y[:, -1:]], dim=1)
        assert all(data.tokenizer.decode(row) in TEXT[900:] for row in rows)
    assert len({tuple(row.tolist()) for x, _ in alone for row in x}) > 14
    shared = [list(data.estimator_batches("val", 7, rank, 3)) for rank in range(3)]
    assert same([shared[i % 3][i // 3] for i in range(7)], alone)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("batch_size", 0),
        ("overfit_batches", -1),
        ("stride", 0),
        ("max_val_tokens", 8),  # one less than a window and the token after it
        ("val_fraction", 0.0),
        ("val_fraction", math.nan),
        ("sampling", "sometimes"),
        ("split", "middle"),
        ("tokenizer", "words"),
        ("unknown", "ignore"),
    ],
)
def test_an_invalid_setting_is_refused_at_construction(field, value):
    with pytest.raises(UserError) as error:
        TextDataModule(**dict(block_size=8) | {field: value})
    assert str(error.value).startswith(f"{field}={value} must be")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(block_size=900),
            "^block_size=900 with batch_size=4 is too large for a text of 1,000",
        ),
        (dict(block_size=100), "^block_size=100 with batch_size=4 is too large"),  # to validate
        (dict(batch_size=112), "^block_size=8 with batch_size=112 is too large"),
        (dict(batch_size=56, world=2), "^block_size=8 with batch_size=56 is too large"),
        (dict(text="abc"), "more text"),
        (dict(val_fraction=1.0), "leaves no text to train on"),
    ],
)
def test_sizes_too_large_for_the_text_are_refused(make, settings, message):
    make(batch_size=111)
    make(batch_size=55, world=2)
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize("length", [20, 60, 600, 5000])
@pytest.mark.parametrize("split", ["tail", "blocks"])
@pytest.mark.parametrize("sampling", ["sliding", "random"])
def test_the_sizes_that_an_error_suggests_work(make, length, split, sampling):
    settings = dict(text=distinct(length), split=split, sampling=sampling, world=2)
    with pytest.raises(UserError) as error:
        make(**settings, block_size=512, batch_size=64)
    sizes = re.search(r"choose block_size=(\d+) and batch_size=(\d+)", str(error.value))
    make(**settings, block_size=int(sizes[1]), batch_size=int(sizes[2]))


def test_tokens_that_are_removed_from_the_cache_stay_in_use(make, tmp_path):
    data = make()
    expected = list(data.val_dataloader())
    data.token_file.path.unlink()
    assert same(list(data.val_dataloader()), expected)
