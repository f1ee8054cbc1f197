"""Costs of tokens against hand-made bigram models, naive windows and the definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import perturbed

from gpt_lightning.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.generation.generator import TextGenerator
from gpt_lightning.generation.scoring import predictions, total
from gpt_lightning.model import GPTConfig, build_model
from gpt_lightning.model.lecture import BigramConfig


def bigram(table, block_size=4):
    """A bigram model with these probabilities of the next token."""
    model = build_model(BigramConfig(vocab_size=len(table), block_size=block_size))
    model.token_embedding_table.weight.data = torch.tensor(table).log()
    return model


def gpt():
    torch.manual_seed(4)
    sizes = dict(n_layer=1, n_head=1, n_embd=16, vocab_size=11, block_size=8)
    return perturbed(build_model(GPTConfig(**sizes)))


def costs(model, ids, spans=None, **more):
    spans = spans or [(0, len(ids))]
    return np.concatenate([piece.nats for piece in predictions(model, ids, spans, **more)])


IDS = np.random.default_rng(1).integers(11, size=203)


@pytest.mark.parametrize("stride", [None, 1, 3])
def test_a_bigram_models_cost_is_that_of_its_pairs(stride):
    generator = TextGenerator(bigram([[0.5, 0.5], [0.25, 0.75]]), CharTokenizer("ab"))
    score = generator.score("aabbba", stride)  # pairs aa, ab, bb, bb, ba
    nats = -math.log(0.5 * 0.5 * 0.75 * 0.75 * 0.25)
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert (score.tokens, score.characters, score.bytes) == (5, 5, 5)
    assert score.nats_per_character == pytest.approx(nats / 5, rel=1e-6)
    assert score.bits_per_character == pytest.approx(nats / 5 / math.log(2), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(nats / 5), rel=1e-6)


@pytest.mark.parametrize(
    ("tokenizer", "tokens"), [(CharTokenizer("aé春"), 3), (ByteTokenizer(), 6)]
)
def test_characters_and_bytes_are_counted_alike_for_any_tokenizer(tokenizer, tokens):
    model = bigram([[1 / tokenizer.vocab_size] * tokenizer.vocab_size] * tokenizer.vocab_size)
    score = TextGenerator(model, tokenizer).score("aé春a")
    assert (score.tokens, score.characters, score.bytes) == (tokens, 3, 6)
    nats = tokens * math.log(tokenizer.vocab_size)
    assert score.nats_per_character == pytest.approx(nats / 3, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(nats / 6 / math.log(2), rel=1e-6)


@pytest.mark.parametrize("stride", [8, 3, 1])
def test_costs_equal_those_of_one_window_at_a_time(stride):
    model, expected, done = gpt(), [], 0
    for start in range(0, 203, stride):
        x = torch.from_numpy(IDS[start : start + 9])
        with torch.no_grad():
            all_costs = F.cross_entropy(model(x[None, :-1])[0], x[1:], reduction="none")
        expected += all_costs[max(0, done - start) :].tolist()
        done = len(expected)
        if done == 202:
            break
    torch.testing.assert_close(costs(model, IDS, stride=stride), np.float32(expected))


def test_batch_size_and_threads_do_not_change_the_figure():
    model, tokenizer, figures = gpt(), CharTokenizer("abcdefghijk"), []
    threads = torch.get_num_threads()
    try:
        for count, batch_size in [(1, None), (2, None), (1, 1), (2, 3), (1, 1000)]:
            torch.set_num_threads(count)
            pieces = predictions(model, IDS, [(0, len(IDS))], batch_size=batch_size)
            figures.append(total(pieces, tokenizer))
    finally:
        torch.set_num_threads(threads)
    for figure in figures:
        assert figure.nats_per_character == pytest.approx(figures[0].nats_per_character, abs=1e-6)


def test_spans_are_scored_apart_from_each_other_in_the_ids_smallest_type():
    model, ids = gpt(), IDS.astype(np.uint8)
    parts = [costs(model, ids[a:b]) for a, b in [(2, 60), (150, 203)]]
    spans = costs(model, ids, spans=[(2, 60), (100, 101), (150, 203)])
    torch.testing.assert_close(spans, np.concatenate(parts))


@pytest.mark.parametrize("more", [{"stride": 0}, {"stride": 9}, {"batch_size": 0}])
def test_settings_out_of_range_are_errors(more):
    with pytest.raises(UserError, match=f"{next(iter(more))}="):
        costs(gpt(), IDS, **more)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_a_predicted_character_is_an_error(text):
    with pytest.raises(UserError, match="fewer than two tokens"):
        TextGenerator(bigram([[0.5, 0.5]] * 2), CharTokenizer("ab")).score(text)


def test_predictions_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        costs(bigram([[0.5, math.nan]] * 2), np.array([0, 1]))
