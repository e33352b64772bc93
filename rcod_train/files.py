"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rcod_train.errors import TrainError


def reason_of(exc: Exception) -> object:
    """Why a write failed, in the system's words where it has any: torch's and safetensors' writers
    raise errors of their own, torch's while the system's is handled."""
    for error in (exc, exc.__context__):
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
    return exc


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, where a run writes ``path``, what keeps it from that is a TrainError."""
    try:
        yield
    except (OSError, SafetensorError) as exc:
        raise TrainError(
            f"{path}: could not be written ({reason_of(exc)}). Free space and run again with "
            "--resume."
        ) from exc


@contextmanager
def file_written_whole(target: Path) -> Iterator[Path]:
    """A path beside ``target`` whose file takes its place at the end; after an error it is gone."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place at the end.

    An error inside, or while it takes its place, leaves what was at ``target`` before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    old = folder.with_name(folder.name + "-old")
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            target.rename(old)
        folder.rename(target)
    finally:
        if old.exists() and not target.exists():  # an error, or Ctrl-C, between the two
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
