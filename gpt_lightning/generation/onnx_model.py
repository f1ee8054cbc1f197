"""A model that onnxruntime computes, from a file that `export --to=onnx` wrote.

Legend: B texts, T tokens of the window, P of them computed before, H heads, D head size,
V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt_lightning.checkpoint import KEY
from gpt_lightning.data.tokenizers import Tokenizer, tokenizer_from_state
from gpt_lightning.errors import UserError
from gpt_lightning.model import ModelConfig, config_from_dict
from gpt_lightning.model.attention import KVCache, RecordedAttention


class OnnxModel(nn.Module):
    """Token ids (B, T) -> logits (B, T, V), in fp32 on the CPU.

    Args:
        session: an `onnxruntime.InferenceSession` with the inputs of `export.onnx`.
    """

    def __init__(self, session: Any, config: ModelConfig):
        super().__init__()
        self.session, self.config = session, config
        _, *past = session.get_inputs()
        self.past = {node.name: node.shape for node in past}  # (B, H, P, D) each
        # callers read the device from the parameters; those of the model are in the session
        self.on_cpu = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits of the next token for ids (B, T); with a cache, those of the new tokens.

        Raises:
            UserError: if the cache records attention weights.
        """
        if isinstance(cache, RecordedAttention):
            raise UserError("an ONNX file does not give its attention weights; load a checkpoint")
        if cache is None or cache.length == 0:
            past = [torch.empty(len(ids), H, 0, D) for _, H, _, D in self.past.values()]
        else:
            past = [tensor for layer in cache.layers.values() for tensor in layer]
        inputs = {name: tensor.numpy() for name, tensor in zip(self.past, past, strict=True)}
        outputs = self.session.run(None, {"ids": ids.numpy(), **inputs})
        logits, *present = map(torch.from_numpy, outputs)  # without a copy
        if cache is not None:
            pairs = zip(present[::2], present[1::2], strict=True)
            cache.layers, cache.length = dict(enumerate(pairs)), ids.shape[1]
        return logits


def load_onnx(
    path: str | Path, device: str | torch.device, precision: str, unknown: str
) -> tuple[OnnxModel, Tokenizer, dict[str, Any]]:
    """Model and tokenizer of an ONNX file, and its description, as in a checkpoint.

    The file may come from anyone: onnxruntime runs its own operators only, and reads no other file.
    A hostile file can cost time and memory.

    Raises:
        UserError: for another device than the CPU, another precision than fp32, or a file that is
            damaged or has other content, or without onnxruntime.
    """
    if torch.device(device).type != "cpu":
        raise UserError(f"device={device} cannot run an ONNX file; drop it or choose cpu")
    if precision not in ("auto", "fp32"):
        raise UserError(f"precision={precision} is not for an ONNX file; drop it or choose fp32")
    try:
        from onnxruntime import InferenceSession, SessionOptions
    except ImportError:
        message = f'ckpt_path={path} needs onnxruntime: pip install -e ".[export]"'
        raise UserError(message) from None
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are exceptions
    # where weights in further files would be: nothing is below a file
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path)
    )
    try:
        data = Path(path).read_bytes()
        session = InferenceSession(data, options, providers=["CPUExecutionProvider"])
        description = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
        config = config_from_dict(description["model"])
        tokenizer = tokenizer_from_state(description["tokenizer"], unknown)
        if not 0 < config.block_size < len(data):  # the file has numbers for each position
            raise ValueError(f"block_size={config.block_size} does not fit it")
        model = OnnxModel(session, config)
        shape = model(torch.zeros(1, 1, dtype=torch.long)).shape
        if not shape[-1] == tokenizer.vocab_size == config.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} tokens, but logits of the shape {(*shape,)}")
    except OSError as error:
        raise UserError(f"ckpt_path={path} cannot be read: {error.strerror}") from error
    except Exception as error:  # onnxruntime raises a dozen types for damaged or hostile files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"ckpt_path={path}: damaged, or not a file that export --to=onnx wrote ({reason})"
        ) from error
    return model.eval(), tokenizer, description
