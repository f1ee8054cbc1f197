"""A model as an ONNX file: a pure function that also takes and returns keys and values.

Inputs: `ids` (B, T) int64, all tokens of the window, and `past` (L, 2, B, H, P, D) fp32, the keys
and values of its first P tokens; P is 0 for a new window. Outputs: `logits` (B, T - P, V) of the
other tokens, and `present` (L, 2, B, H, T, D), the `past` of the next call. B, T and P may differ
in each call; T is at most block_size.

Legend: B batch, T tokens of the window, P past tokens, L layers, H heads, D head size,
V vocabulary.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx  # noqa: F401  the exporter needs it; without it the command says so
import onnxscript  # noqa: F401
import torch
from torch import nn

from gpt_lightning.checkpoint import KEY, model_and_tokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.model import BigramConfig


class PastKeyValues:
    """A key/value cache, used as `KVCache` is, that is a function of tensors."""

    def __init__(self, past: torch.Tensor):
        self.past, self.length = past, past.shape[4]
        self.layers: list[torch.Tensor] = []

    def new_tokens(self, ids: torch.Tensor) -> slice:
        T = ids.shape[1]
        positions = torch.arange(T, device=ids.device)
        self.visible = positions[None] <= positions[self.length :, None]  # (T - P, T)
        return slice(self.length, T)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """softmax(scale q keys^T) values (B, H, T - P, D), from the new tokens to all so far."""
        both = torch.cat([self.past[layer], torch.stack([k, v])], dim=3)  # (2, B, H, T, D)
        self.layers.append(both)
        scores = q @ both[0].mT * scale  # (B, H, T - P, T)
        return scores.masked_fill(~self.visible, -torch.inf).softmax(dim=-1) @ both[1]


class PureFunction(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache = PastKeyValues(past)
        logits = self.model(ids, cache)
        return logits, torch.stack(cache.layers)


def export_onnx(path: Path, checkpoint: dict[str, Any], out: Path) -> None:
    """Write the model to the new file `out`; its metadata has the tokenizer as JSON.

    Raises:
        UserError: for the bigram model, which has no keys and values.
    """
    model, tokenizer = model_and_tokenizer(checkpoint, path)
    config: Any = model.config
    if isinstance(config, BigramConfig) or config.n_layer == 0:
        raise UserError(f"name={config.name}: a model without attention is not exported to ONNX")
    shape = (config.n_layer, 2, 2, config.n_head, 3, config.n_embd // config.n_head)
    example = (torch.zeros(2, 5, dtype=torch.long), torch.zeros(shape))
    batch, window, past = (torch.export.Dim(name) for name in ("batch", "window", "past"))
    with warnings.catch_warnings():  # about torchvision, and about torch's own code
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            PureFunction(model).eval(),
            example,
            dynamo=True,
            input_names=["ids", "past"],
            output_names=["logits", "present"],
            dynamic_shapes=({0: batch, 1: window}, {2: batch, 4: past}),
            verbose=False,
        )
    description = {"model": checkpoint[KEY]["model"], "tokenizer": tokenizer.state()}
    program.model.metadata_props[KEY] = json.dumps(description)
    program.save(out, external_data=False)
