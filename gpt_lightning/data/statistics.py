"""What a text is made of, before a model is trained: its characters, the passages that its training
and validation parts share, and the entropy that counted n-gram models reach.

Legend: N tokens of the text, P parts of it that are held out.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gpt_lightning.data.windows import Span, split_spans

# Long enough that a text of a gigabyte repeats hardly any by chance, shorter than a paragraph.
PASSAGE = 50
REPEATED = 0.1  # share of repeated validation positions that is reported; see docs/inspect.md
END_ORDER = 4  # of the n-gram model that compares the end with the rest
END_RATIO = 1.6  # of the end's entropy to the blocks' that is reported; see docs/inspect.md
MOST_CHECKED = 2_000_000  # tokens of a text that `fit` checks
PIECE = 100_000  # tokens of a sample that follow each other
CHUNK = 1 << 20  # training windows that are hashed at a time
MAX_PASSAGES = 1 << 23  # training windows kept for the search of the longest shared passage


# --- characters -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Characters:
    """The characters and lines of a text.

    Args:
        counts: how often each character occurs, the most frequent first.
        lines: number of lines; an unfinished last line is one.
        longest: characters in the longest line, without its line end.
        longest_line: number of that line, from 1.
    """

    counts: dict[str, int]
    lines: int
    longest: int
    longest_line: int

    @property
    def total(self) -> int:
        """Characters in the text."""
        return sum(self.counts.values())

    @property
    def utf8_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        sizes = {c: len(c.encode("utf-8", "surrogatepass")) for c in self.counts}
        return sum(sizes[c] * count for c, count in self.counts.items())

    def scripts(self) -> dict[str, int]:
        """Letters of each script, such as LATIN: the first word of a letter's Unicode name."""
        scripts: Counter[str] = Counter()
        for c, count in self.counts.items():
            if unicodedata.category(c).startswith("L"):
                scripts[unicodedata.name(c, "UNNAMED").split()[0]] += count
        return dict(scripts.most_common())


def count_characters(chunks: Iterable[str]) -> Characters:
    """Count the characters and lines of a text that comes in chunks; takes constant memory."""
    counts = np.zeros(0x110000, np.int64)
    total, lines, line_start, longest, longest_line = 0, 0, 0, -1, 0
    for chunk in chunks:
        codes = np.frombuffer(chunk.encode("utf-32-le", "surrogatepass"), "<u4")
        found = np.bincount(codes)
        counts[: len(found)] += found
        ends = total + np.flatnonzero(codes == ord("\n"))
        if len(ends):
            lengths = np.diff(ends, prepend=line_start - 1) - 1
            if lengths.max() > longest:
                longest, longest_line = int(lengths.max()), lines + int(lengths.argmax()) + 1
            lines, line_start = lines + len(ends), int(ends[-1]) + 1
        total += len(codes)
    if total > line_start:
        lines += 1
        if total - line_start > longest:
            longest, longest_line = total - line_start, lines
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
    return Characters({chr(c): int(counts[c]) for c in order}, lines, longest, longest_line)


