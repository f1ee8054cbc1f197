"""Whether a run can use a checkpoint: its text, its model, and its settings."""

import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from gpt_lightning.checkpoint import SECTIONS, quoted
from gpt_lightning.errors import UserError
from gpt_lightning.model import config_from_dict, config_to_dict

# Model settings that may differ between checkpoint and run. `vocab_size` is one because the
# tokenizers are compared as a whole.
MAY_DIFFER = ("vocab_size", "dropout", "init_std", "fused")
TRAIN_ANEW = "drop the setting, or train anew without --ckpt_path"
CLASSES = re.compile(r"lightning\.pytorch\.(callbacks|loggers|profilers|strategies)\.[A-Z]\w*")
TEXTS = ("dirpath", "filename", "monitor", "name", "save_dir")  # arguments of theirs: always text


def check_corpus(
    theirs: dict[str, Any],
    mine: dict[str, Any],
    path: str | Path,
    fitting: bool,
    named: Collection[str] = ("corpus", "val_corpus"),
) -> None:
    """Raise a UserError if the texts of a run do not fit the checkpoint.

    To train, texts and split have to be the same. To validate, another text may be given, but no
    text that the model may have been trained on: neither a later version of the checkpoint's nor
    another part of it.

    Args:
        theirs, mine: of checkpoint and run, from `TextDataModule.describe`.
        named: settings that the user has given; the others are the checkpoint's.
    """
    new_run = quoted(f"--init_from={path}", f"--data.corpus={mine['name']}")
    new_run = f"start a new run from its weights with {new_run} in place of --ckpt_path"
    keys = {"corpus": ("name", "sha256"), "val_corpus": ("val_name", "val_sha256")}
    scored = "corpus" if mine.get("val_name") is None else "val_corpus"
    for setting in keys if fitting else [scored]:
        name, sha256 = keys[setting]
        then, now = theirs.get(name), mine.get(name)
        changed = then == now or setting not in named
        if theirs.get(sha256) == mine.get(sha256) or not (changed or fitting):
            continue
        fault = f"is not its {setting}, {then}"
        if changed:
            fault = "has changed since its training, or is read in another way"
        advice = new_run if setting == "corpus" else TRAIN_ANEW
        if not fitting:
            advice = f"score it as another text with evaluate {quoted(f'--text={now}')}"
        raise UserError(f"ckpt_path={path}: {setting}={now} {fault}; {advice}")
    if theirs["sha256"] != mine["sha256"] or (scored == "val_corpus" and not fitting):
        return
    if scored == "corpus" and theirs.get("val_name") is not None:
        raise UserError(f"ckpt_path={path} was trained on all of corpus={mine['name']}")
    for name in ("split", "val_fraction"):
        if theirs[name] != mine[name]:
            raise UserError(
                f"{name}={mine[name]}: ckpt_path={path} held out another part of this text, with "
                f"{name}={theirs[name]}; {TRAIN_ANEW if fitting else 'drop the setting'}"
            )


def check_compatible(entry: dict[str, Any], ours: dict[str, Any], path: str | Path) -> None:
    """Raise a UserError if model or tokenizer of a run do not fit the checkpoint.

    Args:
        entry, ours: of checkpoint and run, from `describe`.
    """
    # a checkpoint from before a field existed was trained with its default
    theirs, mine = config_to_dict(config_from_dict(entry["model"])), ours["model"]
    for name in ("name", *mine):  # another model has other settings altogether
        if name not in MAY_DIFFER and theirs.get(name) != mine[name]:
            raise UserError(
                f"{name}={mine[name]} does not fit ckpt_path={path}, whose model has "
                f"{name}={theirs.get(name)}; {TRAIN_ANEW}"
            )
    if entry["tokenizer"] != ours["tokenizer"]:
        raise UserError(
            f"ckpt_path={path} has another vocabulary than this text; {TRAIN_ANEW}, or start from "
            f"its weights with init_from={path}"
        )


def trusted_settings(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The settings of a checkpoint, without those in `given`, names of the Trainer's settings.

    They are not the user's command. So no setting for the Trainer may name code or a file, except
    classes of Lightning, and the folder for new runs is not restored.

    Raises:
        UserError: if a setting could name code.
    """
    restored = {section: dict(settings.get(section, {})) for section in SECTIONS}
    if "seed_everything" in settings:
        restored["seed_everything"] = settings["seed_everything"]
    for key in {*given, "default_root_dir"}:
        restored["trainer"].pop(key, None)
    if flags := flags_to_repeat(restored):
        raise UserError(
            "the checkpoint's settings name code, which is not loaded from a file; if you trust "
            f"them, give them again: {quoted(*flags)}"
        )
    return restored


def flags_to_repeat(settings: dict[str, Any]) -> list[str]:
    """The flags that a resume must give again, because `trusted_settings` does not take them."""
    flags = []
    for key, value in settings.get("trainer", {}).items():
        items, sign = (value, "+=") if isinstance(value, list) else ([value], "=")
        for item in items:
            if not is_plain(item):
                bare = isinstance(item, dict) and item.keys() == {"class_path"}
                text = item["class_path"] if bare else json.dumps(item)
                flags.append(f"--trainer.{key}{sign}{text}")
    return flags


def is_plain(setting: Any) -> bool:
    """Whether no string in a setting could make the command line import code or read a file."""
    if isinstance(setting, dict):
        name = setting.get("class_path")
        if name is not None and not CLASSES.fullmatch(str(name)):
            return False
        texts = {key for key in TEXTS if isinstance(setting.get(key), str)}
        setting = [*setting, *(setting[key] for key in setting.keys() - texts)]
    if isinstance(setting, list | tuple):
        return all(map(is_plain, setting))
    if not isinstance(setting, str) or CLASSES.fullmatch(setting):
        return True
    # jsonargparse imports a dotted name, and reads YAML and files, which could contain one
    with contextlib.suppress(yaml.YAMLError, ValueError):
        if (parsed := yaml.safe_load(setting)) != setting:
            return is_plain(parsed)
    module, dot, _ = setting.partition(".")
    imports = dot and module.isidentifier() and re.fullmatch(r"[\w.]+", setting)
    if imports and (module in sys.modules or importlib.util.find_spec(module)):
        return False
    return not os.path.isfile(os.path.expanduser(setting))
