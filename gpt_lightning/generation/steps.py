"""One step of generation: the next token of each text. On a CUDA GPU, a step is a CUDA graph.

Legend: B samples, T tokens of the window, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model.attention import KVCache


class Steps:
    """Continues B texts by one token a call.

    The model sees a window of at most `block_size` tokens. A full window restarts with its last
    three quarters and the new token, so that keys and values are computed again once in
    `block_size / 4` tokens.

    Args:
        model: (ids (B, T), cache) -> logits (B, T, V).
        prompt: (B, T) int64, T at least 1; the last `block_size` tokens count.
        banned: (B, V) bool, tokens that must not be drawn; may change between calls.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: torch.Tensor,
        sampling: Sampling,
        banned: torch.Tensor | None = None,
    ):
        self.model, self.sampling, self.banned = model, sampling, banned
        config: Any = model.config
        self.block_size: int = config.block_size
        self.restart_length = self.block_size * 3 // 4 + 1
        self.cache = KVCache(self.block_size)
        device = next(model.parameters()).device
        # one more place than the model sees, for the token after a full window
        self.window = torch.empty(len(prompt), self.block_size + 1, dtype=torch.long, device=device)
        self.uniform = torch.empty(len(prompt), device=device)
        self.start(prompt[:, -self.block_size :])

    def start(self, ids: torch.Tensor) -> None:
        """Begin a window with ids (B, T)."""
        self.length, self.cache.length = ids.shape[1], 0
        self.window[:, : self.length] = ids
        # The repetition penalty reads the whole tensor: unused places repeat a token of the window.
        self.window[:, self.length :] = ids[:, :1]

    def __call__(self, uniform: torch.Tensor) -> torch.Tensor:
        """The next token of each text (B,), see `Sampling.sample`; `uniform` (B,) decides it."""
        if self.length > self.block_size:
            self.start(self.window[:, -self.restart_length :].clone())
        self.uniform.copy_(uniform)
        ids = self.compute()
        self.cache.length = self.length
        self.length += 1
        return ids

    def compute(self) -> torch.Tensor:
        """The next token of each text (B,), which it also appends to the window."""
        logits = self.model(self.window[:, : self.length], self.cache)[:, -1]  # (B, V)
        ids = self.sampling.sample(logits, self.uniform, self.window, self.banned)
        self.window[:, self.length] = ids
        return ids


class GraphSteps(Steps):
    """Steps whose tensors have the same shapes and addresses for every token, as CUDA graphs.

    Launching the kernels of a step takes the CPU longer than the GPU computes one token. A graph is
    one launch. There are two: for one new token, and for a window that restarts.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.position = torch.zeros(1, dtype=torch.long, device=self.window.device)
        self.one_token, self.restart = (Recorded(self.window.device) for _ in range(2))

    def compute(self) -> torch.Tensor:
        if self.cache.length > 0:
            self.position.fill_(self.length - 1)
            return self.one_token(self.compute_one)
        if self.length == self.restart_length:
            return self.restart(super().compute)
        return super().compute()

    def compute_one(self) -> torch.Tensor:
        """Like `compute`, for the one new token at `position`."""
        self.cache.position = self.position
        logits = self.model(self.window[:, :-1], self.cache)[:, -1]  # (B, V)
        self.cache.position = None
        ids = self.sampling.sample(logits, self.uniform, self.window, self.banned)
        self.window.index_copy_(1, self.position + 1, ids[:, None])
        return ids


class Recorded:
    """Calls a function, always the same; on a CUDA GPU it is recorded and then replayed.

    The first calls are ordinary ones: they load kernels and set up cuBLAS, which cannot be
    recorded. On another device all calls are.
    """

    def __init__(self, device: torch.device):
        self.ordinary_calls = 2 if device.type == "cuda" else math.inf
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.ordinary_calls > 0:
            self.ordinary_calls -= 1
            return function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = function()
        self.graph.replay()
        return self.output
