"""`generate --interactive`: one prompt a line, each continued at once."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpt_lightning.errors import UserError, with_flags
from gpt_lightning.terminal import safe_to_show

if TYPE_CHECKING:
    from gpt_lightning.generation.generator import TextGenerator

HELP = """\
Type the beginning of a text. All texts so far are the context of the next one.
An empty line continues the last text, /new forgets all texts.
Ctrl-C ends a text, Ctrl-D ends the program."""


def interact(generator: "TextGenerator", settings: dict[str, Any], flags: dict[str, str]) -> None:
    """Read prompts from standard input until its end; print each with its continuation.

    Args:
        settings: of `generator.stream`. Each text adds 1 to the seed.
        flags: for `with_flags`.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing in input(); Windows has its own
    print(HELP, file=sys.stderr)
    context, seed, newline = "", settings["seed"], ""
    with contextlib.suppress(UserError):  # a vocabulary without a line break
        generator.tokenizer.encode("\n")
        newline = "\n"
    for line in lines():
        if line == "/new":
            context = ""
            continue
        if line and context and not context.endswith("\n"):
            context += newline
        try:
            generator.tokenizer.encode(context + line)
        except UserError as error:
            print(f"error: {with_flags(str(error), flags)}", file=sys.stderr)
            continue
        text = line
        with contextlib.suppress(KeyboardInterrupt):
            pieces = generator.stream(context + line, **{**settings, "seed": seed})
            text += next(pieces)[0]  # an error must come before the prompt is printed
            print(safe_to_show(text), end="", flush=True)
            for (piece,) in pieces:
                text += piece
                print(safe_to_show(piece), end="", flush=True)
        print()
        context, seed = context + text, seed + 1


def lines() -> Iterator[str]:
    """The lines of standard input; a terminal shows where to type."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return
