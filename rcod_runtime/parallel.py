"""Parts of an image: bands of rows, and work on several at once."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")

WIDE = 1024  # pixels
CGROUPS = Path("/sys/fs/cgroup")
MAX_THREADS = 4  # memory traffic, not arithmetic, is the limit of such work


def row_bands(height: int, rows: int = 64, width: int = WIDE) -> Iterator[slice]:
    """All rows, from top to bottom, some at a time: few enough for the processor's cache, and the
    more the narrower they are, since each band costs the same."""
    rows *= max(1, WIDE // width)
    for top in range(0, height, rows):
        yield slice(top, min(height, top + rows))


def in_parallel(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """``work`` on every part, once, in this thread and in others that end with this call; results
    in the order of parts. After an error no part is begun.

    For work that leaves Python's lock most of the time: numpy, Pillow, zlib.
    """
    parts = list(parts)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    waiting, lock = iter(range(len(parts))), threading.Lock()

    def take_turns() -> None:
        try:
            while not errors:
                with lock:
                    index = next(waiting, None)
                if index is None:
                    return
                results[index] = work(parts[index])
        except BaseException as exc:
            errors.append(exc)

    others = []
    for _ in range(min(MAX_THREADS, cpus_available(), len(parts)) - 1):
        thread = threading.Thread(target=take_turns)
        try:
            thread.start()
        except RuntimeError:  # no more allowed, or the interpreter ends: this one does it
            break
        others.append(thread)
    take_turns()
    for thread in others:
        thread.join()
    if errors:
        raise errors.pop(0)
    return [results[index] for index in range(len(parts))]


class Turns:
    """A lock that threads get in the order in which they asked for it: one that asks again at once
    does not get it before those that wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: deque[object] = deque()

    def __enter__(self) -> None:
        ticket = object()
        with self._changed:
            try:
                self._asked.append(ticket)
                self._changed.wait_for(lambda: self._asked[0] is ticket)
            except BaseException:  # Ctrl-C
                with contextlib.suppress(ValueError):
                    self._asked.remove(ticket)
                self._changed.notify_all()
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._asked.popleft()
            self._changed.notify_all()


def cpus_available() -> int:
    """CPUs this process may use, which can be fewer than the machine has."""
    return threads_allowed() or _cpus_seen()


def threads_allowed() -> int:
    """As many as the time that a container has, where that is less than the processors it sees,
    which libraries go by; else 0."""
    quota = cpu_quota()
    return quota if quota is not None and quota < _cpus_seen() else 0


def _cpus_seen() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cpu_quota() -> int | None:
    """CPUs whose time a container's limit allows (docker --cpus, Kubernetes), rounded up; None: all
    that it sees."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups 2, 1
        try:
            text = " ".join((CGROUPS / name).read_text(encoding="ascii") for name in files)
            quota, period = (int(number) for number in text.split())
        except (OSError, ValueError):  # no such file, or max
            continue
        if quota > 0 and period > 0:
            return max(1, -(-quota // period))
    return None
