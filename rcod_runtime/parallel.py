"""Parts of an image: bands of rows, and work on several at once."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")

WIDE = 1024  # pixels
MAX_THREADS = 4  # memory traffic, not arithmetic, is the limit of such work


def row_bands(height: int, rows: int = 64, width: int = WIDE) -> Iterator[slice]:
    """All rows, from top to bottom, some at a time: few enough for the processor's cache, and the
    more the narrower they are, since each band costs the same."""
    rows *= max(1, WIDE // width)
    for top in range(0, height, rows):
        yield slice(top, min(height, top + rows))


def in_parallel(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """``work`` on every part, in threads that end with this call, or in the caller's where there is
    one part or one processor; results in the order of parts.

    For work that leaves Python's lock most of the time: numpy, Pillow, zlib.
    """
    parts = list(parts)
    threads = min(MAX_THREADS, cpus_available(), len(parts))
    if threads < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))


class Turns:
    """A lock that threads get in the order in which they asked for it: one that asks again at once
    does not get it before those that wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: deque[object] = deque()

    def __enter__(self) -> None:
        ticket = object()
        with self._changed:
            self._asked.append(ticket)
            try:
                self._changed.wait_for(lambda: self._asked[0] is ticket)
            except BaseException:  # Ctrl-C
                self._asked.remove(ticket)
                self._changed.notify_all()
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._asked.popleft()
            self._changed.notify_all()


def cpus_available() -> int:
    """CPUs this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
