"""A character-level GPT on PyTorch Lightning.

`data` turns text into batches of token ids, `model` has the networks, `training` trains them with
the Lightning Trainer, and `generation` generates text. The names below are the public ones.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Beside another program, OpenMP threads that spin while they wait for each other make training
# several times as slow. 2,000 iterations cost 3% on an idle machine (docs/training.md). libgomp
# reads this when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

if TYPE_CHECKING:
    from gpt_lightning.checkpoint import load_model as load_model
    from gpt_lightning.data.datamodule import TextDataModule as TextDataModule
    from gpt_lightning.errors import UserError as UserError
    from gpt_lightning.generation.generator import TextGenerator as TextGenerator
    from gpt_lightning.generation.sampling import Sampling as Sampling
    from gpt_lightning.model import BigramConfig as BigramConfig
    from gpt_lightning.model import GPTConfig as GPTConfig
    from gpt_lightning.model import LectureConfig as LectureConfig
    from gpt_lightning.training.module import GPTModule as GPTModule
    from gpt_lightning.training.optim import OptimizerConfig as OptimizerConfig

_MODULES = {
    "TextDataModule": "data.datamodule",
    "GPTModule": "training.module",
    "GPTConfig": "model",
    "LectureConfig": "model",
    "BigramConfig": "model",
    "OptimizerConfig": "training.optim",
    "TextGenerator": "generation.generator",
    "Sampling": "generation.sampling",
    "load_model": "checkpoint",
    "UserError": "errors",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `generate` does not wait for Lightning.
    if name in _MODULES:
        return getattr(import_module(f"gpt_lightning.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
