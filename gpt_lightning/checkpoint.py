"""Find, read and describe checkpoints, without importing Lightning.

A checkpoint is Lightning's own file, so that any Trainer resumes from it. One more entry, `KEY`,
makes it self-contained: model, tokenizer, corpus and settings as plain types.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickletools
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt_lightning.data.tokenizers import Tokenizer, tokenizer_from_state
from gpt_lightning.errors import UserError
from gpt_lightning.model import ModelConfig, build_model, config_from_dict, config_to_dict

KEY = "gpt_lightning"
LOGS = "lightning_logs"
COMMAND = "python -m gpt_lightning"
MAX_PICKLE = 4 << 20  # bytes: vocabulary, settings and some 150 for each tensor
GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
OTHER_GLOBALS = {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}  # opcodes torch.save never writes


class DamagedCheckpoint(UserError):
    """A file that was cut short or changed, or that torch does not load with weights_only."""


# --- reading --------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU.

    The file may come from anyone: no code in it runs, but a hostile file can cost time and memory.

    Raises:
        DamagedCheckpoint: if the file cannot be read.
        UserError: if there is no such file, or another program or version wrote it.
    """
    path = Path(path)
    if not path.is_file():
        raise _unusable(path, "no such file")
    try:
        checkpoint = torch.load(_verified_copy(path), map_location="cpu", weights_only=True)
        _check_tensors(checkpoint, path.stat().st_size)
        if isinstance(checkpoint, dict) and KEY in checkpoint:
            # plain types, without attributes: an OrderedDict's could hide settings from a check
            checkpoint[KEY] = json.loads(json.dumps(checkpoint[KEY]))
        is_ours = _is_ours(checkpoint)
    except Exception as error:  # zipfile and torch raise a dozen types for damaged or hostile files
        reason = error if isinstance(error, OSError) else type(error).__name__
        raise DamagedCheckpoint(
            f"ckpt_path={path}: damaged, or not a checkpoint of plain tensors ({reason}); "
            "no code in it was run"
        ) from error
    if not is_ours:
        raise _unusable(path, "not a checkpoint of this version of gpt_lightning")
    return checkpoint


def _unusable(path: str | Path, problem: str) -> UserError:
    return UserError(f"ckpt_path={path}: {problem}")


def _verified_copy(path: Path) -> io.BytesIO:
    """A copy of the archive in memory, whose checksums were right.

    torch's own reader checks no checksums, and in some archives it finds other entries than
    Python's. So it reads this copy, not the file.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as verified:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        bounded = sum(entry.file_size for entry in entries) <= path.stat().st_size
        # torch finds entries without regard to case
        distinct = len({entry.filename.lower() for entry in entries}) == len(entries)
        if not (stored and bounded and distinct):
            raise zipfile.BadZipFile("its entries are not as torch.save writes them")
        for entry in entries:
            data = archive.read(entry)  # checks the checksum
            if entry.filename.endswith("/data.pkl"):
                _check_pickle(data)
            verified.writestr(entry.filename, data)
    copy.seek(0)
    return copy


def _check_pickle(data: bytes) -> None:
    """Raise if a pickle is too long, or names anything but OrderedDict and tensors.

    torch's own list for weights_only is longer, and grows.
    """
    if len(data) > MAX_PICKLE:
        raise ValueError(f"data.pkl has more than {MAX_PICKLE:,} bytes")
    for opcode, argument, _ in pickletools.genops(data):
        foreign = opcode.name == "GLOBAL" and not GLOBALS.fullmatch(str(argument))
        if foreign or opcode.name in OTHER_GLOBALS:
            raise ValueError(f"data.pkl names {argument}")


def _check_tensors(checkpoint: Any, size: int) -> None:
    """Raise unless all tensors are plain, and their elements fit into the file's size."""
    tensors = list(_tensors(checkpoint))
    for tensor in tensors:
        plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.requires_grad:
            raise ValueError("it has a tensor that is not a plain one")
    if sum(tensor.nbytes for tensor in tensors) > size:
        raise ValueError("its tensors are larger than the file")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _is_ours(checkpoint: Any) -> bool:
    """Whether all entries that we read are there and have their types."""
    match checkpoint:
        case {
            "global_step": int(),
            "state_dict": dict(weights),
            "gpt_lightning": {
                "format": 1,
                "model": dict(),
                "tokenizer": dict(),
                "corpus": {"name": str(), "sha256": str(), "split": str(), "val_fraction": float()},
                "settings": dict() | None,
            },
        }:
            return all(
                isinstance(name, str) and isinstance(weight, torch.Tensor)
                for name, weight in weights.items()
            )
    return False


