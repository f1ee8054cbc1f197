"""The entry point of the command line: `python -m gpt_lightning COMMAND`.

`generate` runs here, without importing Lightning; the Trainer's commands are in `lightning_cli`. A
`UserError` ends in one line on stderr and exit code 2. Any other exception keeps its traceback.
"""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

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

HELP = f"""\
usage: python -m gpt_lightning COMMAND [--flag=value ...]

A character-level GPT on PyTorch Lightning.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

examples:
  python -m gpt_lightning fit                              the embedded corpus, a minute on a CPU
  python -m gpt_lightning fit --data.corpus=my_text.txt    your own text: a file, a folder or a URL
  python -m gpt_lightning fit --config laptop --model.n_layer=6
  python -m gpt_lightning fit --ckpt_path=last             resume the newest run
  python -m gpt_lightning generate --prompt "ROMEO:" --stream
  python -m gpt_lightning climb --seeds=1337               the lecture's ladder, ten minutes
  tensorboard --logdir lightning_logs                      watch

python -m gpt_lightning COMMAND --help lists the flags of a command.
"""


def main(argv: list[str] | None = None) -> None:
    """Run a command; ends the process with its exit code, 2 for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    prepare_console()
    try:
        code = run(argv)
        sys.stdout.flush()
        sys.exit(code or 0)
    except BrokenPipeError:  # `generate | head`
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        line = " ".join(str(error).split())
        line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def prepare_console() -> None:
    """Files and pipes get UTF-8. A terminal shows `?` for a character that it cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook, nor with io.StringIO
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8", errors="replace")


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
        choices = ", ".join(COMMANDS)
        hint = did_you_mean(command, COMMANDS)
        raise UserError(f"unknown command {command!r}{hint} (choose from {choices})")
    if command == "generate":
        return generate(flags)
    if command == "climb":
        from gpt_lightning.ladder import climb

        return climb(flags)
    from gpt_lightning.lightning_cli import run_trainer

    return run_trainer(argv, COMMANDS[command])


class Parser(argparse.ArgumentParser):
    """Raises a UserError, with the nearest flag, in place of printing its usage."""

    def __init__(self, **settings):
        self.flags: list[str] = []
        super().__init__(**settings, allow_abbrev=False)

    def add_argument(self, *names, **settings):
        self.flags += names
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> None:
        flag = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        raise UserError(message + did_you_mean(flag, self.flags))


def generate_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning generate",
        description="Generate text from a checkpoint. Needs neither the corpus nor Lightning.",
    )
    add = parser.add_argument
    add(
        "--ckpt_path",
        metavar="PATH",
        help="last, best, a checkpoint file or a run's folder (default: best of the newest run)",
    )
    add("--prompt", default="", metavar="TEXT", help="the text to continue")
    add("--prompt_file", metavar="FILE", help="the same from a file; - reads standard input")
    add("--max_new_tokens", type=int, default=500, metavar="N", help="(default: 500)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: likeliest (default: 0.8)")
    add("--top_k", type=int, metavar="K", help="sample from the K likeliest tokens only")
    add("--top_p", type=float, metavar="P", help="sample from the likeliest that make up P")
    add("--min_p", type=float, metavar="P", help="drop tokens below P times the likeliest")
    add("--seed", type=int, default=1337, metavar="N", help="same seed, same text (default: 1337)")
    add("--num_samples", type=int, default=1, metavar="N", help="number of texts (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text at TEXT (repeat)")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print a single text token by token (default: if stdout is a terminal)",
    )
    add(
        "--unknown",
        choices=("error", "drop", "replace"),
        default="error",
        help="what to do with prompt characters that are not in the vocabulary (default: error)",
    )
    add("--device", default="auto", help="cpu, cuda, mps (default: cuda if there is one)")
    add(
        "--precision",
        default="auto",
        metavar="NAME",
        help="of the weights: fp32, bf16 or int8; auto takes int8 for a large model on a CPU where "
        "it is faster (default: auto)",
    )
    add("--root", default=".", metavar="DIR", help="folder of lightning_logs (default: here)")
    return parser


def generate(argv: list[str]) -> None:
    """`generate`: from flags to text on standard output."""
    parser = generate_parser()
    args = parser.parse_args(argv)
    flags = {flag.removeprefix("--"): flag for flag in parser.flags if flag.startswith("--")}
    if args.prompt_file:
        flags["prompt"] = f"--prompt_file={args.prompt_file}"
    try:
        generate_text(args)
    except UserError as error:
        raise UserError(with_flags(str(error), flags)) from error


def generate_text(args: argparse.Namespace) -> None:

    from gpt_lightning.checkpoint import (
        DamagedCheckpoint,
        find_checkpoint,
        newest_run,
        read_newest_intact,
    )
    from gpt_lightning.generation.generator import TextGenerator
    from gpt_lightning.generation.sampling import Sampling

    if not -(2**63) <= args.seed < 2**64:
        raise UserError(f"--seed={args.seed} must fit in 64 bits")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    which = args.ckpt_path
    if which is None:
        which = newest_run(args.root) or "best"
    how = pick_device(args.device), args.precision, args.unknown
    try:
        generator = TextGenerator.load(find_checkpoint(which, args.root), *how)
    except DamagedCheckpoint:
        generator = TextGenerator.load(read_newest_intact(which, args.root)[0], *how)
    prompt = read_prompt(args.prompt, args.prompt_file)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling,
        "seed": args.seed,
        "num_samples": args.num_samples,
        "stop": args.stop,
    }
    stream = sys.stdout.isatty() if args.stream is None else args.stream
    if stream and args.num_samples == 1:
        print_stream(prompt, generator.stream(prompt, **settings))
    else:
        print_texts(generator.generate(prompt, **settings))


def print_stream(prompt: str, pieces) -> None:
    first = next(pieces)  # an error must come before the prompt is printed
    print(prompt + first[0], end="", flush=True)
    for (piece,) in pieces:
        print(piece, end="", flush=True)
    print()


def print_texts(texts: list[str]) -> None:
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(f"{'' if i == 0 else chr(10)}--- {i + 1} of {len(texts)} ---")
        print(text)


def read_prompt(prompt: str, prompt_file: str | None) -> str:
    """The prompt; a file is read as a corpus is: UTF-8, no byte-order mark, `\\n` line ends."""
    if prompt_file is None:
        return prompt
    if prompt:
        raise UserError("--prompt and --prompt_file exclude each other; give one of them")
    try:
        raw = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file={prompt_file} is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--prompt_file={prompt_file}: {error.strerror}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def pick_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name} is not available here; try --device=cpu") from error
    return name
