"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from rcod_runtime.errors import OutputError

PARTIAL_SUFFIX = ".rcod-partial"
PREFIX_LENGTH = 14
_umask_lock = threading.Lock()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file; an existing one is replaced when all is on the disk.

    The bytes go to a hidden file beside it first. A process that is killed meanwhile leaves that
    one behind: see :func:`remove_partials`.

    Raises:
        OutputError: the folder is missing, is full or can't be written.
    """
    try:
        handle, name = tempfile.mkstemp(PARTIAL_SUFFIX, _partial_prefix(path), path.parent)
    except OSError as exc:
        raise OutputError(f"{path}: can't be written ({exc.strerror or exc}).") from exc
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except OSError as exc:
        raise OutputError(f"{path}: can't be written ({exc.strerror or exc}).") from exc
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(paths: Iterable[Path]) -> None:
    """Remove what killed processes left of ``paths`` while they wrote them; other files' hidden
    parts, which a running process may be writing, stay.

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
                    partial.unlink(missing_ok=True)
                except OSError as exc:
                    raise OutputError(
                        f"{partial}: left by a process that was killed; can't be removed "
                        f"({exc.strerror or exc})."
                    ) from exc


def _partial_prefix(path: Path) -> str:
    # Not the name itself: a long one would become longer than file systems take.
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[: PREFIX_LENGTH - 2]}."


def _umask() -> int:
    with _umask_lock:  # it can only be asked for by setting another one
        mask = os.umask(0o077)
        os.umask(mask)
    return mask
