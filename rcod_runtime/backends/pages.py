"""Pages of a mapped file that were read and are in the way."""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

MAPS = Path("/proc/self/maps")
MADV_DONTNEED = 4  # of Linux; for a file's pages that nobody wrote: read them again when asked


def forget_pages(path: Path, held: Iterable[int]) -> None:
    """Take what of a file, and of files whose names go on from its own, is in this process's
    memory out of it; who reads there again gets the same bytes from the file.

    Mappings that can't be written alone. The kernel would take the pages itself when memory is
    short; until then they count as this process's. Does nothing where there is no Linux.

    Args:
        held: addresses, looked at where the file is mapped alone. A mapping without one of them is
            left alone: another thread may take it down at any moment, and what then comes in its
            place would be wiped out.
    """
    prefix = os.path.realpath(path)
    try:
        maps = os.fsdecode(MAPS.read_bytes())
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    spans = []
    for line in filter(None, maps.split("\n")):
        span, permissions, *_, name = line.split(maxsplit=5)
        if name.startswith(prefix) and permissions.startswith("r-"):
            spans.append([int(address, 16) for address in span.split("-")])
    addresses = sorted(held) if spans else []
    for begin, end in spans:
        if bisect_left(addresses, begin) < bisect_left(addresses, end):
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)
