"""Freed memory is kept, as the system's own count of page faults tells."""

import os
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

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def churn():
    for _ in range(10):
        held = [torch.ones(1 << 18) for _ in range(8)]  # 1 MiB each
        del held

churn()
before = faults()
churn()
print(faults() - before)
"""


def faults(how: str) -> int:
    # glibc moves its threshold as it goes; set, it stays, and every block is given back
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_kept_memory_comes_without_page_faults():
    assert faults("given back") > 1000  # 80 MiB in pages of 4 KiB
    assert faults("kept") < 100


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    from gpt_lightning.training import memory

    def never(*args):
        raise AssertionError("loaded a library")

    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", never)
    memory.keep_freed_memory()
