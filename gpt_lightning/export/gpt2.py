"""GPT-2's weights and the lecture's: the same model under other names.

nanoGPT, minGPT and transformers share GPT-2's names. transformers stores matrices transposed.

Legend: V vocabulary, C channels.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from gpt_lightning.checkpoint import KEY, describe, model_with_weights
from gpt_lightning.data.tokenizers import Tokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.model import config_from_dict, config_to_dict

UNKNOWN_TEXT = "(unknown: the model was imported)"  # what such a model was trained on
OUTER = {
    "transformer.wte": "token_embedding_table",
    "transformer.wpe": "position_embedding_table",
    "transformer.ln_f": "ln_f",
    "lm_head": "lm_head",
}
OF_A_BLOCK = {
    "ln_1": "ln1",
    "attn.c_attn": "sa.qkv",
    "attn.c_proj": "sa.proj",
    "ln_2": "ln2",
    "mlp.c_fc": "ffwd.net.0",
    "mlp.c_proj": "ffwd.net.2",
}


def our_names(n_layer: int) -> dict[str, str]:
    """The lecture model's name of each layer of GPT-2."""
    blocks = {
        f"transformer.h.{i}.{theirs}": f"blocks.{i}.{ours}"
        for i in range(n_layer)
        for theirs, ours in OF_A_BLOCK.items()
    }
    return OUTER | blocks


def is_conv1d(name: str) -> bool:
    """Whether transformers stores the matrix of this layer transposed."""
    return name.split(".")[-1] in ("c_attn", "c_proj", "c_fc")


def checkpoint_from_gpt2(
    weights: Mapping[str, torch.Tensor],
    tokenizer: Tokenizer,
    source: str,
    step: int = 0,
    transposed: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """A checkpoint of the lecture's model with the weights of a GPT-2.

    Sizes come from the weights' shapes, so a file cannot ask for more memory than it has weights.

    Args:
        weights: by GPT-2's names.
        source: the file, for errors.
        transposed: whether the matrices are, as in transformers.
        settings: of LectureConfig, those that shapes do not tell.

    Raises:
        UserError: if these are not the weights of a GPT-2, or the tokenizer is not theirs.
    """
    weights = {
        str(name).removeprefix("_orig_mod."): weight.float()
        for name, weight in weights.items()
        if isinstance(weight, torch.Tensor)
    }
    found = (re.match(r"transformer\.h\.\d+\.", name) for name in weights)
    n_layer = len({match[0] for match in found if match})
    ours = {}
    try:
        for theirs, name in our_names(n_layer).items():
            weight = weights[f"{theirs}.weight"]
            ours[f"{name}.weight"] = weight.T if transposed and is_conv1d(theirs) else weight
            if f"{theirs}.bias" in weights:
                ours[f"{name}.bias"] = weights[f"{theirs}.bias"]
        vocab_size, n_embd = ours["token_embedding_table.weight"].shape
        block_size, _ = ours["position_embedding_table.weight"].shape
        ffwd = len(ours["blocks.0.ffwd.net.0.weight"]) // n_embd
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source}: not the weights of a GPT-2 (see {error})") from error
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{source}: the model has {vocab_size} tokens and the vocabulary "
            f"{tokenizer.vocab_size}; give the vocabulary that it was trained with"
        )
    ours.setdefault("lm_head.bias", torch.zeros(vocab_size))
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "ffwd": ffwd}
    sizes |= {"vocab_size": vocab_size, "block_size": block_size}
    biases = {"bias": "ln_f.bias" in ours, "qkv_bias": "blocks.0.sa.qkv.bias" in ours}
    try:
        config = config_from_dict({"name": "lecture", **sizes, **biases, **settings})
        model = model_with_weights(config_to_dict(config), ours)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    corpus = {"name": UNKNOWN_TEXT, "sha256": "", "split": "tail", "val_fraction": 0.0}
    return {
        "global_step": step,
        "state_dict": {f"net.{name}": weight for name, weight in model.state_dict().items()},
        KEY: describe(config, tokenizer.state(), corpus, None),
    }
