"""Where windows start in the token stream, as a pure function of the window's number.

Training is one endless row of windows, numbered from 0. Batch `i` of `world_size` processes is the
windows [i * B * world_size, (i + 1) * B * world_size), of which each rank takes its own B. So a
batch depends on (seed, i, rank) alone: there is no sampler state to save, and a resumed run goes
on with exactly the windows that the uninterrupted one would have seen.

Legend: B batch, T block_size, N windows asked for.
"""

import numpy as np

Span = tuple[int, int]  # tokens [start, stop) of one uninterrupted piece of text


def _hash64(*keys: int | np.ndarray) -> np.ndarray:
    """Mix integers into uniform uint64s, elementwise (the finaliser of splitmix64, chained).

    Our own because it must be the same on every platform and numpy version, vectorised over the
    counter, and free of per-call set-up: a numpy Generator costs 20 microseconds to seed.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = state + np.asarray(key, np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _uniform(below: int | np.ndarray, *keys: int | np.ndarray) -> np.ndarray:
    """Uniform integers in [0, below), one for each key. Below 2**53; the bias is below 2**-11."""
    fraction = (_hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (fraction * below).astype(np.int64)


def permute(index: np.ndarray, n: int, *keys: int | np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of [0, n), evaluated at `index` only (constant memory).

    Args:
        index: (N,) int64 in [0, n).
        n: size of the permuted range.
        keys: choose the permutation; integers or (N,) arrays (one permutation for each element).

    A four-round Feistel network permutes the next power of four; walking its cycle until it falls
    below n restricts that to [0, n) (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"). An array shuffled in memory would take 8 bytes a window: 125 MB for 2 GB of text.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = tuple(np.broadcast_to(np.asarray(key, np.int64), index.shape) for key in keys)
    out = index.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):  # fewer than 4 walks on average, since n is above a quarter of 4**half
        left, right = out[outside] >> np.uint64(half), out[outside] & mask
        for round_ in range(4):
            mixed = _hash64(*(key[outside] for key in keys), round_, right.astype(np.int64))
            left, right = right, left ^ (mixed & mask)
        out[outside] = (left << np.uint64(half)) | right
        outside = outside[out[outside] >= np.uint64(n)]
    return out.astype(np.int64)


class SlidingWindows:
    """Every window at a stride, each once an epoch, shuffled; a fresh phase each epoch.

    With the default stride of `block_size` an epoch visits every character once, and over epochs
    every character is seen at every place in a window. That is the answer to the lecture notes'
    question how real batches cover the data: the random phase of d2l.ai's sequential iterator,
    shuffled. The phase costs at most `block_size + stride` characters at the ends of each span,
    other ones in each epoch.

    Args:
        spans: the pieces of text that windows may not leave.
        block_size: T; a window is T inputs and T targets, so T + 1 tokens.
        stride: distance of neighbouring windows; 1 makes every window there is.
        seed: with the epoch's number it chooses phase and order.

    Raises:
        ValueError: if no span holds a window, or the stride is not positive.
    """

    def __init__(self, spans: list[Span], block_size: int, stride: int, seed: int):
        if stride < 1:
            raise ValueError(f"--data.stride={stride} must be at least 1")
        self.spans = _roomy(spans, block_size)
        self.stride, self.seed = stride, seed
        last = np.array([stop - block_size - 1 - start for start, stop in self.spans], np.int64)
        self.slack = np.minimum(stride - 1, last)  # how far the phase may shift each span's first
        self.counts = (last - self.slack) // stride + 1  # the same at every phase
        self.ends = np.cumsum(self.counts)
        self.firsts = np.array([start for start, _ in self.spans], np.int64)

    def __len__(self) -> int:
        """Windows in one epoch."""
        return int(self.ends[-1])

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Start token of each window: (N,) int64 window numbers -> (N,) int64."""
        epoch, index = np.divmod(numbers, len(self))
        index = permute(index, len(self), self.seed, epoch)
        span = np.searchsorted(self.ends, index, side="right")
        index = index - (self.ends - self.counts)[span]
        phase = _uniform(self.slack[span] + 1, self.seed, epoch, -1)
        return self.firsts[span] + phase + index * self.stride


