"""What the two parts of a split have in common: passages of the training part that the validation
part repeats, and the entropy of counted n-gram models, which also tells whether the end of a text
is like the rest.

Legend: N tokens of the text, P parts of it that are held out.
"""

from typing import NamedTuple

import numpy as np

from gpt_lightning.data.windows import Span, split_spans

# Long enough that a text of a gigabyte repeats hardly any by chance, shorter than a paragraph.
PASSAGE = 50
REPEATED = 0.1  # share of repeated windows that is reported; see docs/inspect.md
END_ORDER = 4  # of the n-gram model that compares the end with the rest
END_RATIO = 1.8  # of the end's entropy to the blocks' that is reported; see docs/inspect.md
MOST_CHECKED = 2_000_000  # tokens of both parts that `fit` checks


class Passage(NamedTuple):
    """Tokens that both parts have: how many, and the first of them in each part."""

    length: int
    val_start: int
    train_start: int


def repeated_passages(
    ids: np.ndarray, train: list[Span], val: list[Span], shortest: int = PASSAGE
) -> tuple[list[Passage], float]:
    """Passages of the validation part that the training part has, too, and their share.

    The share is that of the windows of `shortest` tokens. A passage is what follows its first
    window both here and at the first place of that window in the training part.
    Memory is about 200 bytes for each token of the validation part.

    Args:
        ids: (N,) the text.
        train, val: the spans of the two parts.
        shortest: tokens of a window, and of the shortest passage.
    """
    raw, size = ids.tobytes(), ids.itemsize

    def starts(span: Span) -> range:
        return range(span[0], span[1] - shortest + 1)

    def window(start: int) -> bytes:
        return raw[start * size : (start + shortest) * size]

    # where the training part has each window of the validation part, and the end of that span
    places: dict[bytes, Span | None] = {window(i): None for span in val for i in starts(span)}
    for span in train:
        for i in starts(span):
            if places.get(tokens := window(i), span) is None:
                places[tokens] = (i, span[1])
    found = []
    for start, stop in val:
        i = start
        while i + shortest <= stop:
            if (place := places[window(i)]) is None:
                i += 1
                continue
            (at, train_stop), length = place, shortest
            most = min(stop - i, train_stop - at)
            while length < most and ids[i + length] == ids[at + length]:
                length += 1
            found.append(Passage(length, i, at))
            i += length - shortest + 1  # another passage may begin within this one
    windows = sum(len(starts(span)) for span in val)
    return found, sum(p.length - shortest + 1 for p in found) / max(1, windows)


def ngram_entropies(
    ids: np.ndarray, vocab_size: int, parts: list[list[Span]], order: int
) -> np.ndarray:
    """Entropy of each part under n-gram models that are counted on the rest of the text.

    The models are interpolated by Witten and Bell's rule (1991), which has no parameter. With
    N(h) tokens after the context h in the rest of the text, D(h) of them distinct,

        P(c | h) = (N(hc) + D(h) P(c | h without its first token)) / (N(h) + D(h)),

    and P(c) is mixed with 1 / vocab_size in the same way. Context reaches back beyond the start of
    a span. Memory is about 80 bytes a token.

    Args:
        ids: (N,) the text.
        vocab_size: number of different tokens.
        parts: what is held out, each as a list of spans.
        order: of the largest model; its context has `order` - 1 tokens.

    Returns:
        (P, order) nats per token, of the orders 1, 2, ..., `order`.
    """
    held_out = [np.concatenate([np.arange(*span) for span in spans]) for spans in parts]
    probability = [np.full(len(at), 1 / vocab_size) for at in held_out]
    entropies = np.empty((len(parts), order))
    # ngram: (N,) number of the n-gram that ends at each token; context: of each n-gram, the number
    # of its first n - 1 tokens
    ngram, context = ids.astype(np.int64), np.zeros(vocab_size, np.int64)
    for n in range(order):
        if n:
            ngram[1:] = ngram[:-1]
            ngram[0] = len(context)  # the start of the text is a context of its own
            ngram = ngram * vocab_size + ids
            distinct, ngram = np.unique(ngram, return_inverse=True)
            context = distinct // vocab_size
        total = np.bincount(ngram, minlength=len(context))
        for i, at in enumerate(held_out):
            own = ngram[at]
            counts = total - np.bincount(own, minlength=len(total))
            tokens = np.bincount(context, counts)[context[own]]  # N(h)
            followers = np.bincount(context, counts > 0)[context[own]]  # D(h)
            mixed = counts[own] + followers * probability[i]
            seen = tokens > 0
            probability[i][seen] = mixed[seen] / (tokens + followers)[seen]
            entropies[i, n] = -np.log(probability[i]).mean()
    return entropies


def repeated_message(share: float) -> str:
    """A warning if the validation part repeats much of the training part; otherwise ""."""
    if share < REPEATED:
        return ""
    return (
        f"{share:.0%} of the validation text repeats passages of the training text: the "
        "validation loss is lower than the loss on new text"
    )


def end_message(end: float, blocks: float) -> str:
    """A warning if the end of the text is unlike the rest; otherwise "".

    `end` and `blocks` are the entropies of what the splits "tail" and "blocks" hold out.
    """
    if end <= END_RATIO * blocks:
        return ""
    return (
        f"the end of the text, the validation part, is unlike the rest: a {END_ORDER}-gram model "
        f"needs {end / blocks:.1f} times the nats of blocks spread over the text; try "
        "--data.split=blocks"
    )


def split_messages(
    ids: np.ndarray,
    vocab_size: int,
    train: list[Span],
    val: list[Span],
    block_size: int,
    is_tail: bool,
) -> list[str]:
    """Warnings about a split before training. A text of a million tokens takes about a second.

    Args:
        ids: (N,) the text.
        vocab_size: number of different tokens.
        train, val: the spans of the two parts.
        block_size: for the comparison with the split into blocks.
        is_tail: whether `val` is the end of one text.
    """
    messages = [repeated_message(repeated_passages(ids, train, val)[1])]
    if is_tail:
        share = 1 - train[0][1] / len(ids)
        blocks = split_spans(len(ids), "blocks", share, block_size)[1]
        end, spread = ngram_entropies(ids, vocab_size, [val, blocks], END_ORDER)[:, -1]
        messages.append(end_message(end, spread))
    return [message for message in messages if message]
