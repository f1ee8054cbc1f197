"""Speed of generation on a CPU, of ours, nanoGPT and transformers; nanoGPT's GPU shape."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import markdown, round_figure
from benchmarks.nanogpt import NanoGPT
from gpt_lightning import GPTConfig, LectureConfig, TextGenerator
from gpt_lightning.checkpoint import KEY, describe
from gpt_lightning.data.tokenizers import CharTokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.generation.quantize import quantize
from gpt_lightning.model import build_model

VOCAB_SIZE = 65
LENGTH = 255  # characters after the first one, all within the context of 256
SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384}
TOKENIZER = CharTokenizer("".join(chr(33 + i) for i in range(VOCAB_SIZE)))


def add_arguments(parser):
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")


def ours(config_class, num_samples: int, precision: str = "auto"):
    """A function that generates with our model, through `TextGenerator`."""
    torch.manual_seed(1337)
    model = build_model(config_class(vocab_size=VOCAB_SIZE, block_size=256, **SHAPE)).eval()
    return texts(TextGenerator(quantize(model, precision), TOKENIZER), num_samples)


def texts(generator: TextGenerator, num_samples: int):
    return lambda: generator.generate("!", max_new_tokens=LENGTH, num_samples=num_samples)


def in_onnxruntime() -> TextGenerator:
    """The default model, exported to ONNX."""
    from gpt_lightning.export.onnx import export_onnx

    torch.manual_seed(1337)
    model = build_model(GPTConfig(vocab_size=VOCAB_SIZE, block_size=256, **SHAPE))
    checkpoint = {
        "global_step": 0,
        "state_dict": {f"net.{name}": weight for name, weight in model.state_dict().items()},
        KEY: describe(model.config, TOKENIZER.state(), {}, None),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(path, checkpoint, path)
        return TextGenerator.load(path)


def of_nanogpt(module):
    """A function that generates with nanoGPT's model, by the call of its sample.py."""
    torch.manual_seed(1337)
    config = module.GPTConfig(
        vocab_size=VOCAB_SIZE, block_size=256, dropout=0.0, bias=False, **SHAPE
    )
    model, ids = module.GPT(config).eval(), torch.zeros(1, 1, dtype=torch.long)
    return torch.no_grad()(lambda: model.generate(ids, LENGTH, temperature=1.0, top_k=200))


def of_transformers():
    """A function that generates with GPT-2 of `transformers`, with its cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1337)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_positions=256, **SHAPE)).eval()
    ids = torch.zeros(1, 1, dtype=torch.long)
    settings = {"do_sample": True, "use_cache": True, "pad_token_id": 0}
    settings |= {"min_new_tokens": LENGTH, "max_new_tokens": LENGTH}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def measure(args) -> tuple[dict, str]:
    """All generate in turn, from initial weights: medians of the characters a second."""
    nanogpt = NanoGPT(args.nanogpt).model()
    sides = {
        "ours (`gpt`)": (ours(GPTConfig, 1), 1),
        "ours, 32 texts": (ours(GPTConfig, 32), 32),
        "ours, in fp32": (ours(GPTConfig, 1, "fp32"), 1),
        "ours, in fp32, 32 texts": (ours(GPTConfig, 32, "fp32"), 32),
        "ours (`lecture`)": (ours(LectureConfig, 1), 1),
        "`lecture`, 32 texts": (ours(LectureConfig, 32), 32),
        "nanoGPT": (of_nanogpt(nanogpt), 1),
    }
    try:
        generator = in_onnxruntime()
        sides["ours, in onnxruntime"] = texts(generator, 1), 1
        sides["ours, in onnxruntime, 32 texts"] = texts(generator, 32), 32
    except (ImportError, UserError) as error:
        print(f'without onnxruntime: {error} (pip install -e ".[export]")')
    try:
        sides["transformers"] = of_transformers(), 1
    except ImportError:
        print("without transformers, which is not installed (pip install transformers)")
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (generate, num_samples) in sides.items():
            start = time.perf_counter()
            generate()
            seconds = time.perf_counter() - start
            speeds[name].append(round_figure(LENGTH * num_samples / seconds))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    rows = [[name, f"{m:,.0f}", f"{m / medians['nanoGPT']:.1f}"] for name, m in medians.items()]
    table = markdown(["", "characters a second", "of nanoGPT's"], rows)
    return {"length": LENGTH, "shape": SHAPE, "characters_per_second": speeds}, table
