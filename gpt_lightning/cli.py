"""The entry point of the command line: `python -m gpt_lightning COMMAND`.

The commands in `commands/` do not import Lightning; the Trainer's are in `lightning_cli`. A
`UserError` ends in one line on stderr and exit code 2. Any other exception keeps its traceback.
"""

import errno
import os
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from typing import Any, TextIO

from gpt_lightning import __version__
from gpt_lightning.errors import UserError, did_you_mean, in_users_code

COMMANDS = {
    "fit": "train a model, or resume a run (--ckpt_path=last)",
    "validate": "exact loss of a checkpoint on the held-out text",
    "test": "the same under the name loss/test",
    "predict": "cost in nats of each held-out character, to a file",
    "generate": "generate text from a checkpoint",
    "evaluate": "what a text costs a model: nats and bits per character, of each character too",
    "export": "write a model in another format: safetensors, transformers, ONNX, one HTML page",
    "import": "read a model of nanoGPT, minGPT or transformers",
    "inspect": "what a text is made of: characters, repeated passages, n-gram entropies",
    "climb": "train every rung of the lecture's ladder, several seeds each: table, picture, pages",
}

OWN_MODULE = {"evaluate", "export", "generate", "import", "inspect"}  # commands/NAME.py

GUESSES = {  # commands of other programs
    **dict.fromkeys(("train", "training", "resume"), "fit"),
    **dict.fromkeys(("finetune", "fine-tune"), "fit --init_from=best --data.corpus=NAME"),
    **dict.fromkeys(("eval", "score", "perplexity"), "evaluate"),
    "val": "validate",
    **dict.fromkeys(("sample", "infer", "inference", "write", "complete"), "generate"),
    "chat": "generate --interactive",
    **dict.fromkeys(("ladder", "sweep", "seeds"), "climb"),
    **dict.fromkeys(("stats", "statistics", "analyze"), "inspect"),
}

HELP = f"""\
usage: python -m gpt_lightning COMMAND [--flag=value ...]

A character-level GPT on PyTorch Lightning.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

examples:
  python -m gpt_lightning fit                              the embedded corpus, a minute on a CPU
  python -m gpt_lightning fit --data.corpus=my_text.txt    your own text: a file, a folder or a URL
  python -m gpt_lightning fit --ckpt_path=last             resume the newest run
  python -m gpt_lightning generate --prompt "ROMEO:" --stream

python -m gpt_lightning COMMAND --help lists the flags of a command.
"""


def main(argv: list[str] | None = None) -> None:
    """Run a command; ends the process with its exit code, 2 for a user's mistake."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, or there is no console
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # not in a notebook
            encoding = None if stream.isatty() else "utf-8"  # a terminal keeps its own
            stream.reconfigure(encoding=encoding, errors="replace", line_buffering=True)
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        sys.exit(code or 0)
    except BrokenPipeError:  # `generate | head`
        discard(sys.stdout)
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno != errno.ENOSPC or in_users_code(error):
            raise
        discard(sys.stdout)
        print(f"error: the output could not be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        line = " ".join(str(error).split())
        line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def discard(stream: TextIO) -> None:
    """Discard what is written to a stream from now on."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Unbroken:
    """A stream that may lose its reader (`fit | head`): the run goes on without it.

    Attributes:
        error: the first error, for the end of the run.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.error = self.error or error
            discard(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.error = self.error or error
            discard(self.stream)


def run(argv: list[str]) -> int | None:
    """Dispatch to the command; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    command, flags = argv[0], argv[1:]
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        guess = GUESSES.get(command.lower())
        hint = f"; did you mean {guess}?" if guess else did_you_mean(command, COMMANDS)
        raise UserError(f"unknown command {command!r}{hint} (choose from {', '.join(COMMANDS)})")
    if command in OWN_MODULE:
        if int(os.environ.get("RANK", 0)) > 0 and "TORCHELASTIC_RUN_ID" in os.environ:
            return 0  # torchrun started several processes; the first one does the work
        module = "import_model" if command == "import" else command  # a keyword of Python
        return import_module(f"gpt_lightning.commands.{module}").main(flags)
    stdout, stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            code = run_with_lightning(command, flags)
        except SystemExit as end:  # after --help
            code = end.code
        sys.stdout.flush()
    if stdout.error and not isinstance(stdout.error, BrokenPipeError):
        raise stdout.error
    return code


def run_with_lightning(command: str, flags: list[str]) -> int | None:
    """The commands that import Lightning."""
    if command == "climb":
        from gpt_lightning.ladder import climb

        return climb(flags)
    from gpt_lightning.lightning_cli import run_trainer

    return run_trainer([command, *flags], COMMANDS[command])
