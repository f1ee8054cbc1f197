"""`inspect`: what a text is made of, before a model is trained on it."""

import argparse
import math
import unicodedata
from collections import Counter
from dataclasses import replace

import numpy as np

from gpt_lightning.commands.common import Parser, add_corpus_flags, corpus_of, errors_name_flags
from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.documents import corpus_error, listed
from gpt_lightning.data.statistics import (
    END_ORDER,
    PASSAGE,
    end_message,
    ngram_entropies,
    repeated_message,
    repeated_passages,
)
from gpt_lightning.data.tokenizers import KINDS, Tokenizer
from gpt_lightning.data.tokens import TokenizerSettings, floor_of_spans, prepare_tokens
from gpt_lightning.data.windows import SPLITS, Span, first_tokens, split_spans
from gpt_lightning.errors import UserError

BLOCK_SIZE = 128  # for the split into blocks
ORDER = 6  # of the largest n-gram model
MOST_COMPARED = 1_000_000  # validation tokens that are looked for in the training part
MOST_COUNTED = 10_000_000  # tokens for the n-gram models: 0.8 GB of memory
PIECE = 100_000  # tokens of a longer text that are counted together
RARE = 10  # occurrences below which a character is rare
NAMED = 12  # characters that are listed
SHOWN = 3  # passages that are printed


def inspect_parser() -> Parser:
    parser = Parser(
        prog="python -m gpt_lightning inspect",
        description="Report what a text is made of: its characters, passages that its validation "
        "part repeats, whether its end is like the rest, and the loss of counted n-gram models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    corpus_help = "a file, a folder, a URL, tinyshakespeare or playwright"
    add("corpus", nargs="?", default="playwright", metavar="NAME", help=corpus_help)
    add_corpus_flags(parser)
    add("--tokenizer", choices=KINDS, default="char", help="what a token is")
    add("--split", choices=SPLITS, default="tail", help="the validation part: the end, or blocks")
    val_help = "share of the text that is held out"
    add("--val_fraction", type=float, default=0.1, metavar="X", help=val_help)
    return parser


def main(argv: list[str]) -> None:
    """From flags to a report on standard output."""
    args = inspect_parser().parse_args(argv)
    with errors_name_flags(args) as flags:
        del flags["corpus"]  # it has no flag
        report(args)


def report(args: argparse.Namespace) -> None:
    if not 0 < args.val_fraction < 1:
        raise UserError(f"val_fraction={args.val_fraction} must be above 0 and below 1")
    corpus = corpus_of(args.corpus, vars(args))
    file = prepare_tokens(corpus, TokenizerSettings(args.tokenizer))
    ids, tokenizer = file.ids, file.tokenizer
    train, val = split_spans(len(ids), args.split, args.val_fraction, BLOCK_SIZE)
    if not size(train) or size(val) < 2:
        raise corpus_error(
            corpus.name,
            f" has {len(ids):,} tokens, too few to hold out val_fraction={args.val_fraction} of "
            "them; give more text or another val_fraction",
        )
    print_characters(corpus, file.documents)
    print(
        f"\nsplit         {args.split}: {size(train):,} tokens to train on, {size(val):,} held out"
    )
    warnings = [print_repeated(corpus, tokenizer, ids, train, val)]

    counted = sample(ids)
    parts = [
        split_spans(len(counted), split, args.val_fraction, BLOCK_SIZE)[1]
        for split in (args.split, "blocks")
    ]
    own, of_blocks = ngram_entropies(counted, tokenizer.vocab_size, parts, ORDER)
    if len(counted) < len(ids):
        print(f"sample        the rest is counted on {len(counted):,} tokens of the text")
    if args.split == "tail":
        end, blocks = own[END_ORDER - 1], of_blocks[END_ORDER - 1]
        print(
            f"the end       {end:.3f} nats per token for a {END_ORDER}-gram model; "
            f"{blocks:.3f} for blocks of the whole text"
        )
        warnings.append(end_message(end, blocks))

    held_out = np.concatenate([counted[start:stop] for start, stop in parts[0]])
    scale = len(held_out) / tokenizer.count_characters(held_out)  # tokens per character
    print("\nloss on the validation part, in nats per character")
    print(f"uniform       {math.log(tokenizer.vocab_size) * scale:.4f}")
    for n, nats in enumerate(own * scale, 1):
        print(f"{n}-gram        {nats:.4f}")
    if (floor := floor_of_spans(corpus, tokenizer, ids, val)) is not None:
        print(f"floor         {floor:.4f}  no model is better")
    for warning in filter(None, warnings):
        print(f"\nwarning: {warning}")


def size(spans: list[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def sample(ids: np.ndarray) -> np.ndarray:
    """The text, or evenly spread pieces of one that has more than MOST_COUNTED tokens."""
    pieces = [ids[start : start + PIECE] for start in range(0, len(ids), PIECE)]
    return np.concatenate(pieces[:: math.ceil(len(ids) / MOST_COUNTED)])


def print_characters(corpus: Corpus, documents: int) -> None:
    counts: Counter[str] = Counter()
    for chunk in corpus.chunks():
        counts.update(chunk)
    total, lines = counts.total(), counts["\n"] + (not chunk.endswith("\n"))
    in_utf8 = sum(len(c.encode("utf-8", "surrogatepass")) * n for c, n in counts.items())
    print(f"text          {corpus.name}")
    print(
        f"size          {total:,} characters, {in_utf8:,} bytes in UTF-8, {lines:,} lines, "
        f"files: {len(corpus.files):,}, documents: {documents:,}"
        + listed("; left out: ", corpus.left_out)
    )
    frequent = [f"{c!r} {n / total:.1%}" for c, n in counts.most_common()]
    print(listed(f"characters    {len(counts):,} different: ", frequent, NAMED))
    rare = [
        f"{n} U+{ord(c):04X} {unicodedata.name(c, 'without a name')}"
        for c, n in reversed(counts.most_common())
        if n < RARE
    ]
    print(f"rare          {len(rare):,} occur less than {RARE} times" + listed(": ", rare, NAMED))


def print_repeated(
    corpus: Corpus, tokenizer: Tokenizer, ids: np.ndarray, train: list[Span], val: list[Span]
) -> str:
    """Print what the validation part repeats; returns the warning, if any."""
    compared = first_tokens(val, MOST_COMPARED)
    passages, share = repeated_passages(ids, train, compared)
    print(
        f"repeated      {share:.2%} of the passages of {PASSAGE} tokens in {size(compared):,} "
        "validation tokens are in the training part, too"
    )
    for length, val_start, train_start in sorted(passages, reverse=True)[:SHOWN]:
        text = tokenizer.decode(ids[val_start : val_start + min(length, 60)])
        places = [place(corpus, tokenizer, ids, start) for start in (val_start, train_start)]
        print(f"{length:>7,} tokens: validation {places[0]}, training {places[1]}: {text[:60]!r}")
    return repeated_message(share)


def place(corpus: Corpus, tokenizer: Tokenizer, ids: np.ndarray, token: int) -> str:
    """The line of a token, and its file if there are several."""
    line = tokenizer.decode(ids[:token]).count("\n") + 1
    for file in corpus.files:
        text = "".join(replace(corpus, files=(file,)).chunks())
        between = corpus.separator or ("" if text.endswith("\n") else "\n")
        lines = (text + between).count("\n")
        if line <= lines:
            break
        line -= lines
    return f"line {line:,}" + (f" of {file}" if len(corpus.files) > 1 else "")
