"""Generated text on a terminal."""

import sys

CONTROLS = (c for c in map(chr, (*range(32), *range(127, 160))) if c not in "\t\n")
ESCAPES = {ord(c): ascii(c)[1:-1] for c in CONTROLS}


def safe_to_show(text: str) -> str:
    """The text for stdout. If that is a terminal, control characters, which it obeys, are escaped.

    The vocabulary of an untrusted file may have them.
    """
    return text.translate(ESCAPES) if sys.stdout.isatty() else text
