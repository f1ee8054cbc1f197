"""The recognizer of the embedded corpus: an independent check of the cost of each line.

The generator draws one derivation of each line. The recognizer reads only the text and sums over
all derivations. They share the rules and `Stage`.
"""

import math

import numpy as np

from gpt_lightning.data.playwright import Stage

Spans = dict[int, tuple[float, int]]  # end offset -> total probability, number of derivations


def _spans(stage: Stage, symbol: str, line: str, start: int, seen: dict) -> Spans:
    """Where a symbol that starts at `start` can end, summed over all its derivations."""
    if (symbol, start) in seen:
        return seen[symbol, start]
    rule, found = stage.rule(symbol), {}
    for nats, parts in zip(rule.nats, rule.parts, strict=True):
        if not line.startswith(parts[0], start):
            continue
        ends = {start + len(parts[0]): (math.exp(-nats), 1)}
        for inner, literal in zip(parts[1::2], parts[2::2], strict=True):
            after: Spans = {}
            for middle, left in ends.items():
                for end, right in _spans(stage, inner, line, middle, seen).items():
                    if line.startswith(literal, end):
                        _add(after, end + len(literal), left[0] * right[0], left[1] * right[1])
            ends = after
        for end, (mass, ways) in ends.items():
            _add(found, end, mass, ways)
    seen[symbol, start] = found
    return found


def _add(spans: Spans, end: int, mass: float, ways: int) -> None:
    old_mass, old_ways = spans.get(end, (0.0, 0))
    spans[end] = old_mass + mass, old_ways + ways


def readings(stage: Stage, line: str) -> list[tuple[str, float, int]]:
    """All (kind, probability, number of derivations) that a line can have in this state."""
    moves, found = stage.moves(), []
    if line[:1].islower():
        return []
    sources = sorted({line, line[:1].lower() + line[1:]})  # generation capitalises the first letter
    for kind, weight in moves.items():
        for source in sources:
            mass, ways = _spans(stage, kind, source, 0, {}).get(len(source), (0.0, 0))
            if ways:
                found.append((kind, mass * weight / sum(moves.values()), ways))
    return found


def recognize(text: str) -> np.ndarray:
    """The cost in nats of each line of a text, float64 (L,), computed from the text alone.

    Raises:
        ValueError: with the line's number, if the text is not whole lines of this grammar.
    """
    stage, nats = Stage(), []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        found = readings(stage, line)
        if not found:
            raise ValueError(f"line {number} is not a line of the grammar here: {line!r}")
        if len(found) > 1 or found[0][2] > 1:
            raise ValueError(f"line {number} has more than one derivation: {line!r}")
        kind, mass, _ = found[0]
        nats.append(-math.log(mass))
        stage.update(kind, line)
    return np.array(nats, np.float64)
