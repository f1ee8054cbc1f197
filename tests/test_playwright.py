"""The embedded corpus: its text is pinned, and its floor is exact."""

import copy
import functools
import hashlib
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from playwright_recognizer import readings, recognize

from gpt_lightning.data import playwright
from gpt_lightning.data.playwright import Stage, floor, write_lines, write_play

HEAD_SHA256 = "91ec0b3d3c6a2da98ae48168ad7ffc26d00bcf6ab73b43f444ece46d451a5e76"
TEXT_SHA256 = "765d7ac6b5fac5b294cf707801caf8df2fa2f466aa2b5da9c82387cec751a123"


@pytest.fixture(scope="module")
def play():
    return write_play()


@pytest.fixture(scope="module")
def small():
    return write_play(seed=7, chars=60_000)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_default_text_is_pinned(play):
    # A new hash means a new text, which needs a new GRAMMAR_VERSION.
    assert playwright.GRAMMAR_VERSION == 1
    assert sha256(play[0][:10_000]) == HEAD_SHA256
    assert sha256(play[0]) == TEXT_SHA256


def test_the_text_depends_on_the_seed():
    assert write_play(3, 5_000)[0] == write_play(3, 5_000)[0] != write_play(4, 5_000)[0]


@pytest.mark.parametrize("chars", [0, 1, 16, 10_000])
def test_the_text_ends_with_the_first_line_that_reaches_chars(chars):
    text, ends, nats = write_play(5, chars)
    assert ends.dtype == np.int64 and nats.dtype == np.float64 and len(ends) == len(nats)
    assert list(ends) == [i + 1 for i, c in enumerate(text) if c == "\n"]
    if chars:
        assert len(text) == ends[-1] >= chars > (ends[-2] if len(ends) > 1 else 0)
    source = write_lines(5)
    assert text == "".join(next(source)[0] for _ in nats)
    assert write_play(5, len(text))[0] == text


def test_the_text_is_ascii_and_varied(play):
    text = play[0]
    assert text.isascii() and len(set(text)) <= 65
    assert 1_000_000 <= len(text) < 1_000_200
    assert 300 <= len(set(re.findall("[a-z]+", text.lower()))) <= 600
    lines = text.split("\n")
    assert max(map(len, lines)) < 100
    # Long lines are rarely repeated.
    long = Counter(line for line in lines if len(line) > 30)
    assert len(long) > 0.8 * sum(long.values())


def test_acts_scenes_and_casts_are_in_order(play):
    lines = play[0].splitlines()
    order = [line.split(".")[0] for line in lines if re.match("THE |ACT |SCENE ", line)]
    plays = re.split("THE [A-Z ]+", "/".join(order))[1:-1]  # the last is not whole
    scenes = "(SCENE I/SCENE II/(SCENE III/(SCENE IV/)?)?)"
    whole = "/" + "".join(f"ACT {number}/{scenes}" for number in playwright.ROMAN)
    assert len(plays) > 10 and all(re.fullmatch(whole, play) for play in plays)
    casts = [re.findall("[A-Z]{2,}", line) for line in lines if re.match("Enter .* and ", line)]
    assert {len(cast) for cast in casts} == {2, 3, 4}
    assert all(cast == sorted(set(cast)) for cast in casts)


def test_couplets_rhyme(small):
    sound = {word: i for i, row in enumerate(playwright.ROWS) for word in row[0] + row[1]}
    stage, couplets = Stage(), 0
    for line in small[0].splitlines():
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
    text, _, nats = write_play(0, 150_000)
    np.testing.assert_allclose(recognize(text), nats, rtol=0, atol=1e-9)


def test_the_recognizer_detects_a_second_derivation(monkeypatch, small):
    twice = playwright.Rule([(1, "Exeunt."), (1, "@sound"), (1, "Exeu@end")])
    monkeypatch.setitem(playwright.RULES, "exeunt", twice)
    monkeypatch.setitem(playwright.RULES, "end", playwright.Rule([(1, "nt.")]))
    text = re.sub("Exeunt.*", "Exeunt.", small[0])
    stop = text.index("Exeunt.\n") + len("Exeunt.\n")
    with pytest.raises(ValueError, match=f"line {text[:stop].count(chr(10))} has more than one"):
        recognize(text[:stop])


