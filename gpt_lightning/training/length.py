"""How long a run is of which nobody says it."""

STEPS = 1000  # a minute or two on two cores
PASSES = 3  # through a shorter text: later ones learn it by heart (docs/experiments.md)
FEWEST_STEPS = 40


def enough_steps(tokens: int, tokens_per_step: int) -> int:
    """Steps for a text of so many training tokens, seen so many at a time: a multiple of four."""
    passes = PASSES * tokens // tokens_per_step
    return min(STEPS, max(FEWEST_STEPS, passes // 4 * 4))
