"""The front door: `python -m gpt_lightning COMMAND`.

`generate` runs here, with torch alone; the commands of the Trainer wait in `lightning_cli`, which
is imported only for them. A user's mistake ends in one line on stderr and exit code 2. Set
GPT_LIGHTNING_DEBUG=1 to see the traceback behind it.
"""

import argparse
import os
import sys
from pathlib import Path

from gpt_lightning import __version__
from gpt_lightning.messages import Parser, nearest

COMMANDS = {
    "fit": "train a model, or go on with a run (--ckpt_path=last)",
    "validate": "exact loss of a checkpoint on the held-out text",
    "test": "the same under the name test/",
    "predict": "the cost in nats of each held-out character, to a file",
    "generate": "write text from a checkpoint",
    "climb": "train every rung of the lecture's ladder, several seeds each: a table and a picture",
}

HELP = f"""\
usage: python -m gpt_lightning COMMAND [--flag=value ...]

A character-level GPT on PyTorch Lightning.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

for example:
  python -m gpt_lightning fit                              the embedded corpus, two minutes on a CPU
  python -m gpt_lightning fit --data.corpus=my_text.txt    your own text: a file, a folder or a URL
  python -m gpt_lightning fit --config configs/laptop.yaml --model.n_layer=6
  python -m gpt_lightning fit --ckpt_path=last             go on where the newest run stopped
  python -m gpt_lightning generate --prompt "ROMEO:" --stream
  python -m gpt_lightning climb --seeds=1337               the lecture, rung by rung, ten minutes
  tensorboard --logdir lightning_logs                      watch

python -m gpt_lightning COMMAND --help lists the flags of a command.
"""


def main(argv: list[str] | None = None) -> None:
    """Run a command; ends the process with its exit code (2 for a user's mistake)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        sys.exit(run(argv) or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `generate | head`
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("GPT_LIGHTNING_DEBUG"):
            raise
        fail(error)


def fail(error: Exception | str) -> None:
    """Say what is wrong in one line and end with exit code 2."""
    line = " ".join(str(error).split())
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def run(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        choices = ", ".join(COMMANDS)
        raise ValueError(
            f"{argv[0]!r} is no command{nearest(argv[0], COMMANDS)} (there are: {choices})"
        )
    if argv[0] == "generate":
        return generate(argv[1:])
    if argv[0] == "climb":
        from gpt_lightning.ladder import climb

        return climb(argv[1:])
    from gpt_lightning.lightning_cli import run_trainer

    return run_trainer(argv, COMMANDS[argv[0]])


def generate_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning generate",
        description="Write text from a checkpoint file; needs neither the corpus nor Lightning.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--ckpt_path",
        metavar="PATH",
        help="last, best, a checkpoint file or a run's folder (default: best of the newest run)",
    )
    add("--prompt", default="", metavar="TEXT", help="what the text begins with")
    add("--prompt_file", metavar="FILE", help="the same from a file; - reads standard input")
    add("--max_new_tokens", type=int, default=500, metavar="N", help="(default: 500)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: likeliest (default: 0.8)")
    add("--top_k", type=int, metavar="K", help="draw from the K likeliest only")
    add("--top_p", type=float, metavar="P", help="draw from the likeliest that make up P")
    add("--min_p", type=float, metavar="P", help="drop what is below P times the likeliest")
    add("--seed", type=int, default=1337, metavar="N", help="same seed, same text (default: 1337)")
    add("--num_samples", type=int, default=1, metavar="N", help="texts to write (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text at TEXT (repeat)")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show a single text as it is written (default: if the output is a terminal)",
    )
    add(
        "--unknown",
        choices=("error", "drop", "replace"),
        default="error",
        help="prompt characters that the model never saw (default: error)",
    )
    add("--device", default="auto", help="cpu, cuda, mps (default: a GPU if there is one)")
    add(
        "--precision",
        default="auto",
        metavar="NAME",
        help="of the weights: fp32 as trained, bf16, int8; auto: int8 for a large model on a CPU "
        "where it is quicker (default: auto)",
    )
    add("--root", default=".", metavar="DIR", help="where lightning_logs is (default: here)")
    return parser


def generate(argv: list[str]) -> None:
    """`generate`: from flags to text on standard output."""
    args = generate_parser().parse_args(argv)

    from gpt_lightning.checkpoint import Damaged, find_checkpoint, newest_run, read_whole
    from gpt_lightning.generation.sampling import Sampling
    from gpt_lightning.generation.writer import Writer

    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"--seed={args.seed} must fit in 64 bits")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    which = args.ckpt_path
    if which is None:
        which = newest_run(args.root) or "best"
    how = pick_device(args.device), args.unknown, args.precision
    try:
        writer = Writer.load(find_checkpoint(which, args.root), *how)
    except Damaged:
        writer = Writer.load(read_whole(which, args.root)[0], *how)
    prompt = read_prompt(args.prompt, args.prompt_file)
    stream = sys.stdout.isatty() if args.stream is None else args.stream
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a mark instead
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling,
        "seed": args.seed,
        "num_samples": args.num_samples,
        "stop": args.stop,
    }
    if stream and args.num_samples == 1:
        pieces = writer.stream(prompt, **settings)
        first = next(pieces)  # a mistake must show before the prompt does
        print(prompt + first[0], end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
        return
    for i, text in enumerate(writer.write(prompt, **settings)):
        if args.num_samples > 1:
            print(f"{'' if i == 0 else chr(10)}--- {i + 1} of {args.num_samples} ---")
        print(text)


def read_prompt(prompt: str, prompt_file: str | None) -> str:
    if prompt_file is None:
        return prompt
    if prompt:
        raise ValueError("--prompt and --prompt_file were both given; choose one")
    try:
        raw = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt_file={prompt_file} is not UTF-8 at byte {error.start}"
        ) from None
    except OSError as error:
        raise ValueError(f"--prompt_file={prompt_file}: {error.strerror}") from None


def pick_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={name} is not available here; try --device=cpu") from error
    return name
