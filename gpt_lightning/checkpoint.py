"""Find, read and describe checkpoints, without importing Lightning.

A checkpoint is Lightning's own file, so that any Trainer resumes from it. One more entry, `KEY`,
makes it self-contained: model, tokenizer, corpus and settings as plain types.
"""

import contextlib
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
SECTIONS = ("data", "model", "sample", "checkpoint", "trainer")  # of a run's settings
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
