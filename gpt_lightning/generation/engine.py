"""Token after token out of a model. The engine knows ids only, no text.

Legend: B samples side by side, T tokens so far, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model.attention import KVCache


@torch.inference_mode()
def generate(
    model: nn.Module,
    ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    stop: Sequence[Sequence[int]] = (),
) -> Iterator[list[int | None]]:
    """Continue B prompts, yielding each step's B new ids as soon as they are drawn.

    The prompt is read at once (prefill), then each new token costs one token's work: keys and
    values of those before it are kept. The model sees a window of at most `block_size` tokens,
    whose positions count from 0, learned and rotary ones alike. When the window is full, it starts
    anew with its last three quarters. So what a token is drawn from is always what the model says
    of a plain window, never of keys that still know what has been dropped; the lecture moves its
    window by one at every token, and computes all of it again.

    Args:
        model: ids (B, T) and a cache -> logits (B, T, V), with `config`; put in eval mode.
        ids: (B, T) int64, T at least 1.
        max_new_tokens: at most so many steps.
        sampling: how a token is drawn.
        generator: a CPU generator; its seed decides the text.
        stop: id sequences; a sample that has just written one of them ends with it.

    Yields:
        a list of B ids, None for samples that have ended. Ends when all have.
    """
    assert ids.ndim == 2 and ids.shape[1] > 0
    was_training = model.training
    model.eval()
    block_size, weight = model.config.block_size, next(model.parameters())
    keep = block_size * 3 // 4
    cache = KVCache(model.config, ids.shape[0], weight.device, weight.dtype)
    window = new = ids[:, -block_size:].to(weight.device)  # (B, T): what the model sees
    stop = [list(sequence) for sequence in stop]
    written: list[list[int]] = [[] for _ in range(ids.shape[0])]
    ended = [False] * len(written)
    try:
        for _ in range(max_new_tokens):
            logits = model(new, cache)[:, -1, :]  # (B, V)
            next_ids = sampling.sample(logits, generator)  # (B,)
            new = next_ids.to(weight.device)[:, None]
            if window.shape[1] == block_size:
                window = new = torch.cat([window[:, block_size - keep :], new], dim=1)
                cache.clear()
            else:
                window = torch.cat([window, new], dim=1)
            step = [None if end else i for end, i in zip(ended, next_ids.tolist(), strict=True)]
            for row, i in enumerate(step):
                if i is not None:
                    written[row].append(i)
                    ended[row] = any(written[row][-len(s) :] == s for s in stop)
            yield step
            if all(ended):
                return
    finally:
        model.train(was_training)
