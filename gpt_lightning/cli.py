"""The entry point of the command line: `python -m gpt_lightning COMMAND`.

`generate` runs here, without importing Lightning; the Trainer's commands are in `lightning_cli`. A
`UserError` ends in one line on stderr and exit code 2. Any other exception keeps its traceback.
"""

import argparse
import errno
import os
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from gpt_lightning import __version__
from gpt_lightning.errors import UserError, did_you_mean, with_flags

COMMANDS = {
    "fit": "train a model, or resume a run (--ckpt_path=last)",
    "validate": "exact loss of a checkpoint on the held-out text",
    "test": "the same under the name loss/test",
    "predict": "cost in nats of each held-out character, to a file",
    "generate": "generate text from a checkpoint",
    "climb": "train every rung of the lecture's ladder, several seeds each: a table and a picture",
}

GUESSES = {  # commands of other programs
    **dict.fromkeys(("train", "training", "finetune", "resume"), "fit"),
    **dict.fromkeys(("eval", "evaluate", "val", "score"), "validate"),
    **dict.fromkeys(("sample", "infer", "inference", "write", "chat", "complete"), "generate"),
    **dict.fromkeys(("ladder", "sweep", "seeds"), "climb"),
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
        if error.errno != errno.ENOSPC:
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
    """A stream that may lose its reader (`fit | head`): the run goes on without it."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            discard(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
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
    if command == "generate":
        return generate(flags)
    with redirect_stdout(Unbroken(sys.stdout)), redirect_stderr(Unbroken(sys.stderr)):
        code = run_with_lightning(command, flags)
        sys.stdout.flush()
    return code


def run_with_lightning(command: str, flags: list[str]) -> int | None:
    """The commands that import Lightning."""
    if command == "climb":
        from gpt_lightning.ladder import climb

        return climb(flags)
    from gpt_lightning.lightning_cli import run_trainer

    return run_trainer([command, *flags], COMMANDS[command])


class Parser(argparse.ArgumentParser):
    """Raises a UserError, with the nearest flag, in place of printing its usage."""

    def error(self, message: str) -> None:
        flag = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        flags = [f"--{name}" for name in vars(self.parse_args([]))]
        raise UserError(message + did_you_mean(flag, flags))


def generate_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning generate",
        description="Generate text from a checkpoint. Needs neither the corpus nor Lightning.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, prompt = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--ckpt_path", default="best", metavar="PATH", help="last, best, a file or a run's folder")
    prompt("--prompt", default="", metavar="TEXT", help="the text to continue")
    prompt("--prompt_file", metavar="FILE", help="the same from a file; - reads standard input")
    add("--max_new_tokens", type=int, default=500, metavar="N", help="largest number of tokens")
    add("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token")
    add("--top_k", type=int, metavar="K", help="sample from the K likeliest tokens only")
    add("--top_p", type=float, metavar="P", help="sample from the likeliest that make up P")
    add("--min_p", type=float, metavar="P", help="drop tokens below P times the likeliest")
    add("--seed", type=int, default=1337, metavar="N", help="same seed, same text")
    add("--num_samples", type=int, default=1, metavar="N", help="number of texts")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text at TEXT (repeat)")
    stream_help = "print a single text token by token; without the flag on a terminal only"
    add("--stream", action=argparse.BooleanOptionalAction, help=stream_help)
    unknown_help = "what to do with prompt characters that are not in the vocabulary"
    add("--unknown", choices=("error", "drop", "replace"), default="error", help=unknown_help)
    add("--device", default="auto", help="cpu, cuda or mps; auto takes cuda if there is one")
    precision_help = "of the weights: fp32, bf16 or int8; auto measures int8 on a CPU"
    add("--precision", default="auto", metavar="NAME", help=precision_help)
    add("--root", default=".", metavar="DIR", help="folder of lightning_logs")
    return parser


def generate(argv: list[str]) -> None:
    """`generate`: from flags to text on standard output."""
    args = generate_parser().parse_args(argv)
    flags = {name: f"--{name}" for name in vars(args)}
    if args.prompt_file is not None:
        flags["prompt"] = f"--prompt_file={args.prompt_file}"
    try:
        generate_text(args)
    except UserError as error:
        raise UserError(with_flags(str(error), flags)) from error


def generate_text(args: argparse.Namespace) -> None:
    from gpt_lightning.checkpoint import model_and_tokenizer, read_newest_intact
    from gpt_lightning.generation.generator import TextGenerator
    from gpt_lightning.generation.quantize import quantize
    from gpt_lightning.generation.sampling import Sampling

    settings = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": Sampling(args.temperature, args.top_k, args.top_p, args.min_p),
        "seed": args.seed,
        "num_samples": args.num_samples,
        "stop": args.stop,
    }
    prompt = args.prompt if args.prompt_file is None else read_file(args.prompt_file)
    device = pick_device(args.device)
    path, checkpoint = read_newest_intact(args.ckpt_path, args.root)
    model, tokenizer = model_and_tokenizer(checkpoint, path, args.unknown)
    generator = TextGenerator(quantize(model.to(device), args.precision), tokenizer)
    stream = sys.stdout.isatty() if args.stream is None else args.stream
    if stream and args.num_samples == 1:
        print_stream(prompt, generator.stream(prompt, **settings))
    else:
        for i, text in enumerate(generator.generate(prompt, **settings), 1):
            if args.num_samples > 1:
                print(f"--- {i} of {args.num_samples} ---")
            print(text)
    if not os.path.isfile(args.ckpt_path):
        print(f"checkpoint {path}, step {checkpoint['global_step']:,}", file=sys.stderr)


def print_stream(prompt: str, pieces) -> None:
    first = next(pieces)  # an error must come before the prompt is printed
    print(prompt + first[0], end="", flush=True)
    for (piece,) in pieces:
        print(piece, end="", flush=True)
    print()


def read_file(path: str) -> str:
    """A prompt, read as a corpus is: UTF-8, no byte-order mark, `\\n` line ends."""
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text ({error.reason}); convert it to UTF-8"
        raise UserError(f"--prompt_file={path} {message}") from None
    except OSError as error:
        raise UserError(f"--prompt_file={path} cannot be read: {error}") from None


def pick_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name} is not available here; try --device=cpu") from error
    return name
