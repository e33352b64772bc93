"""What TensorRT says, kept for the messages of errors."""

from __future__ import annotations

import functools
import threading
from collections import deque
from typing import Any

LINES_KEPT = 4

_lock = threading.Lock()


class _Said(threading.local):
    """The last lines that the library said in a thread: each call's own, of whatever chain."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)


def shared_logger(trt: Any) -> Any:
    """The one logger of a library in this process; it keeps warnings and errors for messages.

    The library says some things to the first logger that it was given, whosoever it was, and keeps
    no reference to it: with a logger for each Upscaler it would crash when the first one is gone.
    """
    with _lock:  # two threads would make two, of which one is lost
        return _logger_on(trt.ILogger)


@functools.cache
def _logger_on(base: Any) -> Any:
    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._said = _Said()

        def log(self, severity: Any, message: str) -> None:
            if severity <= base.Severity.WARNING:
                self._said.lines.append(f"{severity.name}: {message}")

        def forget(self) -> None:
            """What this thread has heard belongs to an earlier call."""
            self._said.lines.clear()

        def tail(self) -> str:
            """What this thread has heard since then, for the end of a message."""
            return "".join(f"\n    {line}" for line in self._said.lines)

    return Log()
