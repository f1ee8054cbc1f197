"""The file between training and generation: what it holds, how to find and to read it.

A checkpoint is Lightning's own, so that any Trainer resumes from it, with one more entry, `KEY`,
that makes it self-contained: architecture, tokenizer and corpus as plain types. Nothing here
imports Lightning: `generate` must start fast, and run where only torch is.
"""

import contextlib
import os
import pickle
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gpt_lightning.model import build_config
from gpt_lightning.untrusted import (
    PICKLE,
    Foreign,
    Tensor,
    Torn,
    misfit,
    read_archive,
    read_pickle,
)

KEY = "gpt_lightning"
FORMAT = 1  # of the entry under KEY
SCALAR = (int, float, str, bool, type(None))
HOLDS = {  # see `misfit`; without a Trainer's part a checkpoint still writes text
    "state_dict": {str: Tensor},
    KEY: {
        "model": {str: SCALAR},
        "tokenizer": {"kind": str, "vocabulary?": str},
        "corpus": {"name": str, "sha256": str, "split": str, "val_fraction": float},
        "config?": (str, type(None)),
    },
    "global_step?": int,
    "epoch?": int,
    "pytorch-lightning_version?": str,
    "loops?": {"fit_loop": {"epoch_progress": {"current": {"processed": int}}}},
    "callbacks?": {"BestAndLast?": {"best_val_loss": float, "best_step": int}},
    "optimizer_states?": [
        {"state": {int: {str: (*SCALAR, Tensor)}}, "param_groups": [{"params": [int]}]}
    ],
    "lr_schedulers?": [dict],
}
LOGS = "lightning_logs"
HOW = "python -m gpt_lightning"


def go_on_with(path: Path) -> str:
    """The command, to be typed, that goes on from this checkpoint."""
    return f"{HOW} fit --ckpt_path={shlex.quote(str(path))}"


class Damaged(ValueError):
    """A checkpoint that is torn, cut short or changed, and so not as it was written."""


def describe(
    model: dict[str, Any], tokenizer: dict[str, Any], corpus: dict[str, Any]
) -> dict[str, Any]:
    """The entry under KEY, plain types only.

    Args:
        model: settings that `build_model` takes.
        tokenizer: its state.
        corpus: name, sha256, and how it was split: split, val_fraction.
    """
    return {"format": FORMAT, "model": model, "tokenizer": tokenizer, "corpus": corpus}


def model_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint's model, from its entry under KEY; once n-grams were pairs."""
    model = entry["model"]
    return {"n_gram": 2, **model} if model.get("name") == "gpt" else model


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, without running any code that it may hold.

    The file may be a stranger's: it is looked through first (`untrusted`), and what it says of
    itself has the types that it should have.

    Raises:
        Damaged: in one line, if it is torn, or no archive of torch's at all.
        ValueError: in one line, if there is no file, or it is foreign, or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--ckpt_path={path}: no such file")
    try:
        with path.open("rb") as file:
            entries = read_archive(file)
            offset, size = entries.get("data.pkl", (0, PICKLE + 1))
            if size > PICKLE:
                raise Foreign("it has no pickle, or a larger one than ours ever have")
            file.seek(offset)
            found = read_pickle(file.read(size), {name: n for name, (_, n) in entries.items()})
            _refuse_malformed(found, path)
            file.seek(0)
            return _load(file)
    except (Torn, OSError) as error:
        raise Damaged(
            f"--ckpt_path={path} cannot be read: torn, or no checkpoint at all ({error})"
        ) from error
    except (Foreign, MemoryError) as error:
        raise ValueError(
            f"--ckpt_path={path} is no checkpoint of plain tensors (nothing in it was run; "
            f"{error or 'out of memory'})"
        ) from error


