"""The one exception that the command line turns into a message, and checks that raise it."""

import difflib
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable
from typing import Any

# How CUDA, ROCm, Intel's and Apple's GPUs, cuBLAS, cuDNN and the CPU say that memory is short.
OUT_OF_MEMORY = (
    r"\b(CUDA|HIP|XPU|MPS)\b.*out of memory|out_of_\w*memory|alloc_failed|can't allocate memory"
)


class UserError(ValueError):
    """A mistake of the user's, which the command line reports in one line, with exit code 2.

    Its message writes settings as `name=value`: `n_embd=130 must be a multiple of n_head=4`. The
    command line shows them as flags, `--model.n_embd=130`; see `with_flags`.
    """


def at_least(least: int, **settings: float | None) -> None:
    """Raise a UserError for a setting below `least`; None is always allowed."""
    for name, value in settings.items():
        if value is not None and not value >= least:
            raise UserError(f"{name}={value} must be at least {least}")


def one_of(choices: Iterable[str], **settings: Any) -> None:
    """Raise a UserError for a setting that is none of `choices`."""
    for name, value in settings.items():
        if value not in choices:
            hint = did_you_mean(str(value).lower(), choices)
            raise UserError(f"{name}={value} must be one of {', '.join(choices)}{hint}")


def with_flags(message: str, flags: dict[str, str]) -> str:
    """A message with the flag in place of each setting that it writes as `name=value`.

    Args:
        message: of a UserError. It may also begin with a name and a colon.
        flags: the flag of each name, such as `{"n_embd": "--model.n_embd"}`.
    """
    names = "|".join(map(re.escape, flags))
    pattern = rf"(?<![\w./'\"-])(?:{names})(?==)|^(?:{names})(?=: )"
    return re.sub(pattern, lambda found: flags[found[0]], message)


def in_users_code(error: BaseException) -> bool:
    """Whether an exception went through a function that is no part of an installed package."""
    installed = (os.path.dirname(__file__), *sysconfig.get_paths().values(), "<frozen ")
    frames = traceback.walk_tb(error.__traceback__)
    return any(not frame.f_code.co_filename.startswith(installed) for frame, _ in frames)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was short. torch has a type of its own for that on CUDA's allocator only."""
    return re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE) is not None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest of `names`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
