"""RCOD bundles in use: sharper photos, with a knob from fidelity to realism. No torch needed.

from rcod_runtime import Upscaler

upscaler = Upscaler()                      # the embedded model
sr = upscaler(image, realism="neutral")    # (H, W, 3) uint8 -> (4H, 4W, 3) uint8
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rcod_runtime.errors import (
    BackendError,
    BundleError,
    ImageError,
    OutputError,
    RcodError,
    UsageError,
)

if TYPE_CHECKING:
    from rcod_runtime.manifest import Manifest, read_manifest
    from rcod_runtime.upscaler import Upscaler

__all__ = [
    "BackendError",
    "BundleError",
    "ImageError",
    "Manifest",
    "OutputError",
    "RcodError",
    "Upscaler",
    "UsageError",
    "read_manifest",
]

_LAZY = {
    "Manifest": "rcod_runtime.manifest",
    "Upscaler": "rcod_runtime.upscaler",
    "read_manifest": "rcod_runtime.manifest",
}


def __getattr__(name: str) -> Any:
    """Import what needs numpy when it is first asked for, so that ``--help`` stays quick."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
