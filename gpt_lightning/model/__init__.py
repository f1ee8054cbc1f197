"""Token ids (B, T) in, logits (B, T, V) out: every model, built by name from plain settings."""

from dataclasses import asdict, fields
from typing import Any, get_args

import torch
from torch import nn

from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.lecture import Bigram, LectureConfig, LectureGPT
from gpt_lightning.model.size import memory, numbers, refuse_too_large, table_numbers

MODELS = {
    "gpt": (GPT, GPTConfig),
    "lecture": (LectureGPT, LectureConfig),
    "bigram": (Bigram, LectureConfig),
}
TABLES = 1 << 28  # bytes of what a stranger's model may compute for its positions


def build_config(name: str, **settings: Any) -> GPTConfig | LectureConfig:
    """The config of the model `name`, with defaults for what `settings` leaves out.

    The lecture's switches may stand among the modern GPT's settings, as long as nobody turned one.

    Raises:
        ValueError: in one line, for an unknown name, or settings that cannot be.
    """
    if name not in MODELS:
        raise ValueError(f"--model.name={name} is unknown; choose one of {', '.join(MODELS)}")
    config = MODELS[name][1]
    own = {field.name: field.type for field in fields(config)}
    for switch in fields(LectureConfig):
        if switch.name in settings.keys() - own.keys():
            value = settings.pop(switch.name)
            if value != switch.default:
                raise ValueError(
                    f"--model.{switch.name}={value} is a setting of --model.name=lecture, not of "
                    f"--model.name={name}"
                )
    for key in settings.keys() & own.keys():
        value, kinds = settings[key], get_args(own[key]) or (own[key],)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"--model.{key}={str(value)[:40]!r} must be of type {wanted}")
    return config(**settings)


def build_model(name: str, **settings: Any) -> nn.Module:
    """Build the model `name` from the settings of its config class.

    Raises:
        ValueError: as `build_config`, and for a model that has no room in this machine's memory.
    """
    config = build_config(name, **settings)
    refuse_too_large(name, config)
    return MODELS[name][0](config)


def load_model(weights: dict[str, torch.Tensor], name: str, **settings: Any) -> nn.Module:
    """Build the model `name` and fill in its weights, which may be a stranger's.

    Memory is taken for as many numbers as the weights have, and no more.

    Raises:
        ValueError: in one line, if the settings do not fit the weights, or if those that are in no
            weight (the context's length, where positions are computed) would take too much memory.
    """
    config = build_config(name, **settings)
    if numbers(name, config) != sum(tensor.numel() for tensor in weights.values()):
        raise ValueError("other shapes")
    if config.n_layer > max(len(weights), 1000):  # a bigram has settings that are in no weight
        raise ValueError(f"n_layer={config.n_layer}")
    window = 8 * config.n_layer * config.block_size * config.n_embd  # keys and values, in fp32
    if 4 * table_numbers(name, config) > TABLES or window > memory():
        raise ValueError(f"its block_size={config.block_size} would take too much memory")
    model = MODELS[name][0](config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError("other names or shapes") from error
    return model


def model_settings(name: str, model: nn.Module) -> dict[str, Any]:
    """What `build_model` needs to build `model` again, as plain types."""
    return {"name": name, **asdict(model.config)}
