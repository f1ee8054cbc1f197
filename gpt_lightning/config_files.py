"""Find a config file by path or name, and merge it over the config that it is based on.

A config holds only what differs from the defaults. Its line `base: FILE` names another config to
start from: a path relative to the config's own folder, or the name of a shipped config.
"""

from pathlib import Path
from typing import Any

import yaml

from gpt_lightning.errors import UserError, did_you_mean

CONFIGS = Path(__file__).parent / "configs"  # in a wheel
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parent.parent / "configs"  # in a checkout


def find_config(name: str, base_of: Path | None = None) -> Path:
    """The file at a path, or the shipped config of that name, such as `lecture/08_residual`.

    A path in the config `base_of` is relative to that config's folder.
    """
    path = (base_of.parent if base_of else Path()) / Path(name).expanduser()
    if path.is_file():
        return path
    files = CONFIGS.rglob("*.yaml")
    shipped = {file.relative_to(CONFIGS).with_suffix("").as_posix(): file for file in files}
    if found := shipped.get(name.removesuffix(".yaml")):
        return found
    setting = f"config={base_of}: base: {name}" if base_of else f"config={name}"
    below = [one for one in sorted(shipped) if one.startswith(f"{name.rstrip('/')}/")]
    hint = f"; choose one of {', '.join(below)}" if below else did_you_mean(name, shipped)
    hint = hint or f"; the shipped ones are in {CONFIGS}"
    raise UserError(f"{setting}: no such file and no shipped config of that name{hint}")


def load_config(path: Path) -> dict[str, Any]:
    """The settings of a config file, merged over those of its base, and of the base's base."""
    settings: dict[str, Any] = {}
    current = path
    for _ in range(100):
        own = read_mapping(current)
        base = own.pop("base", None)
        settings = merge(own, settings)
        if base is None:
            return settings
        current = find_config(str(base), base_of=current)
    raise UserError(f"config={path}: base: {current} leads back to itself")


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file as a dict; an empty file gives an empty one."""
    try:
        settings = yaml.safe_load(path.read_bytes())  # UTF-8 or, with a byte-order mark, UTF-16
    except yaml.YAMLError as error:
        raise UserError(f"config={path} cannot be read: {error}") from error
    if not isinstance(settings, dict | None):
        raise UserError(f"config={path} must contain sections such as `model:`")
    return settings or {}


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; where both have a value, the one of `above`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = merge(old, value) if both else value
    return merged


def expand_configs(argv: list[str]) -> list[str]:
    """The command line with each `--config NAME` replaced by that config's settings as YAML."""
    expanded: list[str] = []
    rest = iter(argv)
    for arg in rest:
        flag, equals, name = arg.partition("=")
        if flag in ("-c", "--config"):
            settings = load_config(find_config(name if equals else next(rest, "")))
            arg = "--config=" + yaml.safe_dump(settings, allow_unicode=True)
        expanded.append(arg)
    return expanded
