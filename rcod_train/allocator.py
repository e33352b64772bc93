"""Memory of a training on the CPU: what one step gives back, the next one needs again."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc not to give freed memory back to the system; whether it could be asked.

    By default large tensors are mapped anew each time, and the kernel fills them with zeros page by
    page: a tenth to a sixth of a step of nano. The process keeps what it had at its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    return bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
