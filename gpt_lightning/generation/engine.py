"""Token after token out of a model. The engine knows ids only, no text.

Legend: B samples side by side, T tokens so far, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gpt_lightning.generation.sampling import Sampling


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

    As in the lecture, the model sees the last `block_size` tokens, at positions from 0.

    Args:
        model: ids (B, T) -> logits (B, T, V), with `config.block_size`; put in eval mode.
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
    device = next(model.parameters()).device
    ids = ids.to(device)
    stop = [list(sequence) for sequence in stop]
    written: list[list[int]] = [[] for _ in range(ids.shape[0])]
    ended = [False] * len(written)
    try:
        for _ in range(max_new_tokens):
            context = ids[:, -model.config.block_size :]  # (B, T)
            logits = model(context)[:, -1, :]  # (B, V)
            next_ids = sampling.sample(logits, generator)  # (B,)
            ids = torch.cat([context, next_ids.to(device)[:, None]], dim=1)
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
