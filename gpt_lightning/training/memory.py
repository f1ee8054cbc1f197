"""Memory on a CPU: kept by the process from step to step."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what tensors leave behind for the next ones, in place of the system.

    By default a block of more than 128 KiB or so goes back when it is freed, and the next one comes
    page by page, each with a fault and zeroed: 23,000 faults a step of 4 layers x 256 channels.
    What that costs is in docs/experiments.md. Other C libraries than glibc are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # 32 MiB, the most that it takes
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
