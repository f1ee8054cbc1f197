"""Token ids (B, T) in, logits (B, T, V) out: every model, built by name from plain settings."""

from dataclasses import asdict
from typing import Any

from torch import nn

from gpt_lightning.model.lecture import Bigram, LectureConfig, LectureGPT

MODELS = {"lecture": (LectureGPT, LectureConfig), "bigram": (Bigram, LectureConfig)}


def build_config(name: str, **settings: Any) -> LectureConfig:
    """The config of the model `name`, with defaults for what `settings` leaves out.

    Raises:
        ValueError: in one line, for an unknown name, or settings that cannot be.
    """
    if name not in MODELS:
        raise ValueError(f"--model.name={name} is unknown; choose one of {', '.join(MODELS)}")
    return MODELS[name][1](**settings)


def build_model(name: str, **settings: Any) -> nn.Module:
    """Build the model `name` from the settings of its config class; raises as `build_config`."""
    config = build_config(name, **settings)
    return MODELS[name][0](config)


def model_settings(name: str, model: nn.Module) -> dict[str, Any]:
    """What `build_model` needs to build `model` again, as plain types."""
    return {"name": name, **asdict(model.config)}
