"""`inspect`: what a text is made of, before a model is trained on it."""

import argparse
import math
import unicodedata
from dataclasses import replace

import numpy as np

from gpt_lightning.commands.common import Parser
from gpt_lightning.data.corpus import Corpus, find_corpus
from gpt_lightning.data.documents import corpus_error, listed
from gpt_lightning.data.statistics import (
    END_ORDER,
    PASSAGE,
    Characters,
    compare_end,
    count_characters,
    end_message,
    ngram_entropies,
    overlap,
    repeated_message,
    sample,
)
from gpt_lightning.data.tokenizers import KINDS, Tokenizer
from gpt_lightning.data.tokens import prepare_tokens
from gpt_lightning.data.windows import SPLITS, Span, split_spans
from gpt_lightning.errors import UserError, with_flags

MOST_COMPARED = 4_000_000  # validation tokens that are looked for in the training part
MOST_COUNTED = 10_000_000  # tokens for the n-gram models: 0.8 GB of memory
NAMED = 12  # characters of each kind that are listed


def inspect_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning inspect",
        description="Report what a text is made of: its characters, passages that its validation "
        "part repeats, whether its end is like the rest, and the loss of counted n-gram models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, name = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    name("corpus", nargs="?", default=argparse.SUPPRESS, metavar="NAME", help="as --corpus")
    corpus_help = "a file, a folder, a URL, tinyshakespeare or playwright"
    name("--corpus", default="playwright", metavar="NAME", help=corpus_help)
    add("--field", metavar="NAME", help="the field of .jsonl, .csv and .tsv rows that is the text")
    add("--encoding", default="utf-8", metavar="NAME", help="of the files; auto detects it")
    add("--separator", default="", metavar="TEXT", help="stands between two documents")
    add("--tokenizer", choices=KINDS, default="char", help="what a token is")
    add("--split", choices=SPLITS, default="tail", help="the validation part: the end, or blocks")
    val_help = "share of the text that is held out"
    add("--val_fraction", type=float, default=0.1, metavar="X", help=val_help)
    add("--block_size", type=int, default=128, metavar="T", help="for the split into blocks")
    add("--order", type=int, default=6, metavar="N", help="of the largest n-gram model")
    return parser


def main(argv: list[str]) -> None:
    """From flags to a report on standard output."""
    args = inspect_parser().parse_args(argv)
    try:
        report(args)
    except UserError as error:
        raise UserError(
            with_flags(str(error), {name: f"--{name}" for name in vars(args)})
        ) from error


