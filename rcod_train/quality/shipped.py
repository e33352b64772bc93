"""Data files that installed packages ship: looked for, not imported."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from rcod_train.errors import MetricError


def find_shipped(package: str, relative: str) -> Path | None:
    """A file in an installed package's folder, or None."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / relative
        if path.is_file():
            return path
    return None


def read_original(path: Path, sha256: str) -> bytes:
    """A file's bytes, where they are those expected.

    Raises:
        MetricError: they aren't, or can't be read.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise MetricError(f"{path}: can't be read ({exc.strerror or exc}).") from exc
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise MetricError(
            f"{path}: expected the file with SHA-256 {sha256[:12]}..., found {found[:12]}.... "
            "Install the package again."
        )
    return data