class RandomWindows:
    """The lecture's `get_batch`: starts drawn uniformly with replacement.

    The arguments are those of `SlidingWindows`; `len` counts the non-overlapping windows, so that
    an epoch means the same number of characters under both.
    """

    def __init__(self, spans: list[Span], block_size: int, seed: int):
        self.spans = _roomy(spans, block_size)
        self.seed, self.block_size = seed, block_size
        room = np.array([stop - start - block_size for start, stop in self.spans], np.int64)
        self.ends = np.cumsum(room)
        self.firsts = np.array([start for start, _ in self.spans], np.int64)

    def __len__(self) -> int:
        return sum((stop - start - 1) // self.block_size for start, stop in self.spans)

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Start token of each window: (N,) int64 window numbers -> (N,) int64."""
        index = _uniform(int(self.ends[-1]), self.seed, numbers)
        span = np.searchsorted(self.ends, index, side="right")
        return self.firsts[span] + index - np.concatenate([[0], self.ends])[span]


def _roomy(spans: list[Span], block_size: int) -> list[Span]:
    spans = [(start, stop) for start, stop in spans if stop - start > block_size]
    if not spans:
        raise ValueError(f"no piece of the text holds a window of {block_size} + 1 tokens")
    return spans


def split_spans(
    length: int, split: str, fraction: float, block_size: int
) -> tuple[list[Span], list[Span]]:
    """Cut [0, length) into training and validation spans, which never overlap.

    Args:
        length: tokens in the text.
        split: `tail` holds out the last `fraction` (the lecture's). `blocks` holds out pieces
            spread evenly through the text, for a text whose end differs from its beginning, as
            plays in order do.
        fraction: how much is held out, between 0 and 1.
        block_size: T; each held-out block is long enough for about 16 windows, if there is room.

    Returns:
        (training spans, validation spans), each [(start, stop), ...] in order.

    Raises:
        ValueError: for another split, a fraction outside (0, 1), or parts too short for a window.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--data.val_fraction={fraction} must lie between 0 and 1")
    held_out = length - int(length * (1 - fraction))
    if split == "tail":
        train, val = [(0, length - held_out)], [(length - held_out, length)]
    elif split == "blocks":
        n = max(1, min(20, held_out // (16 * (block_size + 1))))
        # n equal stretches of the text, each with its held-out block in the middle
        edges = [length * i // n for i in range(n + 1)]
        sizes = [held_out * (i + 1) // n - held_out * i // n for i in range(n)]
        middles = [(a + b - size) // 2 for a, b, size in zip(edges, edges[1:], sizes, strict=False)]
        val = [(middle, middle + size) for middle, size in zip(middles, sizes, strict=True)]
        train = list(zip([0] + [b for _, b in val], [a for a, _ in val] + [length], strict=True))
    else:
        raise ValueError(f"--data.split={split} is unknown; choose tail or blocks")
    for name, spans in (("training", train), ("validation", val)):
        longest = max(stop - start for start, stop in spans)
        if longest <= block_size:
            raise ValueError(
                f"the text has {length:,} tokens, so its longest {name} part has {longest:,}: too "
                f"short for one window of --data.block_size={block_size} (+ 1); give more text or "
                "a smaller block_size"
            )
    return train, val


def first_tokens(spans: list[Span], most: int) -> list[Span]:
    """The first `most` tokens of `spans`; a last one by itself, which nothing predicts, is left."""
    kept = []
    for start, stop in spans:
        stop = min(stop, start + most)
        most -= stop - start
        if stop - start > 1:
            kept.append((start, stop))
    return kept


class ExactWindows:
    """Windows in which each token of each span but its first is predicted exactly once.

    `len` and `starts` are of those of `block_size`; `short` lists (start, length) of the others,
    at most one a span, at its end.
    """

    def __init__(self, spans: list[Span], block_size: int):
        self.block_size = block_size
        targets = np.array([max(0, stop - start - 1) for start, stop in spans], np.int64)
        self.firsts = np.array([start for start, _ in spans], np.int64)
        self.counts, rests = np.divmod(targets, block_size)
        self.ends = np.cumsum(self.counts)
        at = self.firsts + self.counts * block_size
        self.short = [
            (int(start), int(rest)) for start, rest in zip(at, rests, strict=True) if rest
        ]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Start token of each window: (N,) int64 window numbers -> (N,) int64."""
        span = np.searchsorted(self.ends, numbers, side="right")
        return self.firsts[span] + (numbers - (self.ends - self.counts)[span]) * self.block_size
