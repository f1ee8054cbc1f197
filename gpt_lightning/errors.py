"""The one exception that the command line turns into a message: a user's mistake."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's, which the command line reports in one line, with exit code 2.

    Args:
        message: what is wrong and what to do. For a setting it begins with `name=value`.
        field: the setting's name, if the message begins with one. The command line puts the
            section of the flag in front (`--model.n_embd=...`); Python users see the plain name.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest of `names`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
