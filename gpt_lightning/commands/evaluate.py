"""`evaluate`: what a text costs a model, in nats and bits per character."""

import hashlib
import json
import math
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt_lightning import __version__
from gpt_lightning.commands.common import Parser, pick_device, read_file
from gpt_lightning.data.corpus import Corpus, find_corpus
from gpt_lightning.data.tokenizers import UNKNOWN, Tokenizer, tokenizer_from_state
from gpt_lightning.data.tokens import prepare_tokens
from gpt_lightning.data.windows import Span, first_tokens, split_spans
from gpt_lightning.errors import UserError, with_flags
from gpt_lightning.files import file_sha256, write_atomically

if TYPE_CHECKING:
    from gpt_lightning.generation.scoring import Piece

# Settings that say how a corpus is read.
HOW = {"field": None, "encoding": "utf-8", "separator": ""}

Figures = dict[str, Any]  # of one checkpoint, as in the JSON


def evaluate_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning evaluate",
        description="What a text costs a model, in nats and bits per character. Without --text and "
        "--corpus it scores the text that the checkpoint held out, as validate does.",
        allow_abbrev=False,
    )
    add, text = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    ckpt_help = "last, best (default), a file or a run's folder; several are compared"
    add("--ckpt_path", nargs="+", action="extend", metavar="PATH", help=ckpt_help)
    text("--text", metavar="FILE", help="the text to score; - reads standard input")
    text("--corpus", metavar="NAME", help="a text as fit takes it: a name, file, folder or URL")
    stride_help = "overlapping windows that start N tokens apart; without the flag no overlap"
    add("--field", metavar="NAME", help="the field of .jsonl, .csv and .tsv rows that is the text")
    add("--encoding", default="utf-8", metavar="NAME", help="of the corpus; auto detects it")
    add("--separator", default="", metavar="TEXT", help="stands between two documents")
    add("--stride", type=int, metavar="N", help=stride_help)
    unknown_help = "what to do with characters that are not in the vocabulary (default: error)"
    add("--unknown", choices=UNKNOWN, help=unknown_help)
    add("--json", metavar="FILE", help="write the figures as JSON; - prints nothing else")
    add("--lines", metavar="FILE", help="write the cost of each line as JSON; - prints them")
    add("--show", action="store_true", help="print the text in the terminal, colored by cost")
    add("--html", metavar="FILE", help="write a page that shows the text, colored by cost")
    add("--batch_size", type=int, metavar="N", help="windows computed at once")
    add("--device", default="auto", help="cpu, cuda or mps; auto (default): cuda if there is one")
    add("--root", default=".", metavar="DIR", help="folder of lightning_logs")
    return parser


def main(argv: list[str]) -> None:
    """From flags to figures on standard output."""
    args = evaluate_parser().parse_args(argv)
    try:
        evaluate(args)
    except UserError as error:
        flags = {name: f"--{name}" for name in vars(args)}
        raise UserError(with_flags(str(error), flags)) from error


