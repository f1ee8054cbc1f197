"""`generate`: text from a checkpoint on standard output."""

import argparse
import os
import sys
from collections.abc import Iterator

from gpt_lightning.commands.common import Parser, errors_name_flags, pick_device, read_file
from gpt_lightning.commands.interactive import interact
from gpt_lightning.errors import UserError
from gpt_lightning.terminal import safe_to_show


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
    prompt("--prompts_file", metavar="FILE", help="several prompts, one a line")
    prompt("--interactive", action="store_true", help="read prompts from the terminal until Ctrl-D")
    add("--max_new_tokens", type=int, default=500, metavar="N", help="largest number of tokens")
    add("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token")
    add("--top_k", type=int, metavar="K", help="sample from the K likeliest tokens only")
    add("--top_p", type=float, metavar="P", help="sample from the likeliest that make up P")
    add("--min_p", type=float, metavar="P", help="drop tokens below P times the likeliest")
    penalty_help = "above 1 makes tokens that occur in the context window less likely"
    add("--repetition_penalty", type=float, default=1.0, metavar="X", help=penalty_help)
    add("--seed", type=int, default=1337, metavar="N", help="same seed, same text")
    add("--num_samples", type=int, default=1, metavar="N", help="number of texts")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text at TEXT (repeat)")
    ban_help = "TEXT does not occur in what is generated (repeat)"
    add("--ban", action="append", default=[], metavar="TEXT", help=ban_help)
    stream_help = "print a single text token by token; without the flag on a terminal only"
    add("--stream", action=argparse.BooleanOptionalAction, help=stream_help)
    unknown_help = "what to do with prompt characters that are not in the vocabulary"
    add("--unknown", choices=("error", "drop", "replace"), default="error", help=unknown_help)
    add("--device", default="auto", help="cpu, cuda or mps; auto takes a GPU if there is one")
    precision_help = "of the weights: fp32, bf16 or int8; auto measures int8 on a CPU"
    add("--precision", default="auto", metavar="NAME", help=precision_help)
    add("--root", default=".", metavar="DIR", help="folder of lightning_logs")
    return parser


def main(argv: list[str]) -> None:
    """From flags to text on standard output."""
    args = generate_parser().parse_args(argv)
    with errors_name_flags(args) as flags:
        generate_texts(args, flags)


def generate_texts(args: argparse.Namespace, flags: dict[str, str]) -> None:
    from gpt_lightning.checkpoint import ONNX, find_checkpoint, read_newest_intact
    from gpt_lightning.generation.generator import TextGenerator
    from gpt_lightning.generation.sampling import Sampling

    filters = (args.top_k, args.top_p, args.min_p)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": Sampling(args.temperature, *filters, args.repetition_penalty),
        "seed": args.seed,
        "num_samples": args.num_samples,
        "stop": args.stop,
        "ban": args.ban,
    }
    if args.interactive and args.num_samples != 1:
        raise UserError(f"num_samples={args.num_samples} must be 1 with --interactive")
    prompts = [] if args.interactive else read_prompts(args)
    path = find_checkpoint(args.ckpt_path, args.root)
    if path.suffix == ONNX:
        device = "cpu" if args.device == "auto" else pick_device(args.device)
        generator = TextGenerator.load(path, device, args.precision, args.unknown)
        source = str(path)
    else:
        device = pick_device(args.device)
        path, checkpoint = read_newest_intact(args.ckpt_path, args.root)
        generator = TextGenerator.from_checkpoint(
            checkpoint, path, device, args.precision, args.unknown
        )
        source = f"checkpoint {path}, step {checkpoint['global_step']:,}"
    if args.interactive:
        print(source, file=sys.stderr)
        return interact(generator, settings, flags)
    stream = sys.stdout.isatty() if args.stream is None else args.stream
    for flag, prompt in prompts:
        flags["prompt"] = flag  # what an error about this prompt names
        generator.encode_prompt(prompt)  # an error must come before the first text
    number, total = 0, len(prompts) * args.num_samples
    for _, prompt in prompts:
        if stream and args.num_samples == 1:
            number += 1
            print_stream(prompt, generator.stream(prompt, **settings), header(number, total))
            continue
        for text in generator.generate(prompt, **settings):
            number += 1
            print(header(number, total) + safe_to_show(text))
    if not os.path.isfile(args.ckpt_path):
        print(source, file=sys.stderr)


def read_prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The flag that each prompt comes from, and the prompt."""
    if args.prompt_file is not None:
        text = read_file(args.prompt_file, "--prompt_file")
        return [(f"--prompt_file={args.prompt_file}", text)]
    if args.prompts_file is None:
        return [("--prompt", args.prompt)]
    flag = f"--prompts_file={args.prompts_file}"
    lines = enumerate(read_file(args.prompts_file, "--prompts_file").split("\n"), 1)
    prompts = [(f"{flag}, line {number}", line) for number, line in lines if line]
    if not prompts:
        raise UserError(f"{flag} is empty; write one prompt a line")
    return prompts


def header(number: int, total: int) -> str:
    """The line before one of several texts."""
    return f"--- {number} of {total} ---\n" if total > 1 else ""


def print_stream(prompt: str, pieces: Iterator[list[str]], header: str = "") -> None:
    first = next(pieces)  # an error must come before the prompt is printed
    print(header + safe_to_show(prompt + first[0]), end="", flush=True)
    for (piece,) in pieces:
        print(safe_to_show(piece), end="", flush=True)
    print()
