"""Language models: token ids (B, T) in, logits (B, T, V) out.

A model is built from its config, a dataclass; `config_to_dict` and `config_from_dict` turn a config
into plain types and back.
"""

import json
from dataclasses import asdict, fields, replace
from typing import Any, get_args

import torch
from torch import nn

from gpt_lightning.errors import UserError
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.lecture import Bigram, BigramConfig, LectureConfig, LectureGPT

ModelConfig = GPTConfig | LectureConfig | BigramConfig

CONFIGS: dict[str, type[ModelConfig]] = {
    config.name: config for config in (GPTConfig, LectureConfig, BigramConfig)
}


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model that `config` describes, with initial weights drawn from torch's generator.

    Raises:
        ValueError: if `vocab_size` or `block_size` is not filled in.
    """
    if config.vocab_size == 0 or config.block_size == 0:
        raise ValueError(f"vocab_size and block_size must be set before a model is built: {config}")
    if isinstance(config, GPTConfig):
        return GPT(config)
    if isinstance(config, LectureConfig):
        return LectureGPT(config)
    return Bigram(config)


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The config as plain types: the model's name and every field."""
    return {"name": config.name, **asdict(config)}


def config_from_dict(settings: dict[str, Any]) -> ModelConfig:
    """The config of the model `settings["name"]`; fields that are not given have their defaults.

    Raises:
        UserError: for an unknown name or field, a value of the wrong type, or one out of range.
    """
    settings = dict(settings)
    name = str(settings.pop("name", None))
    if name not in CONFIGS:
        raise UserError(f"name={name} is not a model; choose one of {', '.join(CONFIGS)}")
    types = {field.name: get_args(field.type) or (field.type,) for field in fields(CONFIGS[name])}
    for key, value in settings.items():
        shown = f"{key}={json.dumps(value, default=str)}"
        if key not in types:
            raise UserError(f"{shown} is not a setting of the {name} model")
        # exact types: a bool is not an int here; an int is a valid float
        if type(value) not in types[key] and not (type(value) is int and float in types[key]):
            names = ["null" if kind is type(None) else kind.__name__ for kind in types[key]]
            raise UserError(f"{shown} must be of type {' or '.join(names)}")
    return CONFIGS[name](**settings)


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, without the multi-token heads, which generation does not use."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith("multi_token_heads."))


def grown_weights(
    weights: dict[str, torch.Tensor], config: ModelConfig, vocab_size: int
) -> tuple[dict[str, torch.Tensor], ModelConfig]:
    """Weights and config of a model whose vocabulary gains tokens at its end.

    The rows of the new tokens are the means of the old ones. N-grams of old tokens keep their rows.

    Args:
        weights: those of a model of `config`.
        vocab_size: the new one, at least the old one.
    """
    if vocab_size == config.vocab_size:
        return weights, config
    changes = {"vocab_size": vocab_size}
    if isinstance(config, GPTConfig):
        changes["ngram_base"] = config.ngram_base or config.vocab_size
    grown_config = replace(config, **changes)
    grown = {}
    for name, new in build_model(grown_config).state_dict().items():
        weight = weights[name]
        for dim, size in enumerate(new.shape):
            if more := size - weight.shape[dim]:
                repeats = [more if i == dim else 1 for i in range(weight.ndim)]
                mean = weight.mean(dim, keepdim=True)
                weight = torch.cat([weight, mean.repeat(repeats)], dim)
        grown[name] = weight
    return grown, grown_config
