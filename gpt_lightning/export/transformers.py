"""A model as a folder that transformers loads; the lecture's model is a GPT2LMHeadModel.

`AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` then need
neither this package nor remote code. Those of the default GPT need `transformers_model`.

Legend: V vocabulary, C channels.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gpt_lightning.checkpoint import KEY, model_and_tokenizer, net_weights
from gpt_lightning.data.bpe import BYTE_CHARACTERS, BPETokenizer
from gpt_lightning.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.export.gpt2 import checkpoint_from_gpt2, is_conv1d, our_names
from gpt_lightning.model import LectureConfig, config_from_dict, config_to_dict

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}  # transformers' names
DEFAULTS = {  # of GPT2Config
    "model_type": "gpt2",
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "resid_pdrop": 0.1,
    "activation_function": "gelu_new",
}
MAX_LOGIT_ERROR = 1e-5


def export_transformers(path: Path, checkpoint: dict[str, Any], out: Path) -> str:
    """Write config.json, model.safetensors and the tokenizer to the new folder `out`.

    The lecture's model becomes a GPT2LMHeadModel, whose logits are equal up to a constant, which
    softmax ignores. Other models need `transformers_model`.

    Returns:
        The Python code that loads the model.

    Raises:
        UserError: if GPT-2 has no such model, or transformers no such tokenizer.
    """
    config = config_from_dict(checkpoint[KEY]["model"])
    model, tokenizer = model_and_tokenizer(checkpoint, path)
    load = "from transformers import AutoModelForCausalLM"
    load += f"; model = AutoModelForCausalLM.from_pretrained({str(out)!r})"
    if isinstance(config, LectureConfig):
        settings = gpt2_settings(config)
        weights = gpt2_weights(net_weights(checkpoint), config)
    else:
        settings = {
            "architectures": ["GPTLightningForCausalLM"],
            "model_type": "gpt_lightning",
            "model": config_to_dict(config),
        }
        weights = {f"net.{name}": weight for name, weight in model.state_dict().items()}
        load = f"import gpt_lightning.export.transformers_model; {load}"
    tokenizer_json = tokenizer_of(tokenizer)
    # spaces before punctuation are part of the text
    of_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
    }
    out.mkdir()
    try:
        for name, content in (("config.json", settings), ("tokenizer_config.json", of_tokenizer)):
            (out / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        (out / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        save_file(weights, out / "model.safetensors", {"format": "pt"})
    except BaseException:
        shutil.rmtree(out)
        raise
    return load


def gpt2_settings(config: LectureConfig) -> dict[str, Any]:
    """The content of config.json for a GPT2LMHeadModel.

    Raises:
        UserError: if a part of GPT-2 is missing in the model.
    """
    for name in ("residual", "proj", "norm", "ffwd"):
        if not (value := getattr(config, name)):
            raise UserError(
                f"{name}={value}: GPT-2 always has this part; export a model of "
                "lecture/11_layer_norm or a later config, or use --to=safetensors or --to=onnx"
            )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": ACTIVATIONS[config.activation],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.ffwd * config.n_embd,
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "scale_attn_weights": config.scaled,
        "tie_word_embeddings": False,
        "embd_pdrop": 0.0,  # the lecture drops nothing there
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def gpt2_weights(
    weights: dict[str, torch.Tensor], config: LectureConfig
) -> dict[str, torch.Tensor]:
    """The weights by GPT-2's names. Biases that the lecture's model lacks are zero."""
    theirs = {}
    for name, ours in our_names(config.n_layer).items():
        weight = weights[f"{ours}.weight"].float()
        if name not in ("transformer.wte", "transformer.wpe", "lm_head"):
            zeros = torch.zeros(len(weight))
            theirs[f"{name}.bias"] = weights.get(f"{ours}.bias", zeros).float()
        theirs[f"{name}.weight"] = (weight.T if is_conv1d(name) else weight).contiguous()
    of_bias = equivalent_input(weights["lm_head.weight"], weights["lm_head.bias"])
    theirs["transformer.ln_f.bias"] = theirs["transformer.ln_f.bias"] + of_bias
    return theirs


def equivalent_input(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What a head must read more (C,) to do without its bias, which GPT-2's head does not have.

    Args:
        weight: of the head, (V, C).
        bias: (V,), kept up to a constant.

    Raises:
        UserError: if there is no such vector, which can be for V > C + 1 only.
    """
    matrix, target = weight.double(), bias.double()[:, None]
    with_constant = torch.cat([matrix, torch.ones_like(target)], dim=1)
    # gelsd: the smallest solution, also where the columns are linearly dependent
    solution = torch.linalg.lstsq(with_constant, target, driver="gelsd").solution[:-1].float()
    error = matrix @ solution.double() - target
    if (error - error.mean()).abs().max() > MAX_LOGIT_ERROR:
        V, C = weight.shape
        raise UserError(
            f"vocab_size={V}: GPT-2's head has no bias. That of this model can move into the norm "
            f"before it only for up to n_embd + 1 = {C + 1} tokens; train with n_embd={V - 1} or "
            "more, or use --to=safetensors or --to=onnx"
        )
    return solution[:, 0]


