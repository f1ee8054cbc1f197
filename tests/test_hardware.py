import os
import platform
import subprocess
import sys

import pytest
import torch

from gpt_lightning.training import hardware
from gpt_lightning.training.hardware import (
    MIN_BF16_WIDTH,
    choose_precision,
    keep_freed_memory,
    product_seconds,
)


@pytest.fixture
def no_measurement(monkeypatch):
    def fail(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(hardware, "product_seconds", fail)


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected", "share"),
    [
        (10.0, 1.0, "bf16-mixed", "0.10"),
        (1.26, 1.0, "bf16-mixed", "0.79"),
        (1.25, 1.0, "32-true", "0.80"),
        (1.0, 4.0, "32-true", "4.00"),
    ],
)
def test_a_cpu_trains_in_bf16_if_that_is_faster_by_a_quarter(
    monkeypatch, fp32, bf16, expected, share
):
    widths = []

    def product(dtype, n_embd):
        widths.append(n_embd)
        return {torch.float32: fp32, torch.bfloat16: bf16}[dtype]

    monkeypatch.setattr(hardware, "product_seconds", product)
    chosen, reason = choose_precision("cpu", MIN_BF16_WIDTH)
    assert chosen == expected and widths == [MIN_BF16_WIDTH] * 2
    assert reason == f"matrix products in bf16 take {share} of fp32's time here"


def test_a_narrow_model_trains_in_fp32_on_a_cpu(no_measurement):
    assert choose_precision("cpu", MIN_BF16_WIDTH - 1) == ("32-true", "a narrow model")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_trains_in_bf16_if_it_does_not_emulate_it(
    monkeypatch, no_measurement, native, expected
):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_precision("cuda", 16)[0] == expected


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_train_in_fp32(no_measurement, device):
    assert choose_precision(device, 384)[0] == "32-true"


def test_the_measurement_is_positive_and_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert product_seconds(torch.bfloat16, 128) > 0
    assert choose_precision("cpu", 128)[0] in ("32-true", "bf16-mixed")
    assert torch.equal(torch.get_rng_state(), before)


COUNT_PAGE_FAULTS = """
import resource
import sys

import torch

from gpt_lightning.training.hardware import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def allocate():
    for _ in range(10):
        held = [torch.ones(1 << 18) for _ in range(8)]  # 1 MiB each
        del held

allocate()
before = page_faults()
allocate()
print(page_faults() - before)
"""


def page_faults(argument: str) -> int:
    # glibc adapts its threshold as it goes; a threshold that is set stays, so blocks are returned
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_reused_without_page_faults():
    assert page_faults("return") > 1000  # 80 MiB in pages of 4 KiB
    assert page_faults("keep") < 100


def test_other_c_libraries_are_not_touched(monkeypatch):
    def fail(*args):
        raise AssertionError("loaded a library")

    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(hardware.ctypes, "CDLL", fail)
    keep_freed_memory()