def clash(stage):
    """A prefix after which two derivations of the next line are the same, or None.

    Exhaustive: goes, token by token, through all pairs of derivations that agree so far. A state is
    the rest of a line (literal, symbol, literal, ...), so two derivations clash as soon as they
    reach the same state. Tokens can stand for characters, because no word is made of two pieces
    (another test checks that).
    """

    @functools.cache
    def steps(state):
        literal, *rest = state
        if literal:
            token = re.match(r"\w+|.", literal)[0]
            return [(token, (literal[len(token) :], *rest))]
        if not rest:
            return [("", ())]
        symbol, after, *rest = rest
        return [
            step
            for *head, last in stage.rule(symbol).parts
            for step in steps((*head, last + after, *rest))
        ]

    first = [step for kind in stage.moves() for step in steps(("", kind, ""))]
    first = [(token[:1].upper() + token[1:], state) for token, state in first]  # as when generated
    queue, seen = [("", first, first)], set()
    while queue:
        text, left, right = queue.pop()
        for (i, (token, a)), (j, (other, b)) in itertools.product(
            enumerate(left), enumerate(right)
        ):
            if token != other or (left is right and i > j):
                continue
            if a == b and (left is not right or i != j):
                return text + token
            if a and b and (a, b) not in seen:
                seen |= {(a, b), (b, a)}
                queue.append((text + token, steps(a), steps(b)))
    return None


def stages(chars=60_000):
    """A stage in every state that occurs, with and without the rarer moves."""
    stage, found = Stage(), {}
    for line, _ in itertools.islice(write_lines(1), chars // 20):
        kind = readings(stage, line[:-1])[0][0]
        stage.update(kind, line[:-1])
        found.setdefault((stage.state, *stage.moves()), copy.copy(stage))
    return found


STAGES = stages()


def test_every_state_is_visited():
    assert {state for state, *_ in STAGES} == playwright.STATES.keys() - {"start"}


# One stage for each set of moves; whether a speech may also end, with a gap, changes nothing.
MOVES = {" ".join(sorted(s.moves().keys() - {"gap"})) or "gap": s for s in STAGES.values()}


@pytest.mark.parametrize("moves", MOVES)
def test_no_line_has_two_derivations(moves):
    assert clash(MOVES[moves]) is None


def test_no_word_is_made_of_two_pieces():
    for stage in MOVES.values():
        for symbol in {*playwright.RULES, "speaker", "singer", "voc", "gossip", *stage.moves()}:
            for text in stage.rule(symbol).texts:
                assert not re.search(r"\w@", text), (symbol, text)


def test_clash_finds_a_second_derivation(monkeypatch):
    stage = STAGES["ask_", "speaker"]
    monkeypatch.setattr(stage, "moves", lambda: {"exeunt": 1}, raising=False)
    monkeypatch.setitem(playwright.RULES, "end", playwright.Rule([(1, "all."), (1, "all!")]))
    rule = playwright.Rule([(1, "exeunt all."), (1, "Exeunt @end")])
    monkeypatch.setitem(playwright.RULES, "exeunt", rule)
    assert clash(stage) is not None


def test_alternatives_are_distinct_and_probabilities_sum_to_one():
    for stage in STAGES.values():
        symbols = {*playwright.RULES, "noun", "verb", *(stage.moves())}
        for symbol in symbols:
            rule = stage.rule(symbol)
            assert len(set(rule.texts)) == len(rule.texts) > 0, symbol
            assert math.isclose(math.fsum(np.exp(-np.array(rule.nats))), 1)


def test_no_word_is_in_two_rhymes():
    words = [set(nouns + verbs) for nouns, verbs in playwright.ROWS]
    assert sum(map(len, words)) == len(set.union(*words))
    assert all(min(map(len, row)) >= 2 for row in playwright.ROWS)


# --- The recognizer refuses other texts -----------------------------------------------------------


def refused(lines, number):
    with pytest.raises(ValueError, match=rf"line {number}\b"):
        recognize("\n".join(lines) + "\n")


def find(lines, pattern):
    return next(i for i, line in enumerate(lines) if re.search(pattern, line))


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
    lines = small[0].splitlines()[:1500]
    at = find(lines, old)
    lines[at] = re.sub(old, new, lines[at], count=1)
    refused(lines, at + 1)


def test_a_wrong_rhyme_is_refused(small):
    lines = small[0].splitlines()[:1500]
    at = find(lines, r"^(?!When|If|Since|Though|While|Because|Until).*\bday,$")
    assert re.search(r"ay[.!]$", lines[at + 1])
    for word in ("snow", "ring", "day"):
        changed = re.sub(r"\w+([.!])$", word + r"\1", lines[at + 1])
        refused([*lines[: at + 1], changed, *lines[at + 2 :]], at + 2)


def test_only_the_cast_speaks_and_nobody_twice_in_a_row(small):
    lines = small[0].splitlines()[:400]
    enter = find(lines, "^Enter ")
    cast = re.findall("[A-Z]{2,}", lines[enter])
    first = enter + 2
    second = first + 1 + find(lines[first + 1 :], "^[A-Z]+:$")
    absent = next(name for name in playwright.NAMES if name not in cast)
    for at, name in ((first, absent), (second, absent), (second, lines[first][:-1])):
        refused([*lines[:at], f"{name}:", *lines[at + 1 :]], at + 1)
    # Only the cast is spoken to.
    spoken = first + 1
    there = next(name for name in cast if name.title() in lines[spoken])
    changed = lines[spoken].replace(there.title(), absent.title())
    refused([*lines[:spoken], changed, *lines[spoken + 1 :]], spoken + 1)


def test_swapped_and_missing_lines_are_refused(small):
    lines = small[0].splitlines()[:200]
    at = find(lines, r"\?$") + 1  # the gap after a question
    refused([*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]], at + 1)
    refused(lines[1:], 1)
    with pytest.raises(ValueError, match="line 200 does not end"):
        recognize("\n".join(lines))


