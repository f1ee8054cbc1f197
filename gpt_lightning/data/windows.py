"""Where windows start in the token stream, as a pure function of the window's number.

Training windows are numbered from 0 without end. Batch i of `world_size` processes has the windows
[i * B * world_size, (i + 1) * B * world_size), of which each rank takes B. So a batch depends on
(seed, i, rank) alone: there is no sampler state to save, and a resumed run continues with the
windows that the uninterrupted run would have used.

Legend: B batch, T block_size, N windows asked for.
"""

from collections.abc import Iterator

import numpy as np

Span = tuple[int, int]  # tokens [start, stop) of one uninterrupted piece of text
SPLITS = ("tail", "blocks")
# Without gradients, on a CPU and on a GPU
TOKENS_CPU, TOKENS_GPU = 1 << 11, 1 << 16  # of a batch
LOGITS = 1 << 26  # of a batch at most: 256 MB in fp32


def _hash64(*keys: int | np.ndarray) -> np.ndarray:
    """Mix integers into uniform uint64s, elementwise (the finaliser of splitmix64, chained).

    Unlike numpy's generators it is the same in every version, is vectorised over the counter, and
    needs no set-up per call.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = state + np.asarray(key, np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _uniform(below: int | np.ndarray, *keys: int | np.ndarray) -> np.ndarray:
    """Uniform integers in [0, below), one for each key; for `below` up to 2**53."""
    fraction = (_hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (fraction * below).astype(np.int64)


def permute(index: np.ndarray, n: int, *keys: int | np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of [0, n), evaluated only at `index`, in constant memory.

    Args:
        index: (N,) int64 in [0, n).
        n: size of the permuted range.
        keys: choose the permutation; integers or (N,) arrays (a permutation for each element).

    A four-round Feistel network permutes the next power of four. Applying it again until the
    result is below n restricts it to [0, n) (Black and Rogaway 2002, "Ciphers with Arbitrary
    Finite Domains").
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = tuple(np.broadcast_to(np.asarray(key, np.int64), index.shape) for key in keys)
    out = index.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):  # fewer than 4 rounds on average: n is more than a quarter of 4**half
        left, right = out[outside] >> np.uint64(half), out[outside] & mask
        for round_ in range(4):
            mixed = _hash64(*(key[outside] for key in keys), round_, right.astype(np.int64))
            left, right = right, left ^ (mixed & mask)
        out[outside] = (left << np.uint64(half)) | right
        outside = outside[out[outside] >= np.uint64(n)]
    return out.astype(np.int64)


class SlidingWindows:
    """Windows at a fixed stride, each once per epoch, in random order.

    In each epoch a new random offset, the phase, shifts all windows of a span, as in d2l.ai's
    sequential iterator. With a stride of `block_size`, an epoch visits every character once, except
    at most `block_size + stride` characters at the ends of each span. Each epoch leaves out
    different ones.

    Args:
        spans: the pieces of text; no window reaches beyond one.
        block_size: T; a window is T inputs and T targets, so T + 1 tokens.
        stride: distance between the starts of neighboring windows.
        seed: chooses, with the epoch's number, phase and order.
    """

    def __init__(self, spans: list[Span], block_size: int, stride: int, seed: int):
        self.stride, self.seed = stride, seed
        self.firsts, starts = _possible_starts(spans, block_size)
        self.slack = np.minimum(stride, starts) - 1  # largest phase of each span
        self.counts = (starts - 1 - self.slack) // stride + 1  # the same for every phase

    def __len__(self) -> int:
        """Windows in one epoch."""
        return int(self.counts.sum())

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Start token of each window: (N,) int64 window numbers -> (N,) int64."""
        epoch, index = np.divmod(numbers, len(self))
        span, index = _locate(permute(index, len(self), self.seed, epoch), self.counts)
        phase = _uniform(self.slack[span] + 1, self.seed, epoch, -1)
        return self.firsts[span] + phase + index * self.stride


