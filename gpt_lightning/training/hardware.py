"""What depends on the hardware: precision, compilation, and the C library's memory."""

import ctypes
import platform
import sys
import timeit

import torch

from gpt_lightning.model import ModelConfig

MIN_BF16_WIDTH = 128  # in narrower models the conversions cost more than faster products save
MAX_WIDTH = 1024  # that is timed: wider models have about the same ratio
# On an H200, compiling takes 15 to 20 s. For each activation (one channel of one layer for one
# token), a compiled step takes 0.27 ns less: docs/benchmarks.md#gpu.
COMPILE_FROM = 1e11  # activations in a run
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def choose_precision(device: str, n_embd: int) -> tuple[str, str]:
    """The Trainer's `precision` for a model of `n_embd` channels, and the reason in a few words.

    On a CPU a matrix product of the feed-forward layer is timed in fp32 and bf16, which takes about
    20 milliseconds. bf16 must be faster by a quarter, so that noise does not change the choice.
    """
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU computes in bf16"
        return "32-true", "this GPU does not compute in bf16"
    if device != "cpu":
        return "32-true", "the safe choice on this device"
    if n_embd < MIN_BF16_WIDTH:
        return "32-true", "a narrow model"
    n_embd = min(n_embd, MAX_WIDTH)
    fp32, bf16 = product_seconds(torch.float32, n_embd), product_seconds(torch.bfloat16, n_embd)
    reason = f"matrix products in bf16 take {bf16 / fp32:.2f} of fp32's time here"
    return "bf16-mixed" if fp32 > 1.25 * bf16 else "32-true", reason


def product_seconds(dtype: torch.dtype, n_embd: int) -> float:
    """Seconds of a (1024, n_embd) x (n_embd, 4 * n_embd) product: the fastest of ten."""
    x = torch.ones(1024, n_embd, dtype=dtype)
    w = torch.ones(n_embd, 4 * n_embd, dtype=dtype)
    return min(timeit.repeat(lambda: x @ w, number=1, repeat=10))


def choose_compile(device: str, config: ModelConfig, tokens: float) -> bool:
    """Whether compiling saves more time than it takes, in a run that reads so many `tokens`.

    The answer depends on sizes alone, not on a measurement, so that a repeated run is the same.
    """
    activations = tokens * getattr(config, "n_layer", 0) * getattr(config, "n_embd", 0)
    if device != "cuda" or activations < COMPILE_FROM:
        return False
    fault = compiler_fault(torch.device(device))
    if fault:
        print(f"not compiled: {fault}", file=sys.stderr)
    return not fault


def compiler_fault(device: torch.device) -> str:
    """Why torch.compile cannot compile a sum, most often because a compiler is missing; or ""."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # torch raises many types here, which are private
        reason = str(error).partition("\n")[0]
        return (
            f"torch.compile does not work on this machine ({reason}); it needs a C++ compiler, and "
            "Triton for a GPU"
        )
    return ""


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the system after every tensor.

    By default glibc returns large blocks, and each new one costs a page fault for every 4 KiB:
    23,000 faults in a training step of 4 layers x 256 channels. docs/experiments.md has the
    timings. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # 32 MiB, the largest value that glibc accepts
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
