"""What rcod-train does when it is told to stop: between two steps of a stage, and elsewhere."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def is_one_of_several() -> bool:
    """Whether accelerate launch or torchrun started others beside this process, which end with it
    or go on without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the loop stops between two steps."""
    received: list[int] = []
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, lambda n, _: received.append(n))
        except ValueError:  # not in the main thread: the caller handles signals
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
