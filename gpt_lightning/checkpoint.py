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
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.overrides import TorchFunctionMode

from gpt_lightning.data.tokenizers import Tokenizer, tokenizer_from_state
from gpt_lightning.errors import UserError
from gpt_lightning.model import ModelConfig, build_model, config_from_dict, config_to_dict
from gpt_lightning.safetensors_file import read_safetensors, write_safetensors

KEY = "gpt_lightning"
ONNX = ".onnx"  # a file with this suffix is for `TextGenerator.load` and `generate` only
SAFETENSORS = ".safetensors"  # a file with this suffix has a model to share; see `write_model_file`
MAX_PICKLE = 4 << 20  # bytes: vocabulary, settings and some 150 for each tensor
LOGS = "lightning_logs"
COMMAND = "python -m gpt_lightning"
# What a checkpoint's pickle may name, and the opcodes that name something. torch's own list for
# weights_only is longer, and grows.
GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
NAMING_OPCODES = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}


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
        raise UserError(f"ckpt_path={path}: no such file")
    if path.suffix == ONNX:
        raise UserError(
            f"ckpt_path={path}: only generate reads an ONNX file; give the checkpoint or the "
            "safetensors file of this model"
        )
    try:
        checkpoint = (_read_model_file if path.suffix == SAFETENSORS else read_archive)(path)
        # plain types, without attributes: an OrderedDict's could hide settings from a check
        checkpoint[KEY] = json.loads(json.dumps(checkpoint.get(KEY)))
        ours = _is_ours(checkpoint)
    except Exception as error:  # zipfile and torch raise a dozen types for damaged or hostile files
        reason = type(error).__name__
        if isinstance(error, OSError | ValueError):
            reason = str(error)[:200]
        raise DamagedCheckpoint(
            f"ckpt_path={path}: damaged, or not a checkpoint of plain tensors ({reason}); "
            "no code in it was run"
        ) from error
    if not ours and checkpoint[KEY] is None and "pytorch-lightning_version" in checkpoint:
        raise UserError(
            f"ckpt_path={path}: has no tokenizer, because it was not trained with TextDataModule; "
            "load it with GPTModule.load_from_checkpoint"
        )
    if not ours:
        raise UserError(
            f"ckpt_path={path}: not a checkpoint of this version of gpt_lightning; for those of "
            f"nanoGPT and minGPT, see {COMMAND} import --help"
        )
    return checkpoint


def _read_model_file(path: Path) -> dict[str, Any]:
    """The content of a safetensors file, as a checkpoint without state of the training."""
    weights, description = read_safetensors(path)
    return {
        "global_step": description.pop("step"),
        "history": description.pop("history", {}),
        "state_dict": {f"net.{name}": weight for name, weight in weights.items()},
        KEY: description,
    }


def write_model_file(path: str | Path, checkpoint: dict[str, Any], precision: str = "fp32") -> None:
    """Write model, tokenizer, settings and history of a checkpoint to a safetensors file to share.

    `read_checkpoint` reads it. It has no state of the training, so that no run resumes from it.

    Args:
        precision: of the weights in the file: fp32, fp16 or bf16.

    Raises:
        UserError: if a weight is too large for fp16, or the vocabulary for such a file.
    """
    entry = checkpoint[KEY]
    typed = (entry["settings"] or {}).get("data", {})  # without the user's folders
    names = {"name": "corpus", "val_name": "val_corpus"}
    corpus = entry["corpus"] | {k: typed[v] for k, v in names.items() if typed.get(v)}
    description = {
        **entry,
        "corpus": corpus,
        "step": checkpoint["global_step"],
        "history": run_history(checkpoint),
    }
    write_safetensors(path, net_weights(checkpoint), description, precision)


