"""Streams, events and captured graphs: work waits until somebody synchronises."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.runtime.simulated.memory import Violation

Work = Callable[[], None]


@dataclass(eq=False)
class Event:
    """``records`` counts how often it was recorded, ``reached`` how often that was executed."""

    timing: bool
    records: int = 0
    reached: int = 0
    tick: int = 0


@dataclass(eq=False)
class Graph:
    """Work recorded from a stream, with the addresses it had.

    ``thread`` captures it in a ``mode`` (of cudaStreamCaptureMode); ``broken`` by a call that a
    capture does not allow.
    """

    work: list[Work] = field(default_factory=list)
    thread: int = 0
    mode: int = 1
    broken: bool = False


@dataclass(eq=False)
class Stream:
    """A queue. An item is work, or (event, n): wait until it is reached for the n-th time.

    As a number it is its handle; ``order`` is that of creation, the same in every run.
    """

    queue: deque[Work | tuple[Event, int]] = field(default_factory=deque)
    capture: Graph | None = None
    handle: int | None = None
    order: int = field(default_factory=itertools.count().__next__)

    def __int__(self) -> int:
        return self.handle or id(self)


class Scheduler:
    """Runs what is due. Between streams the order is drawn from the seed, as a GPU's would be."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.streams: set[Stream] = set()
        self.default = Stream(handle=1)  # is always there
        self.ticks = 0

    def enqueue(self, stream: Stream, work: Work) -> None:
        if stream.capture is not None:
            stream.capture.work.append(work)
        else:
            stream.queue.append(work)

    def run_until(self, done: Callable[[], bool], what: str) -> None:
        """Run streams in a random order until ``done``."""
        while not done():
            streams = (*self.streams, self.default)
            ready = [s for s in streams if s.queue and self._may_run(s)]
            if not ready:
                raise Violation(f"{what} waits for something that nobody will do")
            ready.sort(key=lambda stream: stream.order)
            self._step(self._random.choice(ready))

    def drain(self, stream: Stream) -> None:
        if stream.capture is not None:
            raise Violation("a stream is synchronised while it is captured")
        self.run_until(lambda: not stream.queue, "a synchronisation")

    def _may_run(self, stream: Stream) -> bool:
        head = stream.queue[0]
        return not isinstance(head, tuple) or head[0].reached >= head[1]

    def _step(self, stream: Stream) -> None:
        self.ticks += 1
        head = stream.queue.popleft()
        if not isinstance(head, tuple):
            head()
