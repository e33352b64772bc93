"""Files from outside, read within bounds; files of our own, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from rcod_runtime.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows, where what is open can't be removed
    fcntl = None  # type: ignore[assignment]

PARTIAL_SUFFIX = ".rcod-partial"
PREFIX_LENGTH = 14
CHUNK_BYTES = 2**20


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. A pipe, a socket or a device is refused and not waited for.

    Raises:
        OSError: it can't be opened, or is not a regular file; ``strerror`` says what it is.
    """
    # Without O_NONBLOCK, opening a pipe waits until somebody writes into it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a file", str(path))
    return os.fdopen(handle, "rb")


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file; of a larger one nothing is read.

    Raises:
        OSError: it can't be read, is not a regular file, or is larger.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise _too_large(max_bytes)
        return read_stream(file, max_bytes)  # it may grow meanwhile


def read_stream(file: BinaryIO, max_bytes: int) -> bytes:
    """What is left of a file or a pipe; beyond ``max_bytes`` at most one chunk is read.

    Raises:
        OSError: it can't be read, or is larger.
    """
    data = io.BytesIO()
    while chunk := file.read(CHUNK_BYTES):  # a read makes room at once for all that it may give
        data.write(chunk)
        if data.tell() > max_bytes:
            raise _too_large(max_bytes)
    return data.getvalue()


def _too_large(max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"over the limit of {max_bytes} bytes")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; an existing one is replaced.

    Raises:
        OutputError: the folder is missing or can't be written, or the disk is full.
    """
    partial = path.parent / f"{_partial_prefix(path)}{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(partial, flags, 0o666)  # less what the umask takes, as any file
    except OSError as exc:
        raise OutputError(f"{path}: can't be written ({exc.strerror or exc}).") from exc
    try:
        with os.fdopen(handle, "wb") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # there are file systems without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                partial.replace(path)  # while it is locked
        if fcntl is None:
            partial.replace(path)
    except OSError as exc:
        raise OutputError(f"{path}: can't be written ({exc.strerror or exc}).") from exc
    finally:
        with contextlib.suppress(OSError):  # what was wrong with the file is said already
            partial.unlink()


def remove_partials(paths: Iterable[Path]) -> None:
    """Remove what killed processes left of ``paths`` while they wrote them. Other files' hidden
    parts stay, and what a running process is writing, which holds a lock on it.

    Raises:
        OutputError: one can't be removed.
    """
    prefixes: dict[Path, set[str]] = {}
    for path in paths:
        prefixes.setdefault(path.parent, set()).add(_partial_prefix(path))
    for folder, expected in prefixes.items():
        for partial in folder.glob(f".*{PARTIAL_SUFFIX}"):
            if partial.name[:PREFIX_LENGTH] in expected:
                try:
                    if not _is_in_use(partial):
                        partial.unlink(missing_ok=True)
                except OSError as exc:
                    raise OutputError(
                        f"{partial}: left by a process that was killed; can't be removed "
                        f"({exc.strerror or exc})."
                    ) from exc


def _is_in_use(partial: Path) -> bool:
    """Whether a process writes it, as far as can be told: one that may not be read is let be."""
    if fcntl is None:
        return False
    try:
        with open_regular(partial) as file:
            # Shared: for one of its own NFS wants a file that is open for writing.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as exc:
        return isinstance(exc, (BlockingIOError, PermissionError))
    return False


def _partial_prefix(path: Path) -> str:
    # Not the name itself: a long one would become longer than file systems take.
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[: PREFIX_LENGTH - 2]}."
