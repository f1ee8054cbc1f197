"""A model as an ONNX file: a pure function that also takes and returns keys and values.

Inputs: `ids` (B, T) int64, all tokens of the window, and for each layer `past.0.key`,
`past.0.value`, `past.1.key`, ... (B, H, P, D) fp32, the keys and values of its first P tokens; P is
0 for a new window. Outputs: `logits` (B, T - P, V) of the other tokens, and `present.0.key`,
`present.0.value`, ... (B, H, T, D), the past of the next call. B, T and P may differ in each call;
T is at most block_size.

Legend: B batch, T tokens of the window, P past tokens, H heads, D head size, V vocabulary.
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
from gpt_lightning.export.past_key_values import PastKeyValues, Tensors
from gpt_lightning.files import write_atomically
from gpt_lightning.model import BigramConfig


class PureFunction(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        present: list[torch.Tensor] = []

        def append(layer: int, k: torch.Tensor, v: torch.Tensor) -> Tensors:
            keys = torch.cat([past[2 * layer], k], dim=2)
            values = torch.cat([past[2 * layer + 1], v], dim=2)
            present.extend([keys, values])
            return keys, values

        logits = self.model(ids, PastKeyValues(past[0].shape[2], append))
        return logits, present


def export_onnx(path: Path, checkpoint: dict[str, Any], out: Path) -> None:
    """Write the model to the new file `out`; its metadata has the description as JSON.

    Raises:
        UserError: for the bigram model, which has no keys and values.
    """
    model, _ = model_and_tokenizer(checkpoint, path)
    config: Any = model.config
    if isinstance(config, BigramConfig) or config.n_layer == 0:
        raise UserError(f"name={config.name}: a model without attention is not exported to ONNX")
    names = [f"{layer}.{part}" for layer in range(config.n_layer) for part in ("key", "value")]
    past = [torch.zeros(2, config.n_head, 3, config.n_embd // config.n_head) for _ in names]
    B, T, P = (torch.export.Dim(name) for name in ("batch", "window", "past"))
    with warnings.catch_warnings():  # about torchvision, and about torch's own code
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            PureFunction(model).eval(),
            (torch.zeros(2, 5, dtype=torch.long), past),
            dynamo=True,
            input_names=["ids", *(f"past.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            dynamic_shapes=({0: B, 1: T}, [{0: B, 2: P} for _ in names]),
            verbose=False,
        )
    description = {**checkpoint[KEY], "step": checkpoint["global_step"]}
    program.model.metadata_props[KEY] = json.dumps(description)
    with write_atomically(out) as file:
        file.write(program.model_proto.SerializeToString())
