"""Users' arrays to the (H, W, 3) that the graphs see, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rcod_runtime.errors import UsageError
from rcod_runtime.manifest import MAX_GUIDE_PX
from rcod_runtime.resample import upsample

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G, B in luma (BT.601)


@dataclass(frozen=True)
class Prepared:
    """An input image. ``lq`` is (H, W, 3) float32 in 0..255 whatever the depth."""

    lq: npt.NDArray[np.float32]
    alpha: Pixels | None  # (H, W, 1)
    grey: bool
    dtype: np.dtype[Any]


def prepare_image(image: npt.NDArray[Any]) -> Prepared:
    """Check an input array and split it.

    Raises:
        UsageError: not an array, another dtype, another shape, or no pixels.
    """
    if not isinstance(image, np.ndarray):
        raise UsageError(f"image: expected a numpy array, found {type(image).__name__}.")
    if image.dtype not in (np.uint8, np.uint16):
        hint = ""
        if image.dtype.kind == "f":
            bad = "" if np.isfinite(image).all() else " that holds NaN or infinity"
            hint = f"{bad}; convert, for example (image * 255).round().astype(np.uint8)"
        raise UsageError(f"image: expected dtype uint8 or uint16, found {image.dtype}{hint}.")
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4):
        raise UsageError(
            "image: expected shape (H, W), (H, W, 1), (H, W, 2), (H, W, 3) or (H, W, 4), "
            f"found {image.shape}."
        )
    if 0 in image.shape:
        raise UsageError(f"image: expected at least one pixel, found shape {image.shape}.")
    planes = image.reshape(*image.shape[:2], channels)
    grey = channels <= 2
    colour = np.repeat(planes[:, :, :1], 3, axis=2) if grey else planes[:, :, :3]
    lq = colour.astype(np.float32)
    if image.dtype == np.uint16:
        lq *= np.float32(255.0 / 65535.0)
    alpha = planes[:, :, -1:] if channels in (2, 4) else None
    return Prepared(lq, alpha, grey, image.dtype)


def restore_layout(sr: Pixels, source: Prepared, out: Pixels) -> None:
    """Write the result (H, W, 3) into ``out`` with the source's channels; alpha is upsampled."""
    planes = out.reshape(*out.shape[:2], -1)
    if not np.shares_memory(planes, out):  # a strided view: fill it channel by channel instead
        planes = out if out.ndim == 3 else out[:, :, None]
    colours = 1 if source.grey else 3
    if source.grey:
        planes[:, :, 0] = np.rint(sr @ GREY_WEIGHTS)
    else:
        planes[:, :, :colours] = sr
    if source.alpha is not None:
        alpha = upsample(source.alpha, (out.shape[0], out.shape[1]))[:, :, 0]
        planes[:, :, colours] = np.rint(np.clip(alpha, 0, np.iinfo(out.dtype).max))


def guide_window(lq: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What the guide of rcod-s looks at: lq (H, W, 3) in 0..255 -> (1, 3, h, w) in [0, 1], the
    centre of at most MAX_GUIDE_PX a side."""
    top, left = (max(0, side - MAX_GUIDE_PX) // 2 for side in lq.shape[:2])
    window = lq[top : top + MAX_GUIDE_PX, left : left + MAX_GUIDE_PX]
    return np.ascontiguousarray(window.transpose(2, 0, 1)[None] / 255.0, np.float32)