def run_history(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the run of a checkpoint has measured and generated so far.

    Returns:
        `val_losses`: (step, nats per character) of each validation; `samples`: (step, text);
        `floor`: nats per character that no model can beat on the validation text, or None. An
        entry can be missing.
    """
    if "history" in checkpoint:  # of a safetensors file
        return checkpoint["history"]
    states = checkpoint.get("callbacks", {})
    metrics, generated = states.get("TrainingMetrics", {}), states.get("GenerateText", {})
    return {
        "val_losses": sorted(metrics.get("val_losses", {}).items()),
        "samples": sorted(generated.get("samples", {}).items()),
        "floor": metrics.get("floor"),
    }


def net_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's weights by their names in the model."""
    return {
        name.removeprefix("net."): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith("net.")
    }


def read_archive(path: Path) -> Any:
    """What torch.save wrote to a file, on the CPU: plain types and tensors. No code in it runs.

    Raises:
        ValueError, RuntimeError, ...: if the file is damaged or has other content.
    """
    content = torch.load(_verified_copy(path), map_location="cpu", weights_only=True)
    # a tensor may have two names, as nanoGPT's embedding and head
    if sum(tensor.nbytes for tensor in _tensors_in(content)) > 2 * path.stat().st_size:
        raise ValueError("its tensors are larger than the file")
    return content


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
    """Raise if a pickle is too long, or names anything but OrderedDict and tensors."""
    if len(data) > MAX_PICKLE:
        raise ValueError(f"data.pkl has more than {MAX_PICKLE:,} bytes")
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in NAMING_OPCODES and not GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"data.pkl names {argument}")


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def _is_ours(checkpoint: dict[str, Any]) -> bool:
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
                "settings": dict() | None as settings,
            },
        }:
            sections = [(settings or {}).get(name, {}) for name in SECTIONS]
            return all(isinstance(weight, torch.Tensor) for weight in weights.values()) and all(
                isinstance(section, dict) for section in sections
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
    """Model (on the CPU, in eval mode) and tokenizer of the checkpoint read from `path`.

    Raises:
        UserError: if model, weights and tokenizer do not fit each other.
    """
    entry = checkpoint[KEY]
    try:
        tokenizer = tokenizer_from_state(entry["tokenizer"], unknown)
        model = model_with_weights(entry["model"], net_weights(checkpoint))
        if tokenizer.vocab_size != (of_model := entry["model"]["vocab_size"]):
            raise UserError(
                f"its tokenizer has {tokenizer.vocab_size} tokens, and its model {of_model}"
            )
    except UserError as error:
        raise UserError(f"ckpt_path={path}: {error}") from error
    return model, tokenizer


class _NoRandomWeights(TorchFunctionMode):
    """Skips `nn.init.normal_`, for which the meta device imports torch's compiler: 0.8 seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def model_with_weights(settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """The model, in eval mode, of settings from `config_to_dict`, with these weights.

    Its size is bounded by that of the weights, whatever the settings say.

    Raises:
        UserError: if the settings do not fit the weights.
    """
    try:
        config = config_from_dict(settings)
        counts = (getattr(config, name, 0) for name in ("n_layer", "multi_token_heads"))
        if max(counts) > len(weights):
            raise UserError("more layers than weights")
        with torch.device("meta"), _NoRandomWeights():  # takes no memory for the weights
            expected = build_model(config).state_dict()
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
            raise UserError("other names or shapes")
        model = build_model(config)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, UserError) else ""
        raise UserError(f"the model's settings do not fit its weights{reason}") from error
    return model.eval()


# --- finding --------------------------------------------------------------------------------------


def find_checkpoint(which: str | Path, root: str | Path = ".", of_folder: str = "best") -> Path:
    """The file that `ckpt_path` means.

    Args:
        which: `last` or `best` of the run below `root` that was written last, a run's folder, or a
            file. If a run has only one of the two, it is that one.
        root: the folder that holds `lightning_logs`.
        of_folder: which checkpoint a run's folder means.

    Raises:
        UserError: if there is none.
    """
    if which in ("last", "best"):
        files = list(Path(root).glob(f"{LOGS}/*/checkpoints/*.ckpt"))
        if not files:
            raise UserError(
                f"ckpt_path={which}: no run in {Path(root) / LOGS}; give ckpt_path=FILE, or "
                f"train a model with: {COMMAND} fit"
            )
        path = max(files, key=os.path.getmtime).parent
    else:
        path = Path(which).expanduser()
        if path.is_file():
            return path
        if not path.exists():
            raise UserError(f"ckpt_path={which}: no such file or folder")
    kind = which if which in ("last", "best") else of_folder
    names = ("last.ckpt", "best.ckpt") if kind == "last" else ("best.ckpt", "last.ckpt")
    for name in names:
        for file in (path / "checkpoints" / name, path / name):
            if file.is_file():
                return file
    raise UserError(
        f"ckpt_path={which}: no checkpoint in {path}; give last, best, a file or a run's folder"
    )


def read_newest_intact(
    which: str | Path, root: str | Path = ".", of_folder: str = "best"
) -> tuple[Path, dict[str, Any]]:
    """Find and read a checkpoint: the file, see `find_checkpoint`, and its content.

    `of_folder` is as there. If `last` or `best` is damaged, the newest intact checkpoint beside it
    is used and stderr says so.
    """
    path = find_checkpoint(which, root, of_folder)
    try:
        return path, read_checkpoint(path)
    except DamagedCheckpoint as damaged:
        if which not in ("last", "best"):
            raise
        for other in sorted(path.parent.glob("*.ckpt"), key=os.path.getmtime, reverse=True):
            with contextlib.suppress(UserError):
                checkpoint = read_checkpoint(other)
                step = f"step {checkpoint['global_step']:,}"
                print(f"{damaged}; using {other} ({step})", file=sys.stderr)
                return other, checkpoint
        raise


def shell_command(command: str, path: Path, *flags: str) -> str:
    """The command that uses this checkpoint, to copy into a shell."""
    return f"{COMMAND} {command} {quoted(f'--ckpt_path={path.as_posix()}', *flags)}"


def quoted(*words: str) -> str:
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)(words)


# --- describing -----------------------------------------------------------------------------------


def describe(
    config: ModelConfig,
    tokenizer_state: dict[str, Any],
    corpus: dict[str, Any],
    settings: dict[str, Any] | None,
) -> dict[str, Any]:
    """The entry under `KEY`, in plain types."""
    return {
        "format": 1,
        "model": config_to_dict(config),
        "tokenizer": tokenizer_state,
        "corpus": corpus,
        "settings": settings,
    }


# Model settings that may differ between checkpoint and run. `vocab_size` is one because the
# tokenizers are compared as a whole.
MAY_DIFFER = ("vocab_size", "dropout", "init_std", "fused")


TRAIN_ANEW = "drop the setting, or train anew without --ckpt_path"


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


# --- settings -------------------------------------------------------------------------------------

SECTIONS = ("data", "model", "sample", "checkpoint", "trainer")
CLASSES = re.compile(r"lightning\.pytorch\.(callbacks|loggers|profilers|strategies)\.[A-Z]\w*")
TEXTS = ("dirpath", "filename", "monitor", "name", "save_dir")  # arguments of theirs: always text


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
