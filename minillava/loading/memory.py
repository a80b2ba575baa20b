"""Two settings of the C library's allocator (glibc, Linux); on other systems nothing happens."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30  # more than any layer needs


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks for the next layer, which needs as much.

    By default it returns them to the system and requests them again page by page, which can add a
    fifth to the time of a prefill. This affects the whole process, so programs call it, not load().
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(MMAP_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Return freed memory to the system now.

    glibc keeps freed blocks below 32 MB. Those left by converting a weight lie between the weights
    that stay, and would add up to a third of a 4-bit model.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
