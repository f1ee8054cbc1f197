"""How large a model of these settings is, told before it is built."""

import os
import re
from pathlib import Path

from gpt_lightning.model.gpt import NGRAMS, PAIRS, GPTConfig
from gpt_lightning.model.lecture import LectureConfig

LAYER = 1 << 15  # bytes that a layer's Python objects take, however small its weights are


def refuse_too_large(name: str, config: GPTConfig | LectureConfig, times: int = 1) -> None:
    """Raise a ValueError for a model whose weights, so many times, have no room in memory."""
    needed = 4 * (times * numbers(name, config) + table_numbers(name, config))
    needed += config.n_layer * LAYER * (name != "bigram")
    if needed > memory():
        raise ValueError(
            f"--model.n_layer={config.n_layer} and --model.n_embd={config.n_embd} with "
            f"--data.block_size={config.block_size} and {config.vocab_size:,} tokens take "
            f"{needed / 1e9:.3g} GB, where this machine has {memory() / 1e9:.3g} free; choose "
            "smaller ones"
        )


def numbers(name: str, config: GPTConfig | LectureConfig) -> int:
    """How many numbers the weights are, without building them."""
    V, T, C = config.vocab_size, config.block_size, config.n_embd
    if name == "bigram":
        return V * V
    if name == "gpt":
        longer = sum(min(V**n, NGRAMS) for n in range(3, config.n_gram + 1))
        return (2 * V + min(V**2, PAIRS) + longer) * C + config.n_layer * (12 * C + V) * C
    bias, width = int(config.bias), config.ffwd * C
    norm = config.norm * (1 + bias) * C
    layer = 3 * C * C + norm + config.proj * (C + bias) * C
    if config.ffwd:
        layer += norm + (C + bias) * width + config.proj * (width + bias) * C
    return (V + T) * C + config.n_layer * layer + norm + (C + 1) * V


def table_numbers(name: str, config: GPTConfig | LectureConfig) -> int:
    """How many numbers a model computes for its positions."""
    return 2 * config.block_size * (config.n_embd // config.n_head) if name == "gpt" else 0


def memory() -> int:
    """Bytes of memory that this machine has free, where that can be asked; else a great many."""
    found = [1 << 50]
    try:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        found.append(int(available[1]) * 1024)
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # of a container
    except (AttributeError, OSError, TypeError, ValueError):
        pass
    return min(found)
