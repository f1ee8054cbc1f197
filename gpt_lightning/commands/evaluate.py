"""`evaluate`: what a text costs a model, in nats and bits per character."""

import hashlib
import json
import math
import shlex
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt_lightning import __version__
from gpt_lightning.checkpoint import KEY, model_and_tokenizer, read_newest_intact
from gpt_lightning.commands.common import (
    HOW,
    Parser,
    add_corpus_flags,
    check_new,
    corpus_of,
    errors_name_flags,
    pick_device,
    read_file,
)
from gpt_lightning.commands.cost_page import cost_page
from gpt_lightning.commands.cost_views import SHOWN, TokenCosts, show
from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.tokenizers import UNKNOWN, Tokenizer, count_unknown
from gpt_lightning.data.tokens import PIECE, floor_of_spans
from gpt_lightning.data.windows import Span, first_tokens, split_spans
from gpt_lightning.errors import UserError
from gpt_lightning.files import file_sha256, write_atomically
from gpt_lightning.generation.scoring import predictions, total

LOSSES = ("nats_per_character", "bits_per_character", "bits_per_byte", "perplexity")
FLOOR = "floor_nats_per_character"
SIZES = ("characters", "tokens", "unknown_characters")
ROWS = {**dict.fromkeys((*LOSSES, FLOOR), ".4f"), **dict.fromkeys(SIZES, ",")}  # and their format


def evaluate_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning evaluate",
        description="What a text costs a model, in nats and bits per character. Without --text it "
        "scores the text that the checkpoint held out, as validate does.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    ckpt_help = "last, best (default), a file or a run's folder; several are compared"
    add("--ckpt_path", nargs="+", action="extend", metavar="PATH", help=ckpt_help)
    text_help = "the text, as fit takes it: a file, folder, URL or name; - reads standard input"
    add("--text", metavar="NAME", help=text_help)
    add_corpus_flags(parser)
    stride_help = "overlapping windows that start N tokens apart; without the flag no overlap"
    add("--stride", type=int, metavar="N", help=stride_help)
    unknown_help = "what to do with characters that are not in the vocabulary (default: error)"
    add("--unknown", choices=UNKNOWN, help=unknown_help)
    output = parser.add_mutually_exclusive_group().add_argument
    output("--json", action="store_true", help="print the figures as JSON")
    output("--lines", action="store_true", help="print the cost of each line as JSON Lines")
    output("--show", action="store_true", help="print the text, too, in colors of its cost")
    add("--html", metavar="FILE", help="write a page that shows the text in colors of its cost")
    add("--batch_size", type=int, metavar="N", help="windows computed at once")
    add("--device", default="auto", help="cpu, cuda or mps; auto (default) takes a GPU if any")
    add("--root", default=".", metavar="DIR", help="folder of lightning_logs")
    return parser


def main(argv: list[str]) -> None:
    """From flags to figures on standard output."""
    args = evaluate_parser().parse_args(argv)
    with errors_name_flags(args) as flags:
        if args.text:
            flags["corpus"] = "--text"
        evaluate(args)


def evaluate(args: Namespace) -> None:
    paths = args.ckpt_path or ["best"]
    for name in ("lines", "show", "html"):
        if getattr(args, name) and len(paths) > 1:
            raise UserError(f"--{name} is for one checkpoint, and --ckpt_path gives {len(paths)}")
    if args.html:
        check_new("html", Path(args.html), ".html")
    typed = read_file("-", "--text") if args.text == "-" else None
    results = [score_checkpoint(path, typed, args) for path in paths]
    figures, costs = [result.figures for result in results], results[0].costs
    summary = over_seeds(results)
    if args.show:
        show(costs.cells(SHOWN))
    if args.json:
        print(json.dumps({"results": figures, **summary}, ensure_ascii=False, indent=2))
    elif args.lines:
        for line in costs.lines():
            print(json.dumps(line, ensure_ascii=False))
    else:
        print(report(figures, summary))
    if args.html:
        bits = figures[0]["bits_per_character"]
        title = f"{figures[0]['protocol']['text']}: {bits:.3f} bits per character"
        page = cost_page(title, report(figures, summary), costs.cells(SHOWN))
        with write_atomically(args.html) as file:
            file.write(page.encode("utf-8", "replace"))
        print(f"written: {args.html}", file=sys.stderr)


@dataclass
class Result:
    """What is known of a text after a checkpoint has scored it.

    Args:
        figures: as in the JSON.
        costs: of each token.
        recipe: the settings of the checkpoint's run, except its seed.
    """

    figures: dict[str, Any]
    costs: TokenCosts
    recipe: list[dict[str, Any]]


