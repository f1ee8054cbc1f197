"""bf16 or fp32, by a quick measurement of the processor at hand."""

import time

import torch

NARROW = 128  # channels; below, casting costs more than faster products save


def choose_precision(device: str, n_embd: int) -> tuple[str, str]:
    """The Trainer's `precision` for a model of `n_embd` channels, and the reason in a few words.

    On a CPU the feed-forward's product is timed in both, for some 20 milliseconds. Only a clear
    gain counts, so that the answer is the same in every run on a machine.
    """
    if device == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16-mixed", "this GPU has it") if able else ("32-true", "this GPU has no bf16")
    if device != "cpu" or n_embd < NARROW:
        return "32-true", "a small model" if device == "cpu" else "safe everywhere"
    seconds = {dtype: product_seconds(dtype, n_embd) for dtype in (torch.float32, torch.bfloat16)}
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    return (
        "bf16-mixed" if gain > 1.25 else "32-true",
        f"matrix products in bf16 take {1 / gain:.2f} of fp32's time here",
    )


def product_seconds(dtype: torch.dtype, n_embd: int) -> float:
    """Seconds of one (1024, C) x (C, 4C) product, the quickest of ten."""
    x = torch.ones(1024, n_embd, dtype=dtype)
    w = torch.ones(n_embd, 4 * n_embd, dtype=dtype)
    found = []
    for _ in range(10):
        start = time.perf_counter()
        x @ w
        found.append(time.perf_counter() - start)
    return min(found)
