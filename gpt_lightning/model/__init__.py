"""Token ids (B, T) in, logits (B, T, V) out: every model, built by name from plain settings."""

from dataclasses import asdict, fields
from typing import Any

from torch import nn

from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.lecture import Bigram, LectureConfig, LectureGPT

MODELS = {
    "gpt": (GPT, GPTConfig),
    "lecture": (LectureGPT, LectureConfig),
    "bigram": (Bigram, LectureConfig),
}


def build_config(name: str, **settings: Any) -> GPTConfig | LectureConfig:
    """The config of the model `name`, with defaults for what `settings` leaves out.

    The lecture's switches may stand among the modern GPT's settings, as long as nobody turned one.

    Raises:
        ValueError: in one line, for an unknown name, or settings that cannot be.
    """
    if name not in MODELS:
        raise ValueError(f"--model.name={name} is unknown; choose one of {', '.join(MODELS)}")
    config = MODELS[name][1]
    own = {field.name for field in fields(config)}
    for switch in fields(LectureConfig):
        if switch.name in settings.keys() - own:
            value = settings.pop(switch.name)
            if value != switch.default:
                raise ValueError(
                    f"--model.{switch.name}={value} is a setting of --model.name=lecture, not of "
                    f"--model.name={name}"
                )
    return config(**settings)


def build_model(name: str, **settings: Any) -> nn.Module:
    """Build the model `name` from the settings of its config class; raises as `build_config`."""
    config = build_config(name, **settings)
    return MODELS[name][0](config)


def model_settings(name: str, model: nn.Module) -> dict[str, Any]:
    """What `build_model` needs to build `model` again, as plain types."""
    return {"name": name, **asdict(model.config)}