def evaluate(args: Namespace) -> None:
    paths = args.ckpt_path or ["best"]
    for name in ("lines", "html", "show"):
        if getattr(args, name) and len(paths) > 1:
            raise UserError(f"--{name} shows one checkpoint, and --ckpt_path gives {len(paths)}")
    for name, default in HOW.items():
        if args.corpus is None and (value := getattr(args, name)) != default:
            raise UserError(f"{name}={value} says how --corpus is read; give the text with it")
    for name in ("json", "lines", "html"):
        check_output(name, getattr(args, name))
    given = None if args.text is None else read_file(args.text, "--text")
    device = pick_device(args.device)
    scored = [score_checkpoint(path, given, device, args) for path in paths]
    figures = [one for one, _ in scored]
    recipes = dict.fromkeys(own for _, own in scored)
    groups = [[one for one, own in scored if own == shared] for shared in recipes]
    means = [mean for group in groups if (mean := mean_of_seeds(group))]
    if args.json:
        content = {"results": figures, "means": means}
        write_output("json", args.json, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    if "-" not in (args.json, args.lines, args.html):
        print(report(figures[0]) if len(figures) == 1 else table(figures, means))


def score_checkpoint(
    which: str, given: str | None, device: str, args: Namespace
) -> tuple[Figures, str]:
    """The figures of a checkpoint, and its `recipe`.

    Args:
        which: a value of --ckpt_path.
        given: the text of --text.
    """
    import torch

    from gpt_lightning.checkpoint import KEY, model_and_tokenizer, read_newest_intact
    from gpt_lightning.commands.cost_views import TokenCosts, show
    from gpt_lightning.generation.scoring import NothingPredicted, predictions, total

    path, checkpoint = read_newest_intact(which, args.root)
    entry = checkpoint[KEY]
    settings = entry["settings"] or {}
    held_out = given is None and args.corpus is None
    unknown = args.unknown or (unknown_in_training(settings) if held_out else "error")
    model, tokenizer = model_and_tokenizer(checkpoint, path, unknown)
    block_size = entry["model"]["block_size"]
    if given is not None:
        text = text_of_string(args.text, given, tokenizer)
    elif held_out:
        text = held_out_text(entry, path, tokenizer, block_size)
    else:
        text = text_of_corpus(args.corpus, vars(args), tokenizer)
    pieces = predictions(model.to(device), text.ids, text.spans, args.stride, args.batch_size)
    costs = TokenCosts(tokenizer, text.ids, text.spans)
    if args.lines or args.html or args.show:
        pieces = costs.kept(pieces)
    try:
        score = total(progress(pieces, sum(b - a - 1 for a, b in text.spans)), tokenizer)
    except NothingPredicted as error:
        setting = "corpus" if given is None else "text"
        raise UserError(f"{setting}={text.name}: {error}") from error
    stride = args.stride or block_size
    figures = {
        "nats_per_character": score.nats_per_character,
        "bits_per_character": score.bits_per_character,
        "bits_per_byte": score.bits_per_byte,
        "perplexity_per_token": score.perplexity,
        "nats": score.nats,
        "characters": score.characters,
        "bytes": score.bytes,
        "tokens": score.tokens,
        "floor_nats_per_character": text.floor(tokenizer),
        "seed": settings.get("seed_everything"),
        "protocol": {
            "checkpoint": str(path),
            "step": checkpoint["global_step"],
            "checkpoint_sha256": file_sha256(path),
            "text": text.name,
            "part": "held out" if held_out else "all",
            "text_sha256": text.sha256,
            "tokenizer": tokenizer.kind,
            "windows": "non-overlapping" if stride == block_size else "sliding",
            "block_size": block_size,
            "stride": stride,
            "precision": "fp32",
            "unknown": unknown,
            "unknown_characters": text.unknown,
            **{name: getattr(args, name) for name in HOW if getattr(args, name) != HOW[name]},
            "device": device,
            "torch": torch.__version__,
            "gpt_lightning": __version__,
        },
    }
    if args.lines:
        write_output("lines", args.lines, "".join(costs.lines()))
    if args.html:
        from gpt_lightning.commands.cost_page import cost_page

        title = f"{text.name}: {score.bits_per_character:.3f} bits per character"
        write_output("html", args.html, cost_page(title, report(figures), *costs.first_cells()))
    if args.show:
        show(*costs.first_cells())
    return figures, recipe(entry, settings)


def recipe(entry: dict[str, Any], settings: dict[str, Any]) -> str:
    """The settings of a run that could change its loss, except the seed."""
    same = {k: v for k, v in settings.items() if k not in ("seed_everything", "logger_runs")}
    trainer = {k: v for k, v in same.get("trainer", {}).items() if k != "default_root_dir"}
    parts = [entry["model"], entry["tokenizer"], entry["corpus"], {**same, "trainer": trainer}]
    return json.dumps(parts, sort_keys=True)


def progress(pieces: Iterable["Piece"], tokens: int) -> Iterator["Piece"]:
    """The pieces; stderr tells how much of a long text is done."""
    terminal, done = sys.stderr.isatty(), 0
    interval = 1 if terminal else 30  # seconds
    due = time.monotonic() + interval
    line = ""
    for piece in pieces:
        yield piece
        done += len(piece.targets)
        if time.monotonic() > due:
            due = time.monotonic() + interval
            line = f"scored {done:,} of {tokens:,} tokens"
            print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
            sys.stderr.flush()
    if terminal and line:
        print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)


