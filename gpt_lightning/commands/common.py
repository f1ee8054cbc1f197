"""What the commands share: flags and their errors, reading text files, choosing a device."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_lightning.data.corpus import Corpus, find_corpus
from gpt_lightning.errors import UserError, did_you_mean, is_out_of_memory, with_flags

HOW = ("field", "encoding", "separator")  # settings that say how a corpus is read


class Parser(argparse.ArgumentParser):
    """Raises a UserError, with the nearest flag, in place of printing its usage."""

    def error(self, message: str) -> None:
        flag = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        flags = re.findall(r"--\w+", self.format_usage())
        hint = did_you_mean(flag, flags)
        if message.startswith("unrecognized") and not flag.startswith("-"):
            hint = "; every value needs a flag"
            if main := [name for name in ("--prompt", "--text") if name in flags]:
                hint += f", such as {main[0]}=..."
        raise UserError(message + hint)


@contextmanager
def errors_name_flags(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Write settings as flags in the message of a UserError; yields the flag of each setting.

    A lack of memory becomes a UserError.
    """
    flags = {name: f"--{name}" for name in vars(args)}
    try:
        yield flags
    except UserError as error:
        raise UserError(with_flags(str(error), flags)) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sizes = {name: getattr(args, name, None) for name in ("num_samples", "batch_size")}
        given = " ".join(f"--{name}={size}" for name, size in sizes.items() if size and size > 1)
        advice = f"; choose a smaller value than {given}" if given else ""
        raise UserError("out of memory" + advice) from error


def add_corpus_flags(parser: Parser) -> None:
    """Add the flags that say how a corpus is read."""
    add = parser.add_argument
    add("--field", metavar="NAME", help="the field of .jsonl, .csv and .tsv rows that is the text")
    add("--encoding", default="utf-8", metavar="NAME", help="of the files; auto detects it")
    add("--separator", default="", metavar="TEXT", help="stands between two documents")


def corpus_of(name: str, how: dict[str, Any]) -> Corpus:
    """The corpus of this name, read as the settings or flags in `how` say, among others."""
    return find_corpus(name, **{setting: how[setting] for setting in HOW if setting in how})


def read_file(path: str, flag: str) -> str:
    """The text of the file that a flag gives (- is standard input), read as a corpus is.

    That is UTF-8, without a byte-order mark and with `\\n` line ends.
    """
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text ({error.reason}); convert it to UTF-8"
        raise UserError(f"{flag}={path} {message}") from None
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be read: {error}") from None


def check_new(name: str, path: Path, suffix: str) -> None:
    """Raise a UserError unless the setting `name` is a path for a new file or folder.

    Args:
        suffix: that it must have; an empty one allows any.
    """
    if suffix and path.suffix != suffix:
        raise UserError(f"{name}={path} must end with {suffix}")
    if path.exists():
        raise UserError(f"{name}={path} exists; delete it or give another name with --{name}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{name}={path}: there is no such folder")


def pick_device(name: str) -> str:
    """The device of `--device`: for `auto` NVIDIA's or Apple's GPU if there is one."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name} is not available here; try --device=cpu") from error
    return name
