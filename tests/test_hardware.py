"""The choice of a precision, and memory that glibc keeps."""

import math
import os
import platform
import subprocess
import sys

import pytest
import torch

from gpt_lightning.model import BigramConfig, GPTConfig
from gpt_lightning.training import hardware
from gpt_lightning.training.hardware import MIN_BF16_WIDTH, choose_compile, choose_precision


@pytest.mark.parametrize(
    ("fp32", "expected", "share"), [(1.26, "bf16-mixed", "0.79"), (1.25, "32-true", "0.80")]
)
def test_a_cpu_trains_in_bf16_if_that_is_faster_by_a_quarter(monkeypatch, fp32, expected, share):
    seconds = {torch.float32: fp32, torch.bfloat16: 1.0}
    monkeypatch.setattr(hardware, "product_seconds", lambda dtype, n_embd: seconds[dtype])
    reason = f"matrix products in bf16 take {share} of fp32's time here"
    assert choose_precision("cpu", MIN_BF16_WIDTH) == (expected, reason)


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [
        ("cpu", True, "32-true"),  # a narrow model
        ("cuda", True, "bf16-mixed"),
        ("cuda", False, "32-true"),  # this GPU only emulates bf16
        ("mps", True, "32-true"),
    ],
)
def test_all_else_is_chosen_without_a_measurement(monkeypatch, device, native, expected):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(hardware, "product_seconds", lambda *_: pytest.fail("measured"))
    assert choose_precision(device, MIN_BF16_WIDTH - 1)[0] == expected


BIG = GPTConfig(n_layer=6, n_embd=384)


@pytest.mark.parametrize(
    ("device", "config", "tokens", "expected"),
    [
        ("cuda", BIG, 5e7, True),
        ("cuda", BIG, 4e7, False),  # compiling takes longer than it saves
        ("cuda", BIG, math.inf, True),
        ("cuda", BigramConfig(), 1e15, False),
        ("cpu", BIG, 1e15, False),
    ],
)
def test_long_runs_on_a_cuda_gpu_are_compiled(monkeypatch, device, config, tokens, expected):
    monkeypatch.setattr(hardware, "compiler_fault", lambda device: "")
    assert choose_compile(device, config, tokens) is expected


def test_without_a_compiler_a_long_run_is_not_compiled_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "compiler_fault", lambda device: "no compiler")
    assert not choose_compile("cuda", BIG, 1e15)
    assert capsys.readouterr().err == "not compiled: no compiler\n"


COUNT_PAGE_FAULTS = """
import resource, torch
from gpt_lightning.training.hardware import keep_freed_memory

def page_faults():  # of 80 MiB in blocks of 1 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        held = [torch.ones(1 << 18) for _ in range(8)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults())
keep_freed_memory()
page_faults()
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_reused_without_page_faults():
    # glibc adapts its threshold as it goes; a threshold that is set stays, so blocks are returned
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    returned, kept = map(int, done.stdout.split())
    assert returned > 1000 and kept < 100