# --- Probabilities --------------------------------------------------------------------------------


def test_frequencies_follow_the_stated_probabilities(play):
    rule = playwright.RULES["hour"]
    counts = Counter(re.findall(r"^SCENE \w+\. .*, (.*)\.$", play[0], re.M))
    total = sum(counts.values())
    assert total > 200 and counts.keys() == set(rule.texts)
    for text, nats in zip(rule.texts, rule.nats, strict=True):
        prob = math.exp(-nats)
        assert abs(counts[text] - total * prob) < 4 * math.sqrt(total * prob)


# --- The floor ------------------------------------------------------------------------------------


def test_floor_is_the_mean_cost_and_additive(small):
    _, ends, nats = small
    n = int(ends[-1])
    assert floor(ends, nats, 0, n) == pytest.approx(nats.sum() / n, rel=1e-12)
    assert floor(ends, nats, 0, int(ends[9])) == pytest.approx(nats[:10].sum() / ends[9])
    for cut in (1, 777, n // 2, n - 1):
        parts = floor(ends, nats, 0, cut) * cut + floor(ends, nats, cut, n) * (n - cut)
        assert parts == pytest.approx(nats.sum(), rel=1e-12)


def test_floor_counts_a_cut_line_in_proportion():
    ends, nats = np.array([10, 14]), np.array([5.0, 8.0])
    assert floor(ends, nats, 2, 12) == pytest.approx((0.8 * 5 + 0.5 * 8) / 10)


def test_a_bigram_is_a_nat_above_the_floor(play):
    text, ends, nats = play
    _, codes = np.unique(np.frombuffer(text.encode(), np.uint8), return_inverse=True)
    cut, size = len(codes) * 9 // 10, codes.max() + 1
    counts = np.ones((size, size))
    np.add.at(counts, (codes[: cut - 1], codes[1:cut]), 1)
    probs = counts / counts.sum(1, keepdims=True)
    loss = -np.log(probs[codes[cut - 1 : -1], codes[cut:]]).mean()
    assert loss > floor(ends, nats, cut, len(codes)) + 1