class RandomWindows:
    """The lecture's `get_batch`: starts drawn uniformly with replacement.

    Arguments as for `SlidingWindows`. The length is the number of windows that do not overlap, so
    that an epoch has about the same number of characters for both.
    """

    def __init__(self, spans: list[Span], block_size: int, seed: int):
        self.seed, self.block_size = seed, block_size
        self.firsts, self.counts = _possible_starts(spans, block_size)

    def __len__(self) -> int:
        return int(((self.counts + self.block_size - 1) // self.block_size).sum())

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Start token of each window: (N,) int64 window numbers -> (N,) int64."""
        index = _uniform(int(self.counts.sum()), self.seed, numbers)
        span, index = _locate(index, self.counts)
        return self.firsts[span] + index


def _possible_starts(spans: list[Span], block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """First start and number of starts of windows, for each span that holds one."""
    spans = [(start, stop) for start, stop in spans if stop - start > block_size]
    firsts = np.array([start for start, _ in spans], np.int64)
    return firsts, np.array([stop - start - block_size for start, stop in spans], np.int64)


def _locate(index: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The span of each index into all windows, and its index within the span."""
    ends = np.cumsum(counts)
    span = np.searchsorted(ends, index, side="right")
    return span, index - (ends - counts)[span]


def split_spans(
    length: int, split: str, fraction: float, block_size: int
) -> tuple[list[Span], list[Span]]:
    """Split the tokens [0, length) into training and validation spans that do not overlap.

    Args:
        length: tokens in the text.
        split: "tail" holds out the last `fraction` (as the lecture does). "blocks" holds out up to
            20 pieces spread evenly through the text, for a text whose end differs from its start.
        fraction: the share that is held out, in (0, 1].
        block_size: T; each held-out block has at least 16 windows if the text is long enough.

    Returns:
        training spans and validation spans, each [(start, stop), ...] in order.
    """
    held_out = length - int(length * (1 - fraction))
    if split == "tail":
        return [(0, length - held_out)], [(length - held_out, length)]
    n = max(1, min(20, held_out // (16 * (block_size + 1))))
    val = []
    for i in range(n):  # n equal parts of the text, each with its held-out block in the middle
        begin, end = length * i // n, length * (i + 1) // n
        size = min(held_out * (i + 1) // n - held_out * i // n, end - begin)
        start = (begin + end - size) // 2
        val.append((start, start + size))
    starts, stops = zip(*val, strict=True)
    return list(zip((0, *stops), (*starts, length), strict=True)), val


def first_tokens(spans: list[Span], most: int) -> list[Span]:
    """Spans of the first `most` tokens of `spans`; a single token at the end is left out."""
    kept = []
    for start, stop in spans:
        stop = min(stop, start + most)
        most -= stop - start
        if stop - start > 1:
            kept.append((start, stop))
    return kept


def exact_windows(
    spans: list[Span], block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Windows that together predict each token of each span, except its first, exactly once.

    They do not overlap with a stride of `block_size`. The last window of a span may be shorter; it
    is a batch of its own.

    Yields for each batch the first token of each window (B,), the length T of the windows, and the
    number of their first predictions that an earlier window has already made.
    """
    for start, stop in spans:
        targets, done = stop - start - 1, 0
        while done < targets:
            overlap = min(block_size - stride, done)
            length = min(block_size, overlap + targets - done)
            new = length - overlap
            alone = done == 0 and stride < block_size  # only the first window has no overlap
            count = 1 if alone else min(batch_size, (targets - done) // new)
            yield start + done - overlap + new * np.arange(count), length, overlap
            done += count * new


def windows_without_gradients(block_size: int, vocab_size: int, device_type: str) -> int:
    """How many windows to compute at once: the logits (B, T, V) need the most memory."""
    tokens = TOKENS_CPU if device_type == "cpu" else TOKENS_GPU
    return max(1, min(tokens, LOGITS // vocab_size) // block_size)