def report(args: argparse.Namespace) -> None:
    if not 0 < args.val_fraction < 1:
        raise UserError(f"val_fraction={args.val_fraction} must be above 0 and below 1")
    for name, value in (("order", args.order), ("block_size", args.block_size)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    how = {"field": args.field, "encoding": args.encoding, "separator": args.separator}
    corpus = find_corpus(args.corpus, **how)
    characters = count_characters(corpus.chunks())
    print_characters(corpus, characters)

    file = prepare_tokens(corpus, args.tokenizer)
    ids, tokenizer = file.open(), file.tokenizer
    train, val = split_spans(len(ids), args.split, args.val_fraction, args.block_size)
    train_size, val_size = (sum(stop - start for start, stop in part) for part in (train, val))
    if not train_size or val_size < 2:
        raise corpus_error(
            corpus.name,
            f" has {len(ids):,} tokens, too few to hold out val_fraction={args.val_fraction} of "
            "them; give more text or another val_fraction",
        )
    print(f"\nsplit         {args.split}: {train_size:,} tokens to train on, {val_size:,} held out")
    warnings = [print_overlap(corpus, tokenizer, ids, train, val)]

    counted = ids
    part = val
    if len(ids) > MOST_COUNTED:
        pieces = sample(train, round(MOST_COUNTED * train_size / len(ids)))
        held_out = sample(val, round(MOST_COUNTED * val_size / len(ids)))
        counted = np.concatenate([ids[slice(*span)] for span in [*pieces, *held_out]])
        part = [(sum(stop - start for start, stop in pieces), len(counted))]
        print(f"sample        the rest is counted on {len(counted):,} tokens of the text")
    if args.split == "tail":
        end = compare_end(counted, tokenizer.vocab_size, (0, part[0][0]), part[0], args.block_size)
        print(
            f"the end       {end.end:.3f} nats per token for a {END_ORDER}-gram model; "
            f"{end.blocks:.3f} for blocks of the whole text; {min(end.others):.3f} to "
            f"{max(end.others):.3f} for other stretches"
        )
        warnings.append(end_message(end))
    print_entropies(corpus, tokenizer, ids, val, counted, part, args.order)
    for warning in filter(None, warnings):
        print(f"\nwarning: {warning}")


def print_characters(corpus: Corpus, found: Characters) -> None:
    counts, total = found.counts, found.total
    print(f"text          {corpus.name}")
    files = f"{len(corpus.files):,} file{'s' * (len(corpus.files) > 1)}"
    if any(file.field for file in corpus.files):
        files += f", {sum(n for n, _ in corpus.counted_chunks(1 << 22)):,} documents"
    files += listed("; left out: ", corpus.left_out)
    print(
        f"size          {total:,} characters, {found.utf8_bytes:,} bytes in UTF-8, "
        f"{found.lines:,} lines, {files}"
    )
    print(f"longest line  {found.longest:,} characters, line {found.longest_line:,}")
    frequent = [f"{c!r} {count / total:.1%}" for c, count in counts.items()]
    print(listed(f"characters    {len(counts):,} different: ", frequent, NAMED))
    scripts, letters = found.scripts(), sum(found.scripts().values())
    if scripts:
        shares = [f"{name.title()} {count / letters:.1%}" for name, count in scripts.items()]
        print(f"letters       {letters / total:.1%} of the text{listed(': ', shares)}")
    for name, chosen in (
        ("once", [c for c, count in counts.items() if count == 1]),
        ("2 to 9 times", [c for c, count in counts.items() if 1 < count < 10]),
    ):
        print(
            f"{name:<14}{listed(f'{len(chosen):,}: ', list(map(describe, chosen)), NAMED) or '0'}"
        )


def describe(c: str) -> str:
    """A character as U+0041 LATIN CAPITAL LETTER A."""
    return f"U+{ord(c):04X} {unicodedata.name(c, 'without a name')}"


def print_overlap(
    corpus: Corpus, tokenizer: Tokenizer, ids: np.ndarray, train: list[Span], val: list[Span]
) -> str:
    """Print what the validation part repeats; returns the warning, if any."""
    compared = sample(val, MOST_COMPARED)
    found = overlap(ids, train, compared)
    of = "" if compared is val else f" (a sample of {MOST_COMPARED:,})"
    print(
        f"repeated      {found.share:.2%} of the validation tokens{of} follow {PASSAGE} tokens "
        "that occur in the training part, too"
    )
    if found.length:
        text = tokenizer.decode(ids[found.val_start : found.val_start + min(found.length, 60)])
        places = [place(corpus, tokenizer, ids, at) for at in (found.val_start, found.train_start)]
        print(
            f"              the longest passage has {found.length:,} tokens: validation "
            f"{places[0]}, training {places[1]}: {text[:60]!r}"
        )
    return repeated_message(found)


def place(corpus: Corpus, tokenizer: Tokenizer, ids: np.ndarray, token: int) -> str:
    """The line of a token, as `line 12`, or `line 12 of FILE` if there are several files."""
    step = 1 << 20
    starts = range(0, token, step)
    line = sum(tokenizer.decode(ids[a : min(a + step, token)]).count("\n") for a in starts)
    if len(corpus.files) > 1:
        for file in corpus.files:
            text = count_characters(replace(corpus, files=(file,)).chunks())
            lines = text.counts.get("\n", 0) + corpus.separator.count("\n")
            if not corpus.separator:
                lines = text.lines  # each file ends with a line end
            if line < lines:
                return f"line {line + 1:,} of {file}"
            line -= lines
    return f"line {line + 1:,}"


def print_entropies(
    corpus: Corpus,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    val: list[Span],
    counted: np.ndarray,
    part: list[Span],
    order: int,
) -> None:
    """Print the losses of n-gram models on the validation part, and the floor if it is known.

    The models are counted on `counted`, which is `ids` or a sample of them, without `part`.
    """
    size = sum(stop - start for start, stop in part)
    characters = sum(tokenizer.count_characters(counted[slice(*span)]) for span in part)
    scale = size / max(1, characters)  # tokens per character
    entropies = ngram_entropies(counted, tokenizer.vocab_size, [part], order)[0] * scale
    print("\nloss on the validation part, in nats per character")
    print(f"uniform       {math.log(tokenizer.vocab_size) * scale:.4f}")
    for n, nats in enumerate(entropies, 1):
        print(f"{n}-gram        {nats:.4f}{'  the lowest' if nats == entropies.min() else ''}")
    if corpus.floor_path is not None:
        count = tokenizer.count_characters
        spans = [[count(ids[:n]) for n in (start + 1, stop)] for start, stop in val]
        floors = [corpus.floor(*span) for span in spans]
        floor = np.average(np.array(floors, float), weights=[b - a for a, b in spans])
        print(f"floor         {floor:.4f}  no model is better")
