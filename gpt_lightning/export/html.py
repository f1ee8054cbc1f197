"""One HTML file that runs a model: weights, engine and page, without a server or a network.

The files in `page/` are put together here. `engine.js` is the model in JavaScript; it runs in a
worker. The page's policy forbids it to load anything.
"""

import base64
import json
import math
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path, PurePath
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from torch import nn

from gpt_lightning.checkpoint import COMMAND, KEY, quoted, run_history
from gpt_lightning.data.bpe import BYTE_CHARACTERS
from gpt_lightning.data.tokenizers import Tokenizer
from gpt_lightning.errors import UserError, one_of
from gpt_lightning.files import write_atomically
from gpt_lightning.generation.generator import TextGenerator
from gpt_lightning.generation.sampling import NOT_FINITE
from gpt_lightning.model import CONFIGS, config_from_dict, config_to_dict, num_parameters

PRECISIONS = ("int8", "fp16", "fp32")
FP16_MAX = 65_504
LARGEST = {"int8": 127 * FP16_MAX, "fp16": FP16_MAX, "fp32": math.inf}  # weight
PAGE = Path(__file__).parent / "page"


@dataclass
class Rung:
    """A model's place in a series in which each model adds one idea, as in the lecture.

    Args:
        title: its name.
        idea: what it adds, a sentence.
        links: from a word such as "next" to the file and the title of a page beside this one.
    """

    title: str
    idea: str
    links: dict[str, tuple[str, str]]

    def html(self) -> str:
        """The sentence, and the links."""
        links = [
            f'<a href="{quote(file)}">{word.capitalize()}: {escape(title)}</a>'
            for word, (file, title) in self.links.items()
        ]
        idea = escape(self.idea[:1].upper() + self.idea[1:])
        return f'<p>{idea}</p>\n<nav class="row">{" ".join(links)}</nav>'


def export_html(
    path: Path,
    checkpoint: dict[str, Any],
    out: Path,
    precision: str = "int8",
    rung: Rung | None = None,
) -> None:
    """Write a page that runs the model of a checkpoint.

    Args:
        path: the checkpoint's file, for messages.
        checkpoint: what `read_checkpoint` has read from it.
        out: the page; an existing file is replaced.
        precision: of the weights in it: int8 with a scale for each row, fp16 or fp32. The page
            computes in fp32.
        rung: for a model of a series, what the page says about its place.

    Raises:
        UserError: for an unknown precision, weights that are not finite or too large for it, or a
            damaged history.
        OSError: if the file cannot be written.
    """
    one_of(PRECISIONS, precision=precision)
    generator = TextGenerator.from_checkpoint(checkpoint, path, precision="fp32")
    entry = checkpoint[KEY]
    tensors, weights = pack(generator.model, precision)
    description = {
        "precision": precision,
        "config": config_to_dict(config_from_dict(entry["model"])),
        "tensors": tensors,
        "tokenizer": describe_tokenizer(generator.tokenizer),
        "start": generator.encode_prompt(""),
        "run": describe_run(checkpoint, path),
    }
    parameters = num_parameters(generator.model)
    size = f"{parameters / 1e6:.1f} million" if parameters >= 1e5 else f"{parameters:,}"
    title = f"{rung.title}: language model" if rung else "Language model"
    corpus = entry["corpus"]["name"]
    if PurePath(corpus).is_absolute():  # the page may be shared: without the user's folders
        corpus = PurePath(corpus).name
    page = Template(read("page.html")).substitute(
        title=escape(f"{title}, {size} parameters"),
        rung=rung.html() if rung else "",
        corpus=escape(corpus),
        css=read("page.css"),
        engine=read("engine.js"),
        page=read("page.js"),
        # "<" could end the script
        description=json.dumps(description, separators=(",", ":")).replace("<", "\\u003c"),
        weights=base64.b64encode(weights).decode(),
    )
    with write_atomically(out) as file:
        file.write(page.encode(errors="replace"))


def read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def pack(model: nn.Module, precision: str) -> tuple[list[dict[str, Any]], bytes]:
    """Name, shape, dtype and offset in bytes of each weight, and the bytes of all.

    Raises:
        UserError: if a weight is not finite in this precision.
    """
    described, packed = [], bytearray()
    for name, tensor in model.state_dict().items():
        if name.startswith("multi_token_heads."):
            continue  # generation does not use them
        weight = tensor.float().numpy()
        if not np.isfinite(weight).all():
            raise UserError(NOT_FINITE)
        dtype = "fp32" if weight.ndim == 1 else precision
        if abs(weight).max(initial=0) > LARGEST[dtype]:
            raise UserError(
                f"precision={precision} cannot hold {name}, which exceeds {LARGEST[dtype]:,}; use "
                "fp32"
            )
        packed += bytes(-len(packed) % 4)  # JavaScript's arrays must be aligned
        entry = {"name": name, "shape": weight.shape, "dtype": dtype, "offset": len(packed)}
        described.append(entry)
        if dtype == "int8":
            # above 0, also in fp16
            scale = np.maximum(abs(weight).max(axis=1, initial=0) / 127, 1e-6).astype("<f2")
            rounded = (weight / scale[:, None].astype("<f4")).round().clip(-127, 127)
            packed += scale.tobytes() + rounded.astype(np.int8).tobytes()
        else:
            packed += weight.astype({"fp16": "<f2", "fp32": "<f4"}[dtype]).tobytes()
    return described, bytes(packed)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Kind, the bytes of each token (one character a byte), and the merges of BPE as ids."""
    merges = []
    if tokenizer.kind == "bpe":
        ids = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
        for line in tokenizer.state()["vocabulary"].splitlines():
            left, right = line.split(" ")
            merges.append((ids[left], ids[right], ids.setdefault(left + right, len(ids))))
    tokens = [token.decode("latin-1") for token in tokenizer.bytes_of_tokens()]
    return {"kind": tokenizer.kind, "tokens": tokens, "merges": merges}


def describe_run(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the page says about the training.

    Raises:
        UserError: if the history of the run is not as `run_history` describes it.
    """
    entry = checkpoint[KEY]
    try:
        history = dict(run_history(checkpoint))
        losses = [(int(step), float(loss)) for step, loss in history.get("val_losses", ())]
        samples = [(int(step), str(text)) for step, text in history.get("samples", ())]
        floor = history.get("floor")
        floor = float(floor) if floor is not None and math.isfinite(floor) else None
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(f"ckpt_path={path}: the history of its run is damaged") from error
    # numbers that are not finite as text: JavaScript's JSON has none
    settings = json.loads(json.dumps(entry["settings"] or {}), parse_constant=str)
    return {
        "steps": checkpoint["global_step"],
        "losses": [(step, loss) for step, loss in losses if math.isfinite(loss)],
        "samples": samples,
        "floor": floor,
        "settings": {name: part for name, part in settings.items() if isinstance(part, dict)},
        "command": repeat_command(settings, entry["model"]["name"]),
    }


def repeat_command(settings: dict[str, Any], model: str) -> str | None:
    """The command that repeats a run; None if its settings do not say all."""
    if "trainer" not in settings or settings.get("start"):  # not by `fit`, or from old weights
        return None
    defaults = asdict(CONFIGS[model]())
    flags = [
        f"--{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for section, part in settings.items()
        if isinstance(part, dict)
        for name, value in part.items()
        # null is the default of all others
        if value != (defaults.get(name) if section == "model" else None)
    ]
    if "seed_everything" in settings:
        flags.append(f"--seed_everything={settings['seed_everything']}")
    return f"{COMMAND} fit {quoted(*flags)}"
