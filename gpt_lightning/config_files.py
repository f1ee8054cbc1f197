"""Config files that hold only what changes: `base: FILE` names the one that they start from.

A chain of files becomes a row of `--config` flags, the oldest first, so that whoever parses them
merges them as it merges any.
"""

import os
import re
from pathlib import Path

import yaml


def expand_configs(argv: list[str]) -> list[str]:
    """Put in front of each `--config FILE` the files that it is based on, one after the other.

    Raises:
        ValueError: in one line, for a base that is not there, or that comes back to itself.
    """
    found, rest = [], iter(argv)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        if flag not in ("-c", "--config"):
            found.append(arg)
            continue
        value = value if equals else next(rest, None)
        for part in [None] if value is None else chain(value):
            found += [flag] if part is None else [flag, part]
    return found


def chain(config: str, above: tuple[Path, ...] = ()) -> list[str]:
    """The configs that `config` (a file) amounts to, the oldest first: files, or YAML as text."""
    path = Path(os.path.expanduser(config))
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return [config]  # no file, or not to be read: whoever parses it says so
    if not isinstance(settings, dict) or "base" not in settings:
        return [config]
    base = path.parent / str(settings["base"])
    if not base.is_file():
        raise ValueError(f"--config={config}: base: {base}: no such file")
    if base.resolve() in above:
        raise ValueError(f"--config={config}: base: {base} is based on this file itself")
    # cut out as text: what is left is parsed just as the whole file would be
    rest = re.sub(r"(?m)^base:.*\n?", "", text)
    return [*chain(str(base), (*above, path.resolve())), rest or "{}"]