def score_checkpoint(which: str, typed: str | None, args: Namespace) -> Result:
    """Score the text with a checkpoint.

    Args:
        which: a value of --ckpt_path.
        typed: the text if it came from standard input.
    """
    path, checkpoint = read_newest_intact(which, args.root)
    entry = checkpoint[KEY]
    settings, block_size = entry["settings"] or {}, entry["model"]["block_size"]
    held_out = args.text is None
    how = settings.get("data", {}) if held_out else vars(args)
    unknown = args.unknown or "error"
    if held_out and not args.unknown:  # as in training
        unknown = how.get("unknown") or ("replace" if how.get("min_count", 1) > 1 else "error")
    device = pick_device(args.device)
    model, tokenizer = model_and_tokenizer(checkpoint, path, unknown)

    corpus = None
    if held_out:
        corpus = held_out_corpus(entry["corpus"], how, path)
    elif typed is None:
        corpus = corpus_of(args.text, how)
    chunks = corpus.chunks(PIECE) if corpus else [typed]
    ids, sha256, unknown_characters = encode(chunks, tokenizer)
    spans = [(0, len(ids))]
    if held_out:
        spans = held_out_spans(entry["corpus"], how, len(ids), block_size)
    costs = TokenCosts(tokenizer, ids, spans)
    pieces = predictions(model.to(device), ids, spans, args.stride, args.batch_size)
    score = total(costs.record(pieces), tokenizer)
    has_floor = corpus is not None and not unknown_characters
    stride = args.stride or block_size
    figures = {
        **{name: getattr(score, name) for name in LOSSES},
        FLOOR: floor_of_spans(corpus, tokenizer, ids, spans) if has_floor else None,
        "characters": score.characters,
        "tokens": score.tokens,
        "unknown_characters": unknown_characters,
        "seed": settings.get("seed_everything"),
        "protocol": {
            "checkpoint": str(path),
            "step": checkpoint["global_step"],
            "checkpoint_sha256": file_sha256(path),
            "text": args.text or how.get("val_corpus") or how.get("corpus") or corpus.name,
            "part": "held out" if held_out else "all",
            "text_sha256": sha256,
            **{name: how.get(name) for name in HOW},
            "tokenizer": tokenizer.kind,
            "unknown": unknown,
            "windows": "non-overlapping" if stride == block_size else "sliding",
            "block_size": block_size,
            "stride": stride,
            "precision": "fp32",
            "device": device,
            "torch": torch.__version__,
            "gpt_lightning": __version__,
        },
    }
    trainer = {**settings.get("trainer", {}), "default_root_dir": None}
    same = {**settings, "trainer": trainer, "seed_everything": None, "logger_runs": None}
    return Result(figures, costs, [entry["model"], entry["corpus"], same])


def held_out_corpus(own: dict[str, Any], data: dict[str, Any], path: Path) -> Corpus:
    """The text that a checkpoint was validated on, or a part of.

    Args:
        own: what the checkpoint says about its corpus.
        data: its settings.
        path: its file.
    """
    name, sha256 = own.get("val_name") or own["name"], own.get("val_sha256") or own["sha256"]
    try:
        corpus = corpus_of(name, data)
        if corpus.sha256() != sha256:
            raise UserError(f"corpus={name} has changed since the training")
    except UserError as error:
        advice = f"it is the text of ckpt_path={path}; give another one with --text"
        raise UserError(f"{error}; {advice}") from error
    return corpus


def held_out_spans(
    own: dict[str, Any], data: dict[str, Any], length: int, block_size: int
) -> list[Span]:
    """The parts of that text, of `length` tokens, on which the checkpoint was validated."""
    spans = [(0, length)]
    if own.get("val_name") is None:
        _, spans = split_spans(length, own["split"], own["val_fraction"], block_size)
    return first_tokens(spans, data.get("max_val_tokens") or length)


def encode(chunks: Iterable[str], tokenizer: Tokenizer) -> tuple[np.ndarray, str, int]:
    """The ids of a text, its SHA-256 in UTF-8, and the number of unknown characters in it."""
    ids, sha256, unknown_characters = [], hashlib.sha256(), 0
    for chunk in chunks:
        ids.append(tokenizer.encode(chunk))
        sha256.update(chunk.encode("utf-8", "surrogatepass"))
        unknown_characters += count_unknown(chunk, tokenizer)
    return np.concatenate(ids), sha256.hexdigest(), unknown_characters


def over_seeds(results: list[Result]) -> dict[str, dict[str, float]]:
    """Mean and standard error, if the runs differ in their seed alone."""
    seeds = {result.figures["seed"] for result in results} - {None}
    if not 1 < len(seeds) == len(results) or any(r.recipe != results[0].recipe for r in results):
        return {}
    values = {name: [result.figures[name] for result in results] for name in LOSSES}
    return {
        "mean": {name: statistics.fmean(v) for name, v in values.items()},
        "standard_error": {
            name: statistics.stdev(v) / math.sqrt(len(v)) for name, v in values.items()
        },
    }


def report(figures: list[dict[str, Any]], summary: dict[str, dict[str, float]]) -> str:
    """A table with a column for each checkpoint, and how to measure the figures again."""
    columns = {str(number): one for number, one in enumerate(figures, 1)} | summary
    protocols = [one["protocol"] for one in figures]
    sliding = "sliding " if protocols[0]["windows"] == "sliding" else ""
    rows = [["checkpoint", *(name.replace("_", " ") for name in columns)]]
    for name, form in ROWS.items():
        values = [column.get(name) for column in columns.values()]
        if any(values):
            label = (sliding if name in LOSSES else "") + name.replace("_", " ")
            rows.append([label, *("" if v is None else format(v, form) for v in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *aligned]).rstrip())
    if len({protocol["text_sha256"] for protocol in protocols}) > 1:
        lines.append("These are figures of different texts.")
    elif len({one["characters"] for one in figures}) > 1:
        lines.append("The numbers of characters differ because first tokens are not predicted.")
    for number, protocol in enumerate(protocols, 1):
        settings = [f"{name}={shlex.quote(str(value))}" for name, value in protocol.items()]
        lines.append(f"protocol {number}: {' '.join(settings)}")
    return "\n".join(lines)
