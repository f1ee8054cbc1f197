"""A character-level GPT on PyTorch Lightning. The rooms, in the order that data flows through:

data/           a text becomes tokens, windows and batches
model/          ids (B, T) become logits (B, T, V)
training/       logits become a loss, a step, a checkpoint
checkpoint.py   the file that training leaves and generation reads
generation/     a checkpoint and a prompt become text
cli.py          the front door; nothing imports it

What a script needs is at hand here: `TextDataModule`, `GPTModule`, `Writer`.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "TextDataModule": "gpt_lightning.data.datamodule",
    "GPTModule": "gpt_lightning.training.lightning_module",
    "Writer": "gpt_lightning.generation.writer",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    # Imported on first use: `generate` must not wait for Lightning.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
