"""Find, read and describe checkpoints, without importing Lightning.

A checkpoint is Lightning's own file, so that any Trainer resumes from it. One more entry, `KEY`,
makes it self-contained: model, tokenizer, corpus and settings as plain types.
"""

import contextlib
import importlib.util
import inspect
import io
import os
import pickletools
import re
import shlex
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from gpt_lightning.data.tokenizers import Tokenizer, tokenizer_from_state
from gpt_lightning.errors import UserError
from gpt_lightning.model import ModelConfig, build_model, config_from_dict, config_to_dict

KEY = "gpt_lightning"
FORMAT = 1  # of the entry under KEY
LOGS = "lightning_logs"
COMMAND = "python -m gpt_lightning"

MAX_PICKLE = 4 << 20  # bytes: vocabulary, settings and some 150 for each tensor
GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
OTHER_GLOBALS = {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}  # opcodes torch.save never writes
TYPES: dict[tuple[str, ...], type | tuple[type, ...]] = {
    ("state_dict",): dict,
    ("global_step",): int,
    (KEY, "model"): dict,
    (KEY, "tokenizer"): dict,
    (KEY, "corpus", "name"): str,
    (KEY, "corpus", "sha256"): str,
    (KEY, "corpus", "split"): str,
    (KEY, "corpus", "val_fraction"): float,
    (KEY, "settings"): (dict, type(None)),
}
TRAINER_TYPES = {  # what a Trainer adds; generation needs none of it
    "epoch": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


class DamagedCheckpoint(UserError):
    """A file that was cut short or changed, or that holds more than plain values and tensors."""


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
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            pickled, archive = _verify_archive(file, size)
        _check_pickle(pickled)
        checkpoint = torch.load(archive, map_location="cpu", weights_only=True)
        _check_plain(checkpoint, size)
    except Exception as error:  # zipfile and torch raise a dozen types for damaged or hostile files
        stated = isinstance(error, _NotPlain | zipfile.BadZipFile | OSError)
        reason = error if stated else type(error).__name__
        raise DamagedCheckpoint(
            f"ckpt_path={path}: damaged, or not a checkpoint of plain tensors ({reason}); "
            "no code in it was run",
        ) from error
    if wrong := _wrong_entry(checkpoint):
        raise _unusable(path, f"not a checkpoint of this version of gpt_lightning ({wrong})")
    return checkpoint


def _unusable(path: str | Path, problem: str) -> UserError:
    return UserError(f"ckpt_path={path}: {problem}")


class _NotPlain(Exception):
    """A pickle has more in it than plain values and tensors."""


def _verify_archive(file: BinaryIO, size: int) -> tuple[bytes, io.BytesIO]:
    """data.pkl, and a copy of the archive in memory, which torch reads in place of the file.

    torch's own reader checks no checksums, and it may see other entries than Python's.
    """
    copy, pickled = io.BytesIO(), None
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as verified:
        entries = archive.infolist()
        folder = entries[0].filename.partition("/")[0] if entries else ""
        stored = all(
            entry.compress_type == zipfile.ZIP_STORED
            and entry.compress_size == entry.file_size
            and not entry.flag_bits & 1  # encrypted
            and not entry.filename.endswith("/")
            and entry.filename.startswith(f"{folder}/")
            for entry in entries
        )
        # torch finds entries without regard to case
        distinct = len({entry.filename.lower() for entry in entries}) == len(entries)
        if not stored or not distinct or sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("its entries are not as torch.save writes them")
        for entry in entries:
            data = archive.read(entry)  # raises BadZipFile for a wrong checksum
            verified.writestr(entry.filename, data)
            if entry.filename == f"{folder}/data.pkl":
                pickled = data
    if pickled is None:
        raise zipfile.BadZipFile("it has no data.pkl")
    copy.seek(0)
    return pickled, copy


def _check_pickle(data: bytes) -> None:
    """Raise if a pickle is too long, or names anything but OrderedDict and tensors."""
    if len(data) > MAX_PICKLE:
        raise _NotPlain(f"data.pkl has more than {MAX_PICKLE:,} bytes")
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and not GLOBALS.fullmatch(str(argument)):
            raise _NotPlain(f"it names {str(argument)[:60]!r}")
        if opcode.name in OTHER_GLOBALS:
            raise _NotPlain(f"it has the opcode {opcode.name}")


def _check_plain(checkpoint: Any, size: int) -> None:
    """Raise unless all values are plain, and the tensors' bytes no more than the file's size."""
    seen, todo = set(), [checkpoint]
    while todo:
        value = todo.pop()
        if type(value) is torch.Tensor:
            if value.device.type != "cpu" or value.layout != torch.strided or value.requires_grad:
                raise _NotPlain("it has a tensor that is not a plain one")
            if id(value) not in seen:
                size -= value.nbytes  # of an expanded tensor all elements
                seen.add(id(value))
            if size < 0:
                raise _NotPlain("its tensors are larger than the file")
        elif type(value) in (dict, OrderedDict, list, tuple):
            if id(value) not in seen:
                seen.add(id(value))
                todo += [*value, *value.values()] if isinstance(value, dict) else value
                if type(value) is OrderedDict:
                    vars(value).clear()  # attributes: a state_dict's _metadata, or anything else
        elif type(value) not in (int, float, str, bool, type(None)):
            raise _NotPlain(f"it has a value of type {type(value).__name__}")


def _wrong_entry(checkpoint: Any) -> str | None:
    """The first entry that is missing or of a wrong type, if any."""
    entry = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(entry, dict):
        return f"no entry {KEY}"
    if entry.get("format") != FORMAT:
        return f"format {str(entry.get('format'))[:20]!r} in place of {FORMAT}"
    for keys, kind in TYPES.items():
        value: Any = checkpoint
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            return f"wrong entry {'.'.join(keys)}"
    for key, kind in TRAINER_TYPES.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            return f"wrong entry {key}"
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            return "wrong entry state_dict"
    return None


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
    weights = {
        name.removeprefix("net."): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith("net.")
    }
    try:
        vocab_size = tokenizer_from_state(entry["tokenizer"]).vocab_size
        model = build_model(config_from_dict(entry["model"]))
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise _unusable(path, "the model's settings do not fit its weights") from error
    if vocab_size != entry["model"]["vocab_size"]:
        raise _unusable(path, "the tokenizer and the model have different vocabularies")
    return model.eval(), tokenizer_from_state(entry["tokenizer"], unknown)


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
            folder = Path(root) / LOGS
            raise _unusable(
                which, f"no run with a checkpoint in {folder}; train one with: {COMMAND} fit"
            )
        path = run / "checkpoints" / f"{which}.ckpt"
        if not path.is_file():
            other = "last" if which == "best" else "best"
            raise _unusable(which, f"{run} has only {other}.ckpt so far")
        return path
    path = Path(os.path.expanduser(which))
    if path.is_file():
        return path
    if not str(which) or not path.is_dir():  # an unset shell variable makes it empty
        raise _unusable(which, "no such file; give last, best, a file or a run's folder")
    for folder in (path / "checkpoints", path):
        for name in ("best.ckpt", "last.ckpt"):
            if (folder / name).is_file():
                return folder / name
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
        intact = []
        for other in path.parent.glob("*.ckpt"):
            with contextlib.suppress(UserError):
                intact.append((read_checkpoint(other)["global_step"], other))
        if not intact:
            raise
        step, other = max(intact)
        if Path(os.path.expanduser(which)) == path:
            raise DamagedCheckpoint(f"{damaged}; {other} is intact (step {step:,})") from damaged
        print(f"{damaged}; using {other} (step {step:,})", file=sys.stderr)
        return other, read_checkpoint(other)


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
    if os.name == "nt":
        quoted = [f'"{flag}"' if re.search(r"[^\w.,:=/\\-]", flag) else flag for flag in flags]
    else:
        quoted = [shlex.quote(flag) for flag in flags]
    return " ".join([COMMAND, command, *quoted])


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
        "format": FORMAT,
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
    # a checkpoint from before a field existed was trained with its default
    theirs, mine = config_to_dict(config_from_dict(entry["model"])), ours["model"]
    # another model has other settings altogether, so its name comes first
    for name in sorted(theirs.keys() | mine.keys(), key=lambda name: (name != "name", name)):
        if name not in MAY_DIFFER and theirs.get(name) != mine.get(name):
            raise UserError(
                f"{name}={mine.get(name)} does not fit ckpt_path={path}, whose model has "
                f"{name}={theirs.get(name)}; drop the setting, or train anew without ckpt_path",
            )
    theirs, mine = entry["corpus"], ours["corpus"]
    if same_corpus and theirs["sha256"] != mine["sha256"]:
        raise UserError(
            f"corpus={mine['name']} is not the text that ckpt_path={path} was trained on "
            f"({theirs['name']}), or that text has changed; train anew without ckpt_path",
        )
    for name in ("split", "val_fraction"):
        if same_corpus and theirs[name] != mine[name]:
            raise UserError(
                f"{name}={mine[name]} would train on text that ckpt_path={path} held out with "
                f"{name}={theirs[name]}; drop the setting, or train anew without ckpt_path",
            )
    if entry["tokenizer"] != ours["tokenizer"]:
        raise UserError(
            f"ckpt_path={path} has another vocabulary ({entry['tokenizer'].get('kind')}, "
            f"{entry['model'].get('vocab_size')} tokens) than this text "
            f"({ours['tokenizer']['kind']}, {ours['model']['vocab_size']} tokens)",
        )


# --- settings -------------------------------------------------------------------------------------

SECTIONS = ("data", "model", "trainer", "sample", "checkpoint")


def trusted_settings(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The settings of a checkpoint that may be restored.

    They are not the user's command. So classes for the Trainer must be Lightning's own, no setting
    may name other code, and the folder for new runs is not restored.

    Args:
        settings: by section, as `describe` stores them.
        given: names of the Trainer's settings that the user gave; these are not restored.

    Raises:
        UserError: if a setting names code, or the settings are malformed.
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
        if code := _named_code(value):
            raise UserError(
                f"--trainer.{key}=...: the checkpoint's setting names {code[:60]!r}, which is not "
                f"loaded from a file; give --trainer.{key} again, or a --config that has it"
            )
    return restored


def _named_code(setting: Any) -> str | None:
    """The first string in a setting that could make the command line import or read a file."""
    if isinstance(setting, dict):
        setting = dict(setting)
        name = setting.pop("class_path", None)
        if name is not None and not _is_lightning_class(name):
            return str(name)
        setting = [*setting, *setting.values()]
    if isinstance(setting, list | tuple):
        return next((code for part in setting if (code := _named_code(part))), None)
    if not isinstance(setting, str):
        return None
    # the command line takes a string for the path of a class, for YAML or for a file with YAML;
    # within quotes YAML's escapes could hide a name from this search
    modules = re.findall(r"(?<![\w.])([^\W\d]\w*)\.[^\W\d]", setting)
    imports = any(name in sys.modules or importlib.util.find_spec(name) for name in modules)
    reads = '"' in setting or os.path.isfile(os.path.expanduser(setting))
    return setting if imports or reads else None


def _is_lightning_class(name: Any) -> bool:
    """Whether this is the path of a class in Lightning."""
    module, _, name = str(name).rpartition(".")
    if not module.startswith("lightning.pytorch."):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
        return inspect.isclass(found) and found.__module__.startswith("lightning.pytorch.")
    except ImportError:
        return False
