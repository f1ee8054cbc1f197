"""What the commands share: a parser, reading text files, choosing a device."""

import argparse

from gpt_lightning.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Raises a UserError, with the nearest flag, in place of printing its usage."""

    def error(self, message: str) -> None:
        flag = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        flags = [f"--{name}" for name in vars(self.parse_args([]))]
        raise UserError(message + did_you_mean(flag, flags))


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