def load_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a checkpoint, in eval mode: token ids (B, T) in, logits (B, T, V) out.

    Raises:
        UserError: if the checkpoint cannot be used; see `read_checkpoint`.
    """
    model, _ = model_and_tokenizer(read_checkpoint(path), path)
    return model.to(device)


def model_and_tokenizer(
    checkpoint: dict[str, Any], path: str | Path, unknown: str = "error"
) -> tuple[nn.Module, Tokenizer]:
    """Model (on the CPU, in eval mode) and tokenizer of a checkpoint.

    Args:
        checkpoint: from `read_checkpoint`.
        path: its file, for messages.
        unknown: what the tokenizer does with a character that it does not know: `error`, `drop`
            or `replace`.

    Raises:
        UserError: if model, tokenizer and weights do not fit together.
    """
    entry = checkpoint[KEY]
    tokenizer = tokenizer_from_state(entry["tokenizer"], unknown)
    weights = {
        name.removeprefix("net."): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith("net.")
    }
    try:
        model = build_model(config_from_dict(entry["model"]))
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise _unusable(path, "the model's settings do not fit its weights") from error
    if tokenizer.vocab_size != entry["model"]["vocab_size"]:
        raise _unusable(path, "the tokenizer and the model have different vocabularies")
    return model.eval(), tokenizer


# --- finding --------------------------------------------------------------------------------------


def find_checkpoint(which: str | Path, root: str | Path = ".") -> Path:
    """The file that `ckpt_path` means.

    Args:
        which: `last` or `best` of the newest run below `root`, a run's folder (its best
            checkpoint), or a file.
        root: the folder that holds `lightning_logs`.

    Raises:
        UserError: if there is none.
    """
    if which in ("last", "best"):
        run = newest_run(root)
        if run is None:
            raise _unusable(which, f"no run in {Path(root) / LOGS}; train one with: {COMMAND} fit")
        path = run / "checkpoints" / f"{which}.ckpt"
        if not path.is_file():
            raise _unusable(which, f"{run} has no {which}.ckpt yet")
        return path
    path = Path(os.path.expanduser(which))
    if path.is_file():
        return path
    if not str(which) or not path.is_dir():  # an unset shell variable makes it empty
        raise _unusable(which, "no such file; give last, best, a file or a run's folder")
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "best.ckpt", "last.ckpt"):
        if (path / name).is_file():
            return path / name
    raise _unusable(which, "this folder has no best.ckpt or last.ckpt")


def read_newest_intact(which: str | Path, root: str | Path = ".") -> tuple[Path, dict[str, Any]]:
    """Find and read a checkpoint; if `last` or `best` is damaged, the newest intact one beside it.

    Args:
        which, root: see `find_checkpoint`.

    Returns:
        the file that was read, and its content. If it is another one, stderr says so.

    Raises:
        UserError: if there is none. For a damaged file given by its path the message names the
            newest intact one.
    """
    path = find_checkpoint(which, root)
    try:
        return path, read_checkpoint(path)
    except DamagedCheckpoint as damaged:
        for other in sorted(path.parent.glob("*.ckpt"), key=os.path.getmtime, reverse=True):
            with contextlib.suppress(UserError):
                checkpoint = read_checkpoint(other)
                break
        else:
            raise
        step = f"step {checkpoint['global_step']:,}"
        if Path(os.path.expanduser(which)) == path:
            raise DamagedCheckpoint(f"{damaged}; {other} is intact ({step})") from damaged
        print(f"{damaged}; using {other} ({step})", file=sys.stderr)
        return other, checkpoint


def newest_run(root: str | Path = ".") -> Path | None:
    """The folder of the run below `root` whose checkpoint was written last, if any."""
    files = [
        (path.stat().st_mtime_ns, path)
        for folder in (f"{LOGS}/*/checkpoints", "checkpoints")
        for name in ("last.ckpt", "best.ckpt")
        for path in Path(root).glob(f"{folder}/{name}")
    ]
    return max(files)[1].parent.parent if files else None


def run_folder(path: Path) -> Path | None:
    """The run that a checkpoint belongs to, or None for a file that was copied elsewhere."""
    folder = path.parent if path.parent.name else path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def shell_command(command: str, *flags: str) -> str:
    """A command of ours to copy into the shell, quoted for it."""
    quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return f"{COMMAND} {command} {quote(flags)}"


def resume_command(path: str | Path, *flags: str) -> str:
    """The shell command that resumes from this checkpoint."""
    return shell_command("fit", f"--ckpt_path={path}", *flags)


# --- describing -----------------------------------------------------------------------------------


def describe(
    config: ModelConfig,
    tokenizer_state: dict[str, Any],
    corpus: dict[str, Any],
    settings: dict[str, Any] | None,
) -> dict[str, Any]:
    """The entry under `KEY`, in plain types.

    Args:
        config: the model's.
        tokenizer_state: from `tokenizer.state()`.
        corpus: `name`, `sha256`, `split` and `val_fraction`.
        settings: all settings of the run by section, if it was started by the command line.
    """
    return {
        "format": 1,  # as `_is_ours` expects
        "model": config_to_dict(config),
        "tokenizer": tokenizer_state,
        "corpus": corpus,
        "settings": settings,
    }


# Model settings that may differ between checkpoint and run. `vocab_size` is one because the
# tokenizers are compared as a whole.
MAY_DIFFER = ("vocab_size", "dropout", "init_std", "fused")


def check_compatible(
    entry: dict[str, Any], ours: dict[str, Any], path: str | Path, same_corpus: bool
) -> None:
    """Raise a UserError if the weights described by `entry` cannot be used for the run `ours`.

    Args:
        entry: the checkpoint's description.
        ours: the description of the model and the data at hand.
        path: the checkpoint's file, for messages.
        same_corpus: whether text and split have to be the same too: to train, not to validate.
    """
    advice = "drop the setting, or train anew without ckpt_path"
    # a checkpoint from before a field existed was trained with its default
    theirs, mine = config_to_dict(config_from_dict(entry["model"])), ours["model"]
    for name in ("name", *mine):  # another model has other settings altogether
        if name not in MAY_DIFFER and theirs.get(name) != mine[name]:
            raise UserError(
                f"{name}={mine[name]} does not fit ckpt_path={path}, whose model has "
                f"{name}={theirs.get(name)}; {advice}"
            )
    theirs, mine = entry["corpus"], ours["corpus"]
    if same_corpus and theirs["sha256"] != mine["sha256"]:
        raise UserError(
            f"corpus={mine['name']} is not the text that ckpt_path={path} was trained on "
            f"({theirs['name']}), or that text has changed; train anew without ckpt_path"
        )
    for name in ("split", "val_fraction"):
        if same_corpus and theirs[name] != mine[name]:
            raise UserError(
                f"{name}={mine[name]} would train on text that ckpt_path={path} held out with "
                f"{name}={theirs[name]}; {advice}"
            )
    if entry["tokenizer"] != ours["tokenizer"]:
        raise UserError(
            f"ckpt_path={path} has another vocabulary ({entry['tokenizer'].get('kind')}, "
            f"{entry['model'].get('vocab_size')} tokens) than this text "
            f"({ours['tokenizer']['kind']}, {ours['model']['vocab_size']} tokens)"
        )


# --- settings -------------------------------------------------------------------------------------

SECTIONS = ("data", "model", "trainer", "sample", "checkpoint")
CLASSES = re.compile(r"lightning\.pytorch\.(callbacks|loggers|profilers|strategies)\.[A-Z]\w*")


def trusted_settings(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The settings of a checkpoint that may be restored.

    They are not the user's command. So no setting for the Trainer may name code or a file, except
    classes of Lightning, and the folder for new runs is not restored.

    Args:
        settings: by section, as `describe` stores them.
        given: names of the Trainer's settings that the user gave; these are not restored.

    Raises:
        UserError: if a setting could name code, or the settings are malformed.
    """
    restored = {name: settings.get(name, {}) for name in SECTIONS}
    if not all(isinstance(section, dict) for section in restored.values()):
        raise UserError("the checkpoint's settings are malformed")
    if isinstance(settings.get("seed_everything"), int):
        restored["seed_everything"] = settings["seed_everything"]
    restored["trainer"] = {
        key: value
        for key, value in restored["trainer"].items()
        if key not in given and key != "default_root_dir"
    }
    for key, value in restored["trainer"].items():
        if not _is_plain(value):
            raise UserError(
                f"--trainer.{key}=...: the checkpoint's setting could name code, which is not "
                f"loaded from a file; give --trainer.{key} again, or a --config that has it"
            )
    return restored


def _is_plain(setting: Any) -> bool:
    """Whether no string in a setting could make the command line import code or read a file."""
    if isinstance(setting, dict):
        name = setting.get("class_path")
        if name is not None and not CLASSES.fullmatch(str(name)):
            return False
        setting = [*setting, *setting.values()]
    if isinstance(setting, list | tuple):
        return all(map(_is_plain, setting))
    if not isinstance(setting, str):
        return True
    if CLASSES.fullmatch(setting):
        return True
    # jsonargparse imports a dotted name, and reads files and quoted YAML, which could contain one
    modules = re.findall(r"(?<![\w.])([^\W\d]\w*)\.[^\W\d]", setting)
    imports = any(name in sys.modules or importlib.util.find_spec(name) for name in modules)
    return not imports and '"' not in setting and not os.path.isfile(os.path.expanduser(setting))