def tokenizer_of(tokenizer: Tokenizer) -> str:
    """The content of tokenizer.json."""
    try:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Pipeline
    except ImportError:
        message = 'to=transformers needs the package tokenizers: pip install -e ".[export]"'
        raise UserError(message) from None
    if isinstance(tokenizer, CharTokenizer):
        ids = {character: i for i, character in enumerate(tokenizer.vocabulary)}
        pipeline = Pipeline(models.WordLevel(ids))
        pipeline.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        pipeline.decoder = decoders.Fuse()
    elif tokenizer.kind in ("byte", "bpe"):
        lines = tokenizer.state().get("vocabulary", "").splitlines()
        merges = [tuple(line.split(" ")) for line in lines]
        pipeline = Pipeline(models.BPE(spelled_ids(tokenizer), merges))
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=tokenizer.kind == "bpe"
        )
        pipeline.decoder = decoders.ByteLevel()
    else:
        raise UserError(
            f"tokenizer={tokenizer.kind} has no counterpart in the package tokenizers; "
            "use --to=safetensors or --to=onnx"
        )
    return pipeline.to_str(pretty=True)


def spelled_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each token in GPT-2's spelling of bytes."""
    tokens = tokenizer.bytes_of_tokens()
    return {"".join(BYTE_CHARACTERS[b] for b in token): i for i, token in enumerate(tokens)}


def import_transformers(folder: str | Path) -> dict[str, Any]:
    """A checkpoint of the lecture's model from a folder of a GPT2LMHeadModel.

    The tokenizer must be one of characters, as `export_transformers` writes it, or GPT-2's.

    Raises:
        UserError: if the folder has another model or tokenizer, or a file is missing.
    """
    folder = Path(folder)
    try:
        config, tokenizer_json = (
            json.loads((folder / name).read_text("utf-8"))
            for name in ("config.json", "tokenizer.json")
        )
        config = DEFAULTS | config
        for name in ("model_type", "layer_norm_epsilon", "scale_attn_by_inverse_layer_idx"):
            if config[name] != DEFAULTS[name]:
                raise UserError(f"{name}={config[name]} is not the lecture's model")
        weights = load_file(folder / "model.safetensors")
        tokenizer, rows = tokenizer_from_json(tokenizer_json["model"])
        # GPT-2 was published without this prefix and without its head, which is the embedding
        weights = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": weight
            for name, weight in weights.items()
        }
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
        for name in ("transformer.wte.weight", "lm_head.weight"):
            weights[name] = weights[name][rows]
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except OSError as error:
        raise UserError(
            f"{folder}: {error.filename or error} cannot be read; give a folder with config.json, "
            "tokenizer.json and model.safetensors"
        ) from error
    except Exception as error:  # an untrusted JSON file can be anything
        raise UserError(f"{folder}: not a folder of a GPT2LMHeadModel ({error!r})") from error
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    activation = str(config["activation_function"])
    return checkpoint_from_gpt2(
        weights,
        tokenizer,
        str(folder),
        transposed=True,
        n_head=config["n_head"],
        scaled=config["scale_attn_weights"],
        dropout=config["resid_pdrop"],
        activation=activations.get(activation, activation),
    )


def tokenizer_from_json(model: dict[str, Any]) -> tuple[Tokenizer, list[int]]:
    """A tokenizer of ours, and the id in tokenizer.json of each of its tokens."""
    match model:
        case {"type": "WordLevel", "vocab": dict(ids)} if all(len(token) == 1 for token in ids):
            rows = sorted(ids.items(), key=lambda item: item[1])
            return CharTokenizer("".join(token for token, _ in rows)), [i for _, i in rows]
        case {"type": "BPE", "vocab": dict(ids), "merges": list(merges)}:
            lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
            tokenizer = BPETokenizer("\n".join(lines)) if lines else ByteTokenizer()
            return tokenizer, [ids[token] for token in spelled_ids(tokenizer)]
    raise UserError("tokenizer.json is neither of characters nor byte pair encoding")
