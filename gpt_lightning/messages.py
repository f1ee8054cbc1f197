"""What the messages of all rooms share."""

import argparse
import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the name nearest to a mistyped one, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage, and names the nearest flag."""

    def error(self, message: str) -> None:
        flag = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        raise ValueError(message + nearest(flag, self._option_string_actions))
