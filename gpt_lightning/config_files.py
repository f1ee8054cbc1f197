"""Config files that hold only what changes: `base: FILE` names the one that they start from.

A chain of files becomes a row of `--config` flags, the oldest first, so that whoever parses them
merges them as it merges any. A file may be a stranger's: what would take more than a configuration
does is refused before it is loaded, and a checkpoint brings no code back.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHARACTERS = 1 << 20  # of a configuration
PLAIN = 10_000  # of a value without quotes, which YAML tries as a number
VALUES, DEPTH = 20_000, 32
# what a checkpoint may have the Trainer made of
CLASS = re.compile(
    r"lightning\.pytorch\.(callbacks|loggers|profilers|strategies|plugins|accelerators)\.[A-Z]\w*"
)


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
        if path.stat().st_size > 4 * CHARACTERS:
            raise TooMuch(f"more than {CHARACTERS:,} characters")
        text = path.read_text(encoding="utf-8")
        settings = load_yaml(text)
    except TooMuch as error:
        raise ValueError(f"--config={config} is no configuration: it has {error}") from error
    except (OSError, ValueError):
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


class TooMuch(ValueError):
    """A text that would take more time or memory than any configuration does."""


def load_yaml(text: str) -> Any:
    """What YAML text stands for, in plain types.

    Raises:
        ValueError: in one line, for text that is no YAML; `TooMuch` for text that is too long or
            too deep, or would be if its aliases were written out (the "billion laughs").
    """
    if len(text) > CHARACTERS:
        raise TooMuch(f"more than {CHARACTERS:,} characters")
    try:
        for depth, values in _growth(text):
            if depth > DEPTH or values > VALUES:
                raise TooMuch(f"more than {DEPTH} levels or {VALUES:,} values, aliases counted out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _growth(text: str) -> Iterator[tuple[int, int]]:
    """Depth and number of values, aliases counted as what they stand for, along a YAML text."""
    counts, sizes, anchors = [0], {}, [None]  # of each open collection; of each anchor
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            counts.append(1)
            anchors.append(anchor)
            yield len(counts), 0
            continue
        if isinstance(event, yaml.ScalarEvent):
            if event.style is None and len(event.value) > PLAIN:
                raise TooMuch(f"more than {PLAIN:,} characters in a value without quotes")
        elif isinstance(event, yaml.AliasEvent):  # of what is still open: a circle
            anchor, size = None, sizes.get(anchor, VALUES + 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = anchors.pop(), counts.pop()
        else:
            continue
        sizes[anchor] = size
        counts[-1] += size
        yield len(counts), counts[-1]


def stored_settings(text: str, own: dict[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint was written with, and may bring back.

    They are no command of the user's. So the folder for new runs is not among them, and classes
    for the Trainer have to be Lightning's own.

    Args:
        text: YAML, a mapping of sections.
        own: the Trainer's settings that the user gave, which win.

    Raises:
        ValueError: in one line, if they are no settings, or name anything else that would be run.
    """
    stored = load_yaml(text) or {}
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise ValueError("its settings are no mapping")
    for name in ("data", "model", "trainer", "checkpoint", "sample"):
        section = stored.get(name, {})
        if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
            raise ValueError(f"its settings have no mapping under {name}")
    trainer = {k: v for k, v in stored.get("trainer", {}).items() if k != "default_root_dir"}
    for key in trainer.keys() - {k for k, v in own.items() if v is not None}:
        for value in _strings(trainer[key]):
            if "." in value and not CLASS.fullmatch(value):
                raise ValueError(
                    f"its settings name {value[:60]!r} for trainer.{key}, which is not taken from "
                    f"a checkpoint: give --trainer.{key} yourself, or a --config that has it"
                )
    return {**stored, "trainer": trainer}


def _strings(value: Any) -> Iterator[str]:
    """All strings in a setting, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _strings(list(pair))
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _strings(part)
