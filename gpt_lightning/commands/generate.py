"""`generate`: text from a checkpoint on standard output."""

import argparse
import os
import sys

from gpt_lightning.commands.common import Parser, pick_device, read_file
from gpt_lightning.errors import UserError, with_flags


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


def main(argv: list[str]) -> None:
    """From flags to text on standard output."""
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
    prompt = (
        args.prompt if args.prompt_file is None else read_file(args.prompt_file, "--prompt_file")
    )
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