# --- texts ----------------------------------------------------------------------------------------


@dataclass
class Text:
    """A text in the tokens of one model.

    Args:
        name: a file, or the name of a corpus.
        sha256: of the text in UTF-8; of a corpus, of its files.
        ids: (N,) token ids.
        spans: the parts that are scored.
        unknown: number of characters that are not in the vocabulary.
        corpus: that it is, or None.
    """

    name: str
    sha256: str
    ids: np.ndarray
    spans: list[Span]
    unknown: int
    corpus: Corpus | None = None

    def floor(self, tokenizer: Tokenizer) -> float | None:
        """Nats per character that no model can beat, if known."""
        if self.corpus is None or self.corpus.floor_path is None or self.unknown:
            return None
        count = tokenizer.count_characters
        spans = [(count(self.ids[: a + 1]), count(self.ids[:b])) for a, b in self.spans]
        floors: Any = [self.corpus.floor(*span) for span in spans]
        return float(np.average(floors, weights=[stop - start for start, stop in spans]))


def text_of_string(name: str, text: str, tokenizer: Tokenizer) -> Text:
    try:
        ids = tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"text={name}: {error}") from error
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Text(name, digest, ids, [(0, len(ids))], count_unknown([text], tokenizer))


def text_of_corpus(name: str, how: dict[str, Any], tokenizer: Tokenizer) -> Text:
    """All of a corpus; `how` has the settings that say how it is read, and may have others."""
    corpus = find_corpus(name, **{key: how[key] for key in HOW if key in how})
    vocabulary = tokenizer.state().get("vocabulary")
    unknown = getattr(tokenizer, "unknown", "error")
    file = prepare_tokens(corpus, tokenizer.kind, unknown, vocabulary)
    ids, missing = file.open(), count_unknown(corpus.chunks(), tokenizer)
    return Text(corpus.name, file.corpus_sha256, ids, [(0, len(ids))], missing, corpus)


def held_out_text(entry: dict[str, Any], path: Path, tokenizer: Tokenizer, block_size: int) -> Text:
    """The validation part of the text that a checkpoint was trained on.

    Args:
        entry: what the checkpoint says about itself.
        path: its file.
    """
    own, data = entry["corpus"], (entry["settings"] or {}).get("data", {})
    of_its_own = own.get("val_name") is not None  # no part of the training text
    name, digest = (
        (own["val_name"], own["val_sha256"]) if of_its_own else (own["name"], own["sha256"])
    )
    advice = f"it is the text of ckpt_path={path}; give another one with --text or --corpus"
    try:
        text = text_of_corpus(name, data, tokenizer)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from error
    if text.sha256 != digest:
        raise UserError(f"corpus={name} has changed since the training; {advice}")
    if not of_its_own:
        _, text.spans = split_spans(len(text.ids), own["split"], own["val_fraction"], block_size)
    if data.get("max_val_tokens") is not None:
        text.spans = first_tokens(text.spans, data["max_val_tokens"])
    return text


def unknown_in_training(settings: dict[str, Any]) -> str:
    """What the run of these settings does with unknown characters."""
    data = settings.get("data", {})
    return data.get("unknown") or ("replace" if data.get("min_count", 1) > 1 else "error")


def count_unknown(chunks: Iterable[str], tokenizer: Tokenizer) -> int:
    """Number of characters that are not in the vocabulary."""
    if getattr(tokenizer, "unknown", "error") == "error":
        return 0
    known = tokenizer_from_state(tokenizer.state(), "drop")
    return sum(len(chunk) - known.count_characters(known.encode(chunk)) for chunk in chunks)


