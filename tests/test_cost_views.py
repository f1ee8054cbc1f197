"""The text in cells: each tokenizer's tokens, their alternatives, and what a terminal is sent."""

import math

import pytest

from gpt_lightning.commands import cost_views
from gpt_lightning.commands.cost_views import Cell, TokenCosts, colored, label, visible
from gpt_lightning.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt_lightning.data.words import WordTokenizer
from gpt_lightning.generation.scoring import predictions
from gpt_lightning.model import build_model
from gpt_lightning.model.lecture import BigramConfig

TEXT = "é to\nbe 春"


def costs_of(tokenizer, text=TEXT, spans=None):
    """Under a bigram model with equal probabilities, but for token 0, which is less likely."""
    model = build_model(BigramConfig(vocab_size=tokenizer.vocab_size, block_size=4))
    model.token_embedding_table.weight.data.zero_()[:, 0] = -1.0
    ids = tokenizer.encode(text)
    spans = spans or [(0, len(ids))]
    costs = TokenCosts(tokenizer, ids, spans)
    list(costs.record(predictions(model, ids, spans)))
    return costs


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer("".join(sorted(set(TEXT)))), ByteTokenizer(),
     WordTokenizer('["to", "be", "\\n", " ", "é", "春", "t", "o", "b", "e"]')],
    ids=lambda tokenizer: tokenizer.kind,
)  # fmt: skip
def test_cells_are_the_whole_text_and_cost_what_their_tokens_cost(tokenizer):
    costs = costs_of(tokenizer)
    cells = list(costs.cells())
    words = ["é", " ", "to", "\n", "be", " ", "春"]
    expected = words if tokenizer.kind == "word" else list(TEXT)
    assert [cell.text for cell in cells] == expected
    assert [cell.predicted for cell in cells] == [False] + [True] * (len(expected) - 1)
    for cell in cells[1:]:
        ids = tokenizer.encode(cell.text)
        normal = math.log(tokenizer.vocab_size - 1 + math.exp(-1))
        assert cell.nats == pytest.approx(sum(normal + (i == 0) for i in ids), rel=1e-5)
        assert len(cell.likeliest) == 5
        assert all(math.exp(-normal) == pytest.approx(p, rel=1e-5) for _, p in cell.likeliest)


def test_a_part_that_begins_and_ends_within_a_character_is_shown():
    cells = list(costs_of(ByteTokenizer(), "春to春", [(1, 7)]).cells())
    expected = b"\x98\xa5to\xe6\x98".decode("utf-8", "replace")
    assert "".join(cell.text for cell in cells) == expected


def test_a_long_text_is_cut_and_its_first_tokens_have_alternatives(monkeypatch):
    monkeypatch.setattr(cost_views, "SHOWN", 7)
    costs = costs_of(CharTokenizer("ab"), "ab" * 20)
    assert "".join(cell.text for cell in costs.cells(7)) == "abababa"
    assert all(cell.likeliest for cell in list(costs.cells(7))[1:])
    assert len(list(costs.cells())) == 40


def test_a_token_is_named_by_what_can_be_seen_of_it():
    for token, name in (
        (b" ", "space"),
        (b"\n", "line end"),
        ("é".encode(), "é"),
        (b"\xe6", "\\xe6"),
    ):
        assert label(token) == name


def test_control_characters_are_visible_and_do_not_reach_the_terminal():
    assert visible("a\x1b[31m\t\u202e\\n\ud800é\n") == "a\\x1b[31m\\t\\u202e\\n\\ud800é↵\n"
    assert "\x1b]" not in colored(visible("\x1b]0;title\x07"), 5)


def test_the_level_is_the_whole_bits_of_a_character():
    for bits, level in ((0, 0), (0.9, 0), (1.1, 1), (7.9, 7), (8.1, 8), (50, 8)):
        assert Cell("a", bits * math.log(2), True, []).level == level
        assert Cell("abc", 3 * bits * math.log(2), True, []).level == level


def test_a_color_ends_before_a_line_does():
    assert colored("a\nb", 0) == "a\nb"
    first, second = colored("a\nb", 3).split("\n")
    assert first.endswith("a\x1b[0m") and second.startswith("\x1b[38;5;16;48;5;")
