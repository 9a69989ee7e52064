"""The C library's heap, which keeps what large tensors leave behind."""

from __future__ import annotations

import ctypes
import sys

# Blocks from this size on get pages of their own.
_LARGE = 4 << 20
_M_MMAP_THRESHOLD = -3  # in glibc's malloc.h


def return_large_blocks() -> bool:
    """Have blocks of 4 MiB and more go back to the system when they are freed; glibc alone.

    Left to itself glibc raises that size to 32 MiB as such blocks are freed, and keeps smaller
    ones; then it cannot put an aligned block into a hole of just its size. Weights that come and
    go, layer by layer, fill the memory with holes until nearly all of them seem to be there. New
    pages cost time, which an exchange between processes hides (docs/log.md).

    Returns:
        Whether the C library has been told.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _LARGE) == 1
