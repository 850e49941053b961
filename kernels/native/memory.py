"""Memory that a step frees stays with the process."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
LARGEST_KEPT_BYTES, GROWTH_BYTES = 1 << 30, 64 << 20


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed, up to 1 GiB apiece; False where the C library has no such setting.

    By default every tensor of more than a few MB is mapped anew and unmapped when freed, and the kernel fills its pages
    with zeros at the first touch: 12 to 20 % of a training step on the CPU (kernels/README.md). The price: the process
    stays as large as its largest step. For processes that repeat one step, not for tools that must stay small.
    """
    library = ctypes.CDLL(None)
    try:
        settings = (
            library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES), library.mallopt(M_TRIM_THRESHOLD, -1),
            library.mallopt(M_TOP_PAD, GROWTH_BYTES),
        )
    except AttributeError:
        return False
    return all(settings)