def _load(file: BinaryIO) -> dict[str, Any]:
    """torch's reading of a file in which we found nothing wrong; it may still find something."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise Foreign("torch refuses it") from error
    except Exception as error:  # half a dozen kinds, for an archive
        raise Torn(f"torch says {type(error).__name__}") from error


def _refuse_malformed(checkpoint: Any, path: Path) -> None:
    """Raise a ValueError if what a checkpoint holds is not what we write."""
    entry = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(entry, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"--ckpt_path={path} was not written by gpt_lightning")
    if entry.get("format") != FORMAT:
        raise ValueError(
            f"--ckpt_path={path} has format {str(entry.get('format'))[:20]}, this version reads "
            f"{FORMAT}: use the gpt_lightning that wrote it"
        )
    if found := misfit(checkpoint, HOLDS):
        raise ValueError(
            f"--ckpt_path={path} was not written by gpt_lightning: {found[1:][:60]!r} is not what "
            "it should be"
        )


def find_checkpoint(which: str | Path, root: str | Path = ".") -> Path:
    """The file meant by `--ckpt_path`.

    Args:
        which: `last` or `best` of the newest run below `root`, a run's folder (its best), or a
            file.
        root: the folder that holds `lightning_logs` (--trainer.default_root_dir).

    Raises:
        ValueError: in one line, if there is none.
    """
    if not str(which):  # an unset variable of a shell script
        raise ValueError("--ckpt_path is empty; give last, best or a file")
    if which not in ("last", "best"):
        path = Path(os.path.expanduser(which))  # leaves ~ of an unknown user as it is
        if path.is_dir():
            folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            for name in ("best", "last"):
                if (folder / f"{name}.ckpt").is_file():
                    return folder / f"{name}.ckpt"
            raise ValueError(f"--ckpt_path={which}: this folder holds no best.ckpt or last.ckpt")
        if not path.is_file():
            raise ValueError(f"--ckpt_path={which}: no such file; give last, best or a file")
        return path
    folder = newest_run(root)
    if folder is None:
        raise ValueError(
            f"--ckpt_path={which}: no run with a checkpoint in {Path(root) / LOGS}; "
            f"train one with: {HOW} fit"
        )
    path = folder / "checkpoints" / f"{which}.ckpt"
    if not path.is_file():
        other = "last" if which == "best" else "best"
        raise ValueError(f"--ckpt_path={which}: {folder} has only {other}.ckpt so far")
    return path


def read_whole(which: str | Path, root: str | Path = ".") -> tuple[Path, dict[str, Any]]:
    """Find and read a checkpoint; for a damaged `last` or `best` the newest whole one beside it.

    Args:
        which, root: as `find_checkpoint` takes them.

    Returns:
        the file that was read, and what is in it. That it is another one is told on stderr.

    Raises:
        ValueError: in one line, if there is none, or it cannot be used. A damaged file that was
            asked for by its path is not replaced, only the other one named.
    """
    path = find_checkpoint(which, root)
    try:
        return path, read_checkpoint(path)
    except Damaged as damaged:
        whole = []
        for other in path.parent.glob("*.ckpt"):
            with contextlib.suppress(ValueError):
                checkpoint = read_checkpoint(other)
                whole.append((checkpoint.get("global_step", 0), other, checkpoint))
        if not whole:
            raise
        step, other, checkpoint = max(whole, key=lambda found: found[0])
        if Path(os.path.expanduser(which)) == path:
            raise Damaged(f"{damaged}; {other} is whole (step {step:,})") from damaged
        print(f"{damaged}; taking {other} (step {step:,})", file=sys.stderr)
        return other, checkpoint


def newest_run(root: str | Path = ".") -> Path | None:
    """The folder of the run below `root` whose checkpoint was written last, if any."""
    files = [
        (path.stat().st_mtime_ns, path)
        for pattern in (f"{LOGS}/*/checkpoints/*.ckpt", "checkpoints/*.ckpt")
        for path in Path(root).glob(pattern)
        if path.name in ("last.ckpt", "best.ckpt")
    ]
    return max(files)[1].parent.parent if files else None


def run_folder(path: Path) -> Path | None:
    """The run that a checkpoint lies in, or None for a file that was copied elsewhere."""
    folder = path.parent if path.parent.name else path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def refuse_mismatch(
    entry: dict[str, Any], ours: dict[str, Any], path: str | Path, corpus: bool = True
) -> None:
    """Raise a ValueError if weights described by `entry` cannot go on as the run `ours`.

    Args:
        entry: the checkpoint's description.
        ours: the same, of the model and data at hand.
        path: the checkpoint's, for the message.
        corpus: whether the text has to be the same too (to train on, not to validate).
    """
    model = model_of(entry)
    # a checkpoint from before a setting existed was trained with its default
    try:
        stored = asdict(build_config(**model)) | {"name": model["name"]}
    except TypeError as error:
        raise ValueError(
            f"--ckpt_path={path} has settings of the model that this version does not know: use "
            "the gpt_lightning that wrote it"
        ) from error
    # another model has other settings altogether, so its name comes first
    for name in sorted(stored.keys() | ours["model"].keys(), key=lambda n: (n != "name", n)):
        theirs, mine = stored.get(name), ours["model"].get(name)
        # what does not change the weights' shapes or meaning may differ
        if theirs != mine and name not in ("vocab_size", "dropout", "init_std", "fused"):
            flag = "--data.block_size" if name == "block_size" else f"--model.{name}"
            raise ValueError(
                f"{flag}={mine} does not fit --ckpt_path={path}, whose model has {name}={theirs}; "
                "leave the flag away, or train anew without --ckpt_path"
            )
    if corpus and entry["corpus"]["sha256"] != ours["corpus"]["sha256"]:
        raise ValueError(
            f"--data.corpus={ours['corpus']['name']} is not the text that --ckpt_path={path} was "
            f"trained on ({entry['corpus']['name']}), or that text has changed since; "
            "train anew without --ckpt_path"
        )
    for name in ("split", "val_fraction"):
        theirs, mine = entry["corpus"][name], ours["corpus"][name]
        if corpus and theirs != mine:
            raise ValueError(
                f"--data.{name}={mine} would train on text that --ckpt_path={path} held out with "
                f"{name}={theirs}; leave the flag away, or train anew without --ckpt_path"
            )
    if entry["tokenizer"] != ours["tokenizer"]:
        raise ValueError(
            f"the vocabulary of this text ({ours['tokenizer']['kind']}, "
            f"{ours['model']['vocab_size']} tokens) is not that of --ckpt_path={path} "
            f"({entry['tokenizer']['kind']}, {entry['model']['vocab_size']} tokens)"
        )