# --- repeated passages ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """What the validation part repeats of the training part.

    Args:
        share: of the validation positions whose PASSAGE preceding tokens occur in the training
            part, too.
        length: tokens in the longest passage that both parts contain; 0 if there is none of at
            least PASSAGE tokens, or it was not searched.
        val_start, train_start: the first token of that passage in each part.
    """

    share: float
    length: int = 0
    val_start: int = 0
    train_start: int = 0


def overlap(
    ids: np.ndarray,
    train: list[Span],
    val: list[Span],
    find_longest: bool = True,
    length: int = PASSAGE,
) -> Overlap:
    """What the validation part repeats of the training part, by hashes of `length` tokens.

    Every reported repetition is compared token by token. One is missed only if two different
    passages have the same 64-bit hash, which for a gigabyte of text happens with a probability
    below 1e-2. Memory grows with the validation part only.

    Args:
        ids: (N,) the text.
        train, val: the spans of the two parts, in order; those of one part do not touch.
        find_longest: search the longest shared passage as well. If the training part has more
            than MAX_PASSAGES windows that are repeated, only the first of them are searched.
        length: tokens in a passage.
    """
    starts, hashes = _windows(ids, val, length)
    if not len(starts):
        return Overlap(0.0)
    known, index = np.unique(hashes, return_inverse=True)
    place = np.full(len(known), -1)  # where the training part has each of them
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for piece in _pieces(train, length):
        at, new = _windows(ids, [piece], length)
        found = np.minimum(np.searchsorted(known, new), len(known) - 1)
        hit = known[found] == new
        place[found[hit]] = at[hit]
        if find_longest and sum(len(a) for a, _ in kept) < MAX_PASSAGES:
            kept.append((at[hit], new[hit]))
    hit = _equal(ids, starts, place[index], length)
    # A window at the end of a span precedes no position of it.
    ends = np.array([stop - length for _, stop in val])
    precedes = ~np.isin(starts, ends)
    share = float(hit[precedes].mean()) if precedes.any() else 0.0
    if not find_longest or not hit.any():
        return Overlap(share)
    train_at, train_hashes = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
    sides = [(starts[hit], hashes[hit]), (train_at, train_hashes)]
    return Overlap(share, *_longest(sides, length))


def _pieces(spans: list[Span], length: int) -> Iterator[Span]:
    """The spans in pieces of CHUNK windows; neighboring pieces share `length` - 1 tokens."""
    for start, stop in spans:
        for first in range(start, stop - length + 1, CHUNK):
            yield first, min(stop, first + CHUNK + length - 1)


def _windows(ids: np.ndarray, spans: list[Span], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and hash of each window of `length` tokens within the spans: (W,) int64 and uint64."""
    spans = [(start, stop) for start, stop in spans if stop - start >= length]
    starts = [np.arange(start, stop - length + 1) for start, stop in spans]
    hashes = []
    for start, stop in spans:
        h, size = ids[start:stop].astype(np.uint64), 1
        while size < length:  # a window is the union of two, which may have tokens in common
            more = min(size, length - size)
            h = _mix(h[:-more], h[more:])
            size += more
        hashes.append(h)
    empty = [np.empty(0, np.int64)]
    return np.concatenate(starts or empty), np.concatenate(hashes or empty).astype(np.uint64)


