"""A model in one safetensors file: weights, and a description as JSON in the metadata.

Such a file is data by construction, so it is the one to share. Its SHA-256 notices any changed
byte, which the format itself does not.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from gpt_lightning.errors import UserError
from gpt_lightning.files import write_atomically

KEY, DIGEST = "gpt_lightning", "sha256"
MAX_HEADER = 1 << 20  # bytes
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_safetensors(
    path: str | Path, weights: dict[str, torch.Tensor], description: Any, precision: str = "fp32"
) -> None:
    """Write weights in `precision`, one of DTYPES, and a description in plain types.

    Raises:
        UserError: if a weight is not finite in `precision`, or the description is too long.
    """
    dtype = DTYPES[precision]
    converted = {name: weight.to(dtype).contiguous() for name, weight in weights.items()}
    for name, weight in converted.items():
        if not weight.isfinite().all():
            if not weights[name].isfinite().all():
                raise UserError(f"the weight {name} is not finite")
            raise UserError(
                f"precision={precision}: the weight {name} is too large for it; use fp32 or bf16"
            )
    metadata = {"format": "pt", KEY: json.dumps(description), DIGEST: "0" * 64}
    data = save(converted, metadata)
    if _header_size(data) > MAX_HEADER:
        raise UserError(
            f"settings and vocabulary take more than {MAX_HEADER:,} bytes, the limit of a "
            "safetensors file; train with a smaller max_vocab_size"
        )
    with write_atomically(path) as file:
        file.write(_with_digest(data, metadata[DIGEST], _digest(data)))


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], Any]:
    """The weights in fp32 and the description that `write_safetensors` wrote.

    The file may come from anyone. Memory is bounded by a few times the size of the file.

    Raises:
        ValueError, SafetensorError, ...: if the file is damaged or has other content.
    """
    with open(path, "rb") as file:
        size = _header_size(file.read(8))
        if size > MAX_HEADER:
            raise ValueError(f"its header has more than {MAX_HEADER:,} bytes")
        file.seek(0)
        data = file.read()
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    if DIGEST not in metadata:
        raise ValueError("another program wrote it")
    if _digest(_with_digest(data, metadata[DIGEST], "0" * 64)) != metadata[DIGEST]:
        raise ValueError("its SHA-256 is not the one in its metadata")
    weights = load(data)
    if not {weight.dtype for weight in weights.values()} <= {*DTYPES.values()}:
        raise ValueError("its weights are not in " + ", ".join(DTYPES))
    return {name: weight.float() for name, weight in weights.items()}, json.loads(metadata[KEY])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _with_digest(data: bytes, old: str, new: str) -> bytes:
    """The file with another digest. It is computed with 64 zeros in its own place."""
    return data.replace(f'"{old}"'.encode(), f'"{new}"'.encode(), 1)


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")
