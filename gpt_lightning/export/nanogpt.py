"""Import of checkpoints of nanoGPT and minGPT. No code in their files is run."""

import pickle
import pickletools
from pathlib import Path
from typing import Any

from gpt_lightning.checkpoint import read_archive
from gpt_lightning.data.tokenizers import CharTokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.export.gpt2 import checkpoint_from_gpt2

MAX_META = 4 << 20  # bytes of meta.pkl; tiny Shakespeare's has 700
# The opcodes of a pickled dict of texts and integers. None of them imports or calls anything.
PLAIN_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "BINGET", "LONG_BINGET"),
}


def import_nanogpt(path: str | Path, meta: str | Path) -> dict[str, Any]:
    """A checkpoint of the lecture's model from the `ckpt.pt` of nanoGPT's train.py.

    Args:
        meta: the `meta.pkl` beside the training data, which has the vocabulary.

    Raises:
        UserError: if one of the files is not of nanoGPT, is damaged, or could run code.
    """
    match _read(path):
        case {
            "model": dict(weights),
            "model_args": {"n_head": n_head, "dropout": dropout},
            "iter_num": int(step),
        }:
            settings = {"n_head": n_head, "dropout": dropout, "activation": "gelu"}
        case _:
            raise UserError(
                f"{path}: not a checkpoint of nanoGPT's train.py, which has model, iter_num, and "
                "n_head and dropout in model_args"
            )
    return checkpoint_from_gpt2(weights, tokenizer_of_meta(meta), str(path), step, **settings)


def import_mingpt(path: str | Path, text: str, n_head: int) -> dict[str, Any]:
    """A checkpoint of the lecture's model from the `model.pt` of minGPT's chargpt.py.

    Args:
        text: that it was trained on; its sorted characters are the vocabulary.
        n_head: the number of heads, which the file does not tell.

    Raises:
        UserError: if the file is not of minGPT, is damaged, or could run code.
    """
    weights = _read(path)
    if not isinstance(weights, dict):
        raise UserError(f"{path}: not the weights of a minGPT")
    tokenizer = CharTokenizer.train([text])
    return checkpoint_from_gpt2(
        weights, tokenizer, str(path), n_head=n_head, activation="gelu_tanh"
    )


def tokenizer_of_meta(path: str | Path) -> CharTokenizer:
    """The tokenizer of nanoGPT's meta.pkl.

    Raises:
        UserError: if it is no pickle of {"itos": {id: character}, ...}, or could run code.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_META + 1)
        if len(data) > MAX_META:
            raise ValueError(f"more than {MAX_META:,} bytes")
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in PLAIN_OPCODES:
                raise ValueError(f"{opcode.name} {argument or ''}".strip())
        itos = pickle.loads(data)["itos"]
        return CharTokenizer("".join(itos[i] for i in range(len(itos))))
    except OSError as error:
        raise UserError(f"meta={path} cannot be read: {error.strerror}") from error
    except Exception as error:  # pickle raises a dozen types for damaged files
        raise UserError(
            f"meta={path}: not a pickle of a dict of texts and integers, as nanoGPT's "
            f"data/shakespeare_char/prepare.py writes it ({error}); no code in it was run"
        ) from error


def _read(path: str | Path) -> Any:
    try:
        return read_archive(Path(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # zipfile and torch raise a dozen types for damaged or hostile files
        raise UserError(
            f"{path}: damaged, or not a file of plain tensors ({error}); no code in it was run"
        ) from error
