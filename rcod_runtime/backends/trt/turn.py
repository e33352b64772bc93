"""Whose turn it is on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rcod_runtime.errors import UsageError


class Turn:
    """A lock held for a whole image. A thread that has it can't have it twice: where its progress
    callback asks again, it would wait for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has it."""
        return self._owner == threading.get_ident() and self._lock.locked()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, it is this thread's.

        Raises:
            UsageError: it was before.
        """
        if self.is_mine:
            raise UsageError(
                "this Upscaler is at work on an image in this thread: on a GPU its progress "
                "callback can't ask it for more. Call it when the image is done."
            )
        with self._lock:  # which a signal's exception leaves free, wherever it comes
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
