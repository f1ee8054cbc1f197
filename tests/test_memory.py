"""Freed memory is kept, as the system's own count of page faults tells."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import sys

import torch

from gpt_lightning.training.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def churn():
    for _ in range(10):
        held = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
        del held

churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_kept_memory_comes_without_page_faults():
    assert faults("given back") > 1000  # 320 MiB in pages of 4 KiB, or fewer with large pages
    assert faults("kept") < 100


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    from gpt_lightning.training import memory

    def never(*args):
        raise AssertionError("loaded a library")

    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", never)
    memory.keep_freed_memory()
