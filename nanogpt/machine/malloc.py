"""Settings of the C library's memory allocator, glibc's malloc on Linux.

Example: keep_freed_memory()      # before training on a CPU
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt: free bytes above which memory is returned; size from which a block is mapped."""

VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
"""Environment variables with which a user sets these parameters."""


def keep_freed_memory() -> None:
    """Let malloc keep freed memory for the next allocation, unless the user has set its parameters.

    PyTorch's CPU allocator is malloc. By default it gives large blocks back to the system, and each page that
    an update needs again costs a page fault: up to a quarter of a small model's time (bench/RESULTS.md).
    """
    if sys.platform != "linux" or VARIABLES & os.environ.keys():
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # other C libraries (musl) do not have it
        library.mallopt(M_MMAP_THRESHOLD, 2**30)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
