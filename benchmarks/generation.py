"""Characters written a second: models of nanoGPT's GPU shape on a CPU, weights as initialised."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.nanogpt import NanoGPT
from benchmarks.report import table
from gpt_lightning import Writer
from gpt_lightning.data.tokenizers import CharTokenizer
from gpt_lightning.generation.precision import for_writing
from gpt_lightning.generation.sampling import Sampling
from gpt_lightning.model import build_model

VOCABULARY = 65
LENGTH = 255  # from one character, all within the context of 256
SHAPE = {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}


def of_ours(name: str, rows: int, precision: str = "auto"):
    """A function that lets our model write, through `Writer`, as `generate` does."""
    torch.manual_seed(1337)
    tokenizer = CharTokenizer.train([chr(33 + i) for i in range(VOCABULARY)])
    model = build_model(name, vocab_size=VOCABULARY, **SHAPE)
    writer = Writer(for_writing(model.eval(), precision), tokenizer)

    def write() -> None:
        settings = {"max_new_tokens": LENGTH, "num_samples": rows, "sampling": Sampling(1.0)}
        for _ in writer.stream("!", **settings):
            pass

    return write


def of_nanogpt(peer: NanoGPT):
    """A function that lets nanoGPT's model write, with the call that its sample.py makes."""
    torch.manual_seed(1337)
    module = peer.model()
    settings = {"vocab_size": VOCABULARY, "dropout": 0.0, "bias": False, **SHAPE}
    model = module.GPT(module.GPTConfig(**settings)).eval()

    @torch.no_grad()
    def write() -> None:
        model.generate(torch.zeros(1, 1, dtype=torch.long), LENGTH, temperature=1.0, top_k=200)

    return write


def of_transformers():
    """A function that lets GPT-2 of `transformers` write, with its cache; None without it."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        print("transformers is not installed: its row is left out (pip install transformers)")
        return None
    torch.manual_seed(1337)
    settings = {"n_positions": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **settings)).eval()
    ids = torch.zeros(1, 1, dtype=torch.long)
    how = {"do_sample": True, "use_cache": True, "min_new_tokens": LENGTH, "pad_token_id": 0}

    @torch.no_grad()
    def write() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, **how)

    return write


def measure(checkout: Path, rounds: int):
    """All write in turn; medians. The peers write one text, ours one and 32 side by side."""
    with tempfile.TemporaryDirectory() as folder:
        writers = {
            "ours (`gpt`)": (of_ours("gpt", 1), 1),
            "ours, 32 texts": (of_ours("gpt", 32), 32),
            "ours, in fp32": (of_ours("gpt", 1, "fp32"), 1),
            "ours, in fp32, 32 texts": (of_ours("gpt", 32, "fp32"), 32),
            "ours (`lecture`)": (of_ours("lecture", 1), 1),
            "`lecture`, 32 texts": (of_ours("lecture", 32), 32),
            "nanoGPT": (of_nanogpt(NanoGPT(checkout, Path(folder))), 1),
            "transformers": (of_transformers(), 1),
        }
        writers = {name: pair for name, pair in writers.items() if pair[0]}
        runs: dict[str, list[float]] = {name: [] for name in writers}
        for _ in range(rounds):
            for name, (write, rows) in writers.items():
                start = time.perf_counter()
                write()
                runs[name].append(LENGTH * rows / (time.perf_counter() - start))
    rate = {name: statistics.median(values) for name, values in runs.items()}
    base = rate["nanoGPT"]
    rows = [[name, f"{value:,.0f}", f"{value / base:.1f}"] for name, value in rate.items()]
    header = ["", "characters a second", "of nanoGPT's"]
    return {"length": LENGTH, "shape": SHAPE, "characters_per_second": runs}, table(header, rows)