# --- output ---------------------------------------------------------------------------------------


def check_output(name: str, path: str | None) -> None:
    """Raise a UserError if the file of a flag exists, or its folder does not."""
    if path in (None, "-"):
        return
    if Path(path).exists():
        raise UserError(f"{name}={path} exists; delete it or give another name")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{name}={path}: there is no such folder")


def write_output(name: str, path: str, text: str) -> None:
    if path == "-":
        print(text, end="")
        return
    try:
        with write_atomically(path) as file:
            file.write(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{name}={path} cannot be written: {error.strerror}") from error


def mean_of_seeds(group: list[Figures]) -> Figures | None:
    """Mean and standard error over runs that differ in their seed; None if they do not."""
    seeds = [one["seed"] for one in group]
    if len(group) < 2 or None in seeds or len(set(seeds)) < len(seeds):
        return None
    mean: Figures = {"seeds": seeds}
    for name in ("nats_per_character", "bits_per_character", "bits_per_byte"):
        values = [one[name] for one in group]
        mean[name] = statistics.fmean(values)
        mean[f"{name}_standard_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return mean


def report(one: Figures) -> str:
    """The figures of one checkpoint, one a line."""
    protocol = one["protocol"]
    nats, floor = one["nats_per_character"], one["floor_nats_per_character"]
    perplexity, kind = one["perplexity_per_token"], protocol["tokenizer"]
    sliding = protocol["windows"] == "sliding"
    rows = {
        "checkpoint": f"{protocol['checkpoint']}, step {protocol['step']:,}",
        "text": f"{protocol['text']}, {protocol['part']}",
        "sliding loss" if sliding else "loss": (
            f"{nats:.4f} nats per character ({one['bits_per_character']:.4f} bits)"
        ),
        "bits per byte": f"{one['bits_per_byte']:.4f}",
        "perplexity": f"{perplexity:.4f} per token (tokenizer: {kind})",
        "predicted": f"{one['characters']:,} characters, {one['tokens']:,} tokens",
    }
    if floor is not None:
        rows["the floor"] = f"{floor:.4f} nats ({floor / math.log(2):.4f} bits): "
        rows["the floor"] += f"{nats - floor:.4f} nats above it"
    if protocol["unknown_characters"]:
        verb = {"drop": "left out", "replace": "replaced"}[protocol["unknown"]]
        rows["unknown"] = f"{protocol['unknown_characters']:,} characters {verb}"
    rows["protocol"] = protocol_line(one)
    return "\n".join(f"{name:<15}{value}" for name, value in rows.items())


def table(figures: list[Figures], means: list[Figures]) -> str:
    """The figures of several checkpoints, then how they were measured."""
    header = ("checkpoint", "step", "nats/char", "bits/char", "bits/byte", "perplexity/token")
    names = ("nats_per_character", "bits_per_character", "bits_per_byte")
    rows: list[tuple[str, ...]] = [header]
    for one in figures:
        protocol = one["protocol"]
        values = [f"{one[name]:.4f}" for name in (*names, "perplexity_per_token")]
        rows.append((protocol["checkpoint"], f"{protocol['step']:,}", *values))
    for mean in means:
        values = [f"{mean[name]:.4f}" for name in names]
        errors = [f"± {mean[f'{name}_standard_error']:.4f}" for name in names]
        rows.append((f"mean of {len(mean['seeds'])} seeds", "", *values, ""))
        rows.append(("standard error", "", *errors, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    lines.append("")
    if len({(one["protocol"]["text_sha256"], one["characters"]) for one in figures}) > 1:
        lines.append("These are figures of different texts: see text_sha256 and unknown below.")
    lines += [f"protocol  {protocol_line(one)}" for one in figures]
    return "\n".join(lines)


def protocol_line(one: Figures) -> str:
    """All that is needed to measure the figures again, as NAME=VALUE for a shell."""
    return " ".join(f"{name}={shlex.quote(str(v))}" for name, v in one["protocol"].items())
