"""A disk that is full from the n-th file on: the kernel refuses the write, half-way in it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

BYTES_LEFT = 8  # of every file, once the disk is full


class _Disk:
    def __init__(self) -> None:
        self.folder: str | None = None
        self.full_from = 0
        self.opened: list[str] = []

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None or event != "open":
            return
        path, _, flags = arguments
        for_writing = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        if for_writing and isinstance(path, (str, os.PathLike)):
            name = os.path.abspath(os.fspath(path))
            if name.startswith(self.folder):
                self.opened.append(name)
                if len(self.opened) == self.full_from:
                    _limit(BYTES_LEFT)


_disk = _Disk()
_hooked: list[bool] = []


def _limit(size: int) -> None:
    import resource  # not on Windows

    # Python ignores SIGXFSZ, so that a write beyond gives OSError: EFBIG.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


@contextlib.contextmanager
def full_disk(folder: Path, full_from: int) -> Iterator[list[str]]:
    """Inside, files under ``folder`` are counted as they are opened for writing; from number
    ``full_from`` on (1 is the first, 0 never) none can be written. Yields their names."""
    if not _hooked:  # an audit hook can't be taken out again
        sys.addaudithook(_disk.hook)
        _hooked.append(True)
    import resource

    before, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    _disk.folder, _disk.full_from, _disk.opened = f"{folder.resolve()}/", full_from, []
    try:
        yield _disk.opened
    finally:
        _disk.folder = None
        _limit(before)
