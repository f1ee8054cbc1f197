"""Generation on a CUDA GPU: the model's step at each window length as one CUDA graph.

Launching the kernels of a step takes the CPU longer than the GPU computes one token. A graph is one
launch. Its shapes are fixed, so that there is one for each length of the window; once the window is
full, the same lengths come again and again.

Legend: B samples, T tokens of the window, V vocabulary.
"""

import torch
from torch import nn

from gpt_lightning.model.attention import KVCache


class StepGraphs:
    """Computes the logits after a window like `model(window, cache)`, which it records.

    The first step at each length runs eagerly if nothing is cached, otherwise it is recorded.
    """

    def __init__(self, model: nn.Module, cache: KVCache, window: torch.Tensor):
        self.model, self.cache = model, cache
        B, block_size = window.shape[0], cache.block_size
        self.window = window.new_zeros(B, block_size)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.eager_steps = 0

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the token after a window (B, T)."""
        T = window.shape[1]
        if self.cache.length != T - 1 or T == 1 or self.eager_steps < 2:
            self.eager_steps += self.cache.length > 0  # cuBLAS sets itself up in these
            return self.model(window, self.cache)[:, -1]
        self.window[:, :T] = window
        if T not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                logits = self.model(self.window[:, :T], self.cache)[:, -1]
            self.graphs[T] = (graph, logits)
        graph, logits = self.graphs[T]
        graph.replay()
        self.cache.length = T
        return logits