def _mix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A uint64 hash of two, elementwise, by the multipliers of splitmix64.

    Not linear: sums of powers modulo 2**64 collide on regular texts (the Thue-Morse word).
    """
    h = (a + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    h ^= h >> np.uint64(32)
    h += b
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(29)
    return h


def _equal(ids: np.ndarray, a: np.ndarray, b: np.ndarray, length: int) -> np.ndarray:
    """Whether the windows that start at a (W,) and b (W,) are the same; not if b is -1."""
    same = b >= 0
    for part in np.array_split(np.flatnonzero(same), len(a) // (1 << 16) + 1):
        within = np.arange(length)
        same[part] = (ids[a[part, None] + within] == ids[b[part, None] + within]).all(1)
    return same


def _longest(sides: list[tuple[np.ndarray, np.ndarray]], length: int) -> tuple[int, int, int]:
    """Length and two starts of the longest shared passage, from the shared windows of `length`.

    Each side has the sorted starts of its windows and their hashes. A passage of `length + more`
    tokens is a window and the one `more` tokens further on. So the length is doubled while both
    sides have such a passage, and then found by bisection.
    """

    def longer(more: int) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for starts, hashes in sides:
            at = np.minimum(np.searchsorted(starts, starts + more), len(starts) - 1)
            both = starts[at] == starts + more
            found.append((starts[both], _mix(hashes[both], hashes[at[both]])))
        common = np.intersect1d(found[0][1], found[1][1])
        is_common = [np.isin(hashes, common) for _, hashes in found]
        return [(s[keep], h[keep]) for (s, h), keep in zip(found, is_common, strict=True)]

    while len((found := longer(length))[0][0]):
        sides, length = found, 2 * length
    best, low, high = sides, 0, length  # both have length + low, but not length + high
    while high - low > 1:
        middle = (low + high) // 2
        if len((found := longer(middle))[0][0]):
            best, low = found, middle
        else:
            high = middle
    (val_starts, val_hashes), (train_starts, train_hashes) = best
    train_start = train_starts[train_hashes == val_hashes[0]][0]
    return length + low, int(val_starts[0]), int(train_start)


# --- n-gram models --------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class End:
    """Entropies of the validation part and of other parts, in nats per token.

    Each part is held out from an n-gram model of END_ORDER that is counted on the rest.

    Args:
        end: of the validation part.
        blocks: of what `split="blocks"` holds out.
        others: of stretches of the training part as long as the validation part.
    """

    end: float
    blocks: float
    others: tuple[float, ...]

    @property
    def is_unlike(self) -> bool:
        """Whether the end is costlier than each other stretch and END_RATIO times the blocks."""
        return self.end > max(self.others) and self.end > END_RATIO * self.blocks


def compare_end(ids: np.ndarray, vocab_size: int, train: Span, val: Span, block_size: int) -> End:
    """Compare the validation part with the rest of the text.

    Args:
        ids: (N,) the text.
        vocab_size: number of different tokens.
        train, val: the two parts of a `tail` split; val has at least one token.
        block_size: for the split into blocks.
    """
    size, length = val[1] - val[0], train[1] - train[0]
    count = max(1, min(9, length // size))  # evenly spaced stretches of the training part
    stretch = min(size, length)
    starts = np.linspace(train[0], train[1] - stretch, count).astype(int).tolist()
    _, blocks = split_spans(len(ids), "blocks", size / len(ids), block_size)
    parts = [[val], blocks, *([(start, start + stretch)] for start in starts)]
    end, of_blocks, *others = ngram_entropies(ids, vocab_size, parts, END_ORDER)[:, -1].tolist()
    return End(end, of_blocks, tuple(others))


# --- what is reported -----------------------------------------------------------------------------


def repeated_message(found: Overlap) -> str:
    """A sentence about repetitions, if they are many; otherwise ""."""
    if found.share < REPEATED:
        return ""
    return (
        f"{found.share:.0%} of the validation text repeats passages of the training text: the "
        "validation loss is lower than the loss on new text"
    )


def end_message(found: End) -> str:
    """A sentence about a validation part unlike the rest; "" if it is like it."""
    if not found.is_unlike:
        return ""
    return (
        f"the end of the text, the validation part, is unlike the rest: a {END_ORDER}-gram model "
        f"needs {found.end / found.blocks:.1f} times the nats of blocks spread over the text; try "
        "--data.split=blocks"
    )


def split_messages(
    ids: np.ndarray, vocab_size: int, train: list[Span], val: list[Span], block_size: int
) -> list[str]:
    """What a user should know about the two parts before training; [] for a clean text.

    Takes less than a second for a million tokens. Longer texts than MOST_CHECKED are not checked.
    """
    if len(ids) > MOST_CHECKED:
        return []
    messages = [repeated_message(overlap(ids, train, val, find_longest=False))]
    if len(train) == 1:  # the split is "tail"
        messages.append(end_message(compare_end(ids, vocab_size, train[0], val[0], block_size)))
    return [message for message in messages if message]


def sample(spans: list[Span], most: int) -> list[Span]:
    """About `most` tokens of the spans, in evenly spaced pieces of about PIECE tokens, in order."""
    total = sum(stop - start for start, stop in spans)
    if total <= most:
        return spans
    kept = []
    for start, stop in spans:
        n = max(1, round((stop - start) * most / total / PIECE))
        size = int((stop - start) * most / total / n)
        middles = start + (np.arange(n) + 0.5) * ((stop - start) / n)
        kept += [(first, first + size) for first in (middles - size / 2).astype(int).tolist()]
    return kept
