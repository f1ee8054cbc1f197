"""Fine-tuning: a new run that begins with the weights of a checkpoint."""

from pathlib import Path
from typing import Any

import torch

from gpt_lightning.checkpoint import KEY, model_and_tokenizer, net_weights
from gpt_lightning.compatibility import MAY_DIFFER
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.errors import UserError
from gpt_lightning.model import config_from_dict, config_to_dict, grown_weights


def begin_from(
    checkpoint: dict[str, Any], path: Path, data: dict[str, Any], model: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Complete the settings of a new run by those of a checkpoint; returns the initial weights.

    Tokenizer, block_size and the model's settings come from the checkpoint. Characters of the new
    text that the checkpoint does not know are added to the end of its vocabulary, unless
    `unknown` drops or replaces them.

    Args:
        checkpoint: from `read_checkpoint(path)`.
        data: arguments of `TextDataModule`, completed in place.
        model: settings of the model, completed in place.

    Raises:
        UserError: if a given setting does not fit the weights, or they do not fit each other.
    """
    _, tokenizer = model_and_tokenizer(checkpoint, path)  # raises if they do not fit
    entry = checkpoint[KEY]
    config = config_from_dict(entry["model"])
    vocab_size = config.vocab_size
    for name in ("vocabulary", "vocabulary_corpus", "max_vocab_size"):
        if name in data:
            raise UserError(
                f"{name}={data[name]} cannot be given: init_from={path} sets it; drop it"
            )
    _complete(data, "tokenizer", tokenizer.kind, path)
    if config.name == "lecture":  # it has a weight for each position
        _complete(data, "block_size", config.block_size, path)
    data.setdefault("block_size", config.block_size)
    if "vocabulary" in entry["tokenizer"]:
        data["vocabulary"] = entry["tokenizer"]["vocabulary"]
    if data["tokenizer"] in ("char", "word") and data.get("unknown") in (None, "error"):
        other = {"tokenizer": "char", "vocabulary": None, "val_corpus": None, "test_corpus": None}
        of_text = TextDataModule(**{**data, **other})
        of_text.prepare_data()
        grown = tokenizer.with_characters(of_text.token_file.tokenizer.vocabulary)
        data["vocabulary"], vocab_size = grown.vocabulary, grown.vocab_size
    weights, config = grown_weights(net_weights(checkpoint), config, vocab_size)
    for name, value in config_to_dict(config).items():
        if name in MAY_DIFFER:
            model.setdefault(name, value)
        elif name != "block_size":
            _complete(model, name, value, path)
    model.pop("vocab_size")  # it comes from the data
    return weights


def _complete(settings: dict[str, Any], name: str, value: Any, path: Path) -> None:
    """Set a setting that is not given; one that is given must be equal."""
    if settings.setdefault(name, value) != value:
        raise UserError(
            f"{name}={settings[name]} does not fit init_from={path}, which has {name}={value}; "
            "drop the setting"
        )
