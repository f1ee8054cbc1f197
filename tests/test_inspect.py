"""The command `inspect`, and what `fit` prints of it."""

import re
from functools import partial

import numpy as np
import pytest
from conftest import TINY, run

from gpt_lightning.data.corpus import find_corpus

WORDS = "the of and to in that is was for it with as his on be at by had not are but from"


def lines_of(n: int, seed: int) -> str:
    draw = np.random.default_rng(seed)
    return "".join(" ".join(draw.choice(WORDS.split(), 8)) + "\n" for _ in range(n))


@pytest.fixture
def inspect(ends):
    return partial(ends, "inspect")


def test_a_clean_text_is_described_without_a_warning(inspect, tmp_path):
    path = tmp_path / "clean.txt"
    path.write_text(lines_of(400, 0) + "Ω", encoding="utf-8")
    code, out, _ = inspect(path)
    text = path.read_text("utf-8")
    assert code == 0 and "warning" not in out
    assert f"{len(text):,} characters, {path.stat().st_size:,} bytes in UTF-8, 401 lines" in out
    assert "1 U+03A9 GREEK CAPITAL LETTER OMEGA" in out and "floor" not in out


def test_a_repeated_passage_is_reported_with_the_files_and_lines_that_have_it(inspect, tmp_path):
    for name, text in (
        ("a.txt", lines_of(300, 1)),
        ("b.txt", lines_of(100, 2) + "#" + lines_of(40, 4) + "#"),
        ("c.txt", lines_of(25, 3) + "%" + lines_of(40, 4) + "%"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    _, out, _ = inspect(tmp_path, "--val_fraction=0.12")
    assert re.search(r"warning: \d+% of the validation text repeats", out)
    places = f"validation line 26 of {tmp_path}/c.txt, training line 101 of {tmp_path}/b.txt"
    assert f"{len(lines_of(40, 4)):,} tokens: {places}" in out


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_losses_and_the_floor_are_in_nats_per_character(inspect, tokenizer):
    _, out, _ = inspect("playwright:3:30000", f"--tokenizer={tokenizer}")
    losses = [float(x) for x in re.findall(r"^(?:uniform|\d-gram) +([\d.]+)", out, re.M)]
    floor = float(re.search(r"^floor +([\d.]+)", out, re.M)[1])
    assert losses[:5] == sorted(losses[:5], reverse=True) and len(losses) == 7
    # the text has 30,000 characters and the rest of its last line
    corpus = find_corpus("playwright:3:30000")
    n = sum(map(len, corpus.chunks()))
    assert floor == pytest.approx(corpus.floor(int(n * 0.9) + 1, n), abs=1e-4)


def test_a_long_text_is_sampled_and_the_report_says_so(inspect, tmp_path, monkeypatch):
    for name, value in (("MOST_COUNTED", 20000), ("PIECE", 1000), ("MOST_COMPARED", 500)):
        monkeypatch.setattr(f"gpt_lightning.commands.inspect.{name}", value)
    (tmp_path / "long.txt").write_text(lines_of(800, 0))
    code, out, _ = inspect(tmp_path / "long.txt")
    assert code == 0 and "warning" not in out and "in 500 validation tokens" in out
    counted = int(re.search(r"counted on ([\d,]+) tokens", out)[1].replace(",", ""))
    assert 10_000 < counted <= 20_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_fraction=1"], "--val_fraction=1.0 must be above 0 and below 1"),
        (["one.txt"], "one.txt has 1 tokens, too few to hold out --val_fraction=0.1"),
        (["missing.txt"], "error: corpus=missing.txt is not found"),
        (["--splt=tail"], "did you mean --split?"),
    ],
)
def test_a_mistake_is_one_line(inspect, flags, message, empty):
    (empty / "one.txt").write_text("x")
    code, _, error = inspect(*flags)
    assert code == 2 and message in error and error.count("\n") == 1


def test_fit_prints_the_warnings_of_a_text_once(here, capsys):
    # its text is two lines, twenty times
    for flags, notes in ((TINY, 1), (["--ckpt_path=last", "--trainer.max_steps=5"], 0)):
        assert run("fit", *flags) == 0
        out = capsys.readouterr().out
        assert len(re.findall(r"^note   100% of the validation text repeats", out, re.M)) == notes
    (here / "text.txt").write_text(lines_of(100, 0))
    assert run("fit", *TINY) == 0
    assert "note " not in capsys.readouterr().out
