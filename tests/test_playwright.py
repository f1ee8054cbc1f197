"""The embedded corpus: its text is pinned, and its floor is exact."""

import hashlib
import math
import re
from collections import Counter

import numpy as np
import pytest
from playwright_recognizer import readings, recognize

from gpt_lightning.data import playwright
from gpt_lightning.data.playwright import Stage, write_lines

TEXT_SHA256 = "765d7ac6b5fac5b294cf707801caf8df2fa2f466aa2b5da9c82387cec751a123"


def write_play(seed: int, chars: int) -> tuple[str, list[float]]:
    """The text of a seed, whole lines of at least `chars` characters, and the cost of each line."""
    source, lines, length = write_lines(seed), [], 0
    while length < chars:
        lines.append(next(source))
        length += len(lines[-1][0])
    return "".join(line for line, _ in lines), [nats for _, nats in lines]


def refused(lines, number, reason="is not a line of the grammar"):
    with pytest.raises(ValueError, match=rf"line {number} {reason}"):
        recognize("\n".join(lines) + "\n")


def find(lines, pattern):
    return next(i for i, line in enumerate(lines) if re.search(pattern, line))


@pytest.fixture(scope="module")
def play():
    """The text of the default corpus."""
    return write_play(playwright.DEFAULT_SEED, playwright.DEFAULT_CHARS)[0]


@pytest.fixture(scope="module")
def small():
    """The lines of a short text."""
    return write_play(7, 60_000)[0].splitlines()


def test_default_text_is_pinned(play):
    # A new hash means a new text, which needs a new GRAMMAR_VERSION.
    assert playwright.GRAMMAR_VERSION == 1
    assert hashlib.sha256(play.encode()).hexdigest() == TEXT_SHA256


def test_the_text_is_ascii_and_varied(play):
    assert play.isascii() and len(set(play)) <= 65
    assert 300 <= len(set(re.findall("[a-z]+", play.lower()))) <= 600
    lines = play.split("\n")
    assert max(map(len, lines)) < 100
    # Long lines are rarely repeated.
    long = Counter(line for line in lines if len(line) > 30)
    assert len(long) > 0.8 * sum(long.values())


def test_acts_scenes_and_casts_are_in_order(play):
    lines = play.splitlines()
    order = [line.split(".")[0] for line in lines if re.match("THE |ACT |SCENE ", line)]
    plays = re.split("THE [A-Z ]+", "/".join(order))[1:-1]  # the last is not whole
    scenes = "(SCENE I/SCENE II/(SCENE III/(SCENE IV/)?)?)"
    whole = "/" + "".join(f"ACT {number}/{scenes}" for number in playwright.ROMAN)
    assert len(plays) > 10 and all(re.fullmatch(whole, play) for play in plays)
    casts = [re.findall("[A-Z]{2,}", line) for line in lines if re.match("Enter .* and ", line)]
    assert {len(cast) for cast in casts} == {2, 3, 4}
    assert all(cast == sorted(set(cast)) for cast in casts)


def test_couplets_rhyme(small):
    words = [(word, i) for i, row in enumerate(playwright.ROWS) for word in row[0] + row[1]]
    sound = dict(words)
    assert len(sound) == len(words)  # no word has two sounds
    stage, couplets = Stage(), 0
    for line in small:
        kind, rhyme = readings(stage, line)[0][0], stage.rhyme
        stage.update(kind, line)
        if kind in ("close", "refrain"):
            word = re.findall("[a-z]+", line)[-1]
            assert word != rhyme and sound[word] == sound[rhyme]
            couplets += 1
    assert couplets > 100


# --- Exactness ------------------------------------------------------------------------------------


def test_the_recognizer_finds_the_cost_of_generation():
    # The generator draws one derivation and the recognizer sums over all, so equality also means
    # that no line has a second derivation.
    text, nats = write_play(0, 150_000)
    np.testing.assert_allclose(recognize(text), nats, rtol=0, atol=1e-9)


def test_the_recognizer_detects_a_second_derivation(monkeypatch, small):
    twice = playwright.Rule([(1, "Exeunt."), (1, "@sound"), (1, "Exeu@end")])
    monkeypatch.setitem(playwright.RULES, "exeunt", twice)
    monkeypatch.setitem(playwright.RULES, "end", playwright.Rule([(1, "nt.")]))
    at = find(small, "^Exeunt")
    refused([*small[:at], "Exeunt."], at + 1, "has more than one derivation")


# --- The recognizer refuses other texts -----------------------------------------------------------


@pytest.mark.parametrize(
    "old, new",
    [
        (r"\b[Tt]hou hast\b", "thou has"),
        (r"\bhe hath\b", "he hast"),
        (r"\bthou art\b", "thou is"),
        (r"\bthe\b", "teh"),
        (r"(?<=[a-z])\.$", ".."),
        (r"^ACT II$", "ACT III"),
        (r"^SCENE II\.", "SCENE I."),
        (r"^Why", "why"),
        (r"^$", "O!"),
    ],
)
def test_changed_words_are_refused(small, old, new):
    at = find(small, old)
    refused([*small[:at], re.sub(old, new, small[at], count=1)], at + 1)


@pytest.mark.parametrize("word", ["snow", "ring", "day"])
def test_a_wrong_rhyme_is_refused(small, word):
    at = find(small, r"^(?!When|If|Since|Though|While).*\bday,$") + 1
    assert re.search(r"ay[.!]$", small[at])
    refused([*small[:at], re.sub(r"\w+([.!])$", word + r"\1", small[at])], at + 1)


def test_only_the_cast_speaks_and_nobody_twice_in_a_row(small):
    enter = find(small, "^Enter ")
    cast = re.findall("[A-Z]{2,}", small[enter])
    first = enter + 2
    second = first + 1 + find(small[first + 1 :], "^[A-Z]+:$")
    absent = next(name for name in playwright.NAMES if name not in cast)
    for at, name in ((first, absent), (second, absent), (second, small[first][:-1])):
        refused([*small[:at], f"{name}:"], at + 1)


def test_missing_lines_are_refused(small):
    at = find(small, r"\?$") + 1  # the gap after a question
    refused([*small[:at], *small[at + 1 :]], at + 1)
    refused(small[1:], 1)


# --- Probabilities --------------------------------------------------------------------------------


def test_frequencies_follow_the_stated_probabilities(play):
    rule = playwright.RULES["hour"]
    counts = Counter(re.findall(r"^SCENE \w+\. .*, (.*)\.$", play, re.M))
    total = sum(counts.values())
    assert total > 200 and counts.keys() == set(rule.texts)
    for text, nats in zip(rule.texts, rule.nats, strict=True):
        prob = math.exp(-nats)
        assert abs(counts[text] - total * prob) < 4 * math.sqrt(total * prob)
