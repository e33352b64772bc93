"""Users' arrays to the (H, W, 3) that the graphs see, and back."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from rcod_runtime.errors import UsageError
from rcod_runtime.hidden import fill_hidden
from rcod_runtime.manifest import MAX_GUIDE_PX
from rcod_runtime.parallel import row_bands
from rcod_runtime.resample import Resampler

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

# What libraries raise where they give no array by DLPack, as torch for one that needs gradients.
DLPACK_ERRORS = (BufferError, RuntimeError, TypeError, ValueError, AssertionError)
GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G, B in luma (BT.601)


def checked_shape(shape: Any) -> tuple[int, ...]:
    """An image's shape, (H, W) or (H, W, C).

    Raises:
        UsageError: it is none.
    """
    try:
        sides = tuple(map(operator.index, shape))
    except TypeError:
        sides = ()
    if len(sides) not in (2, 3) or min(sides) < 1:
        raise UsageError(
            f"image_shape {shape!r}: expected (H, W) or (H, W, C), whole numbers of at least 1."
        )
    return sides


@dataclass(frozen=True)
class Prepared:
    """An input image, without copies of the user's array. ``lq`` is (H, W, 3) in its own dtype."""

    lq: Pixels
    alpha: Pixels | None  # (H, W, 1)
    grey: bool
    dtype: np.dtype[Any]

    @property
    def unit(self) -> float:
        """Factor from values of ``lq`` to 0..255."""
        return 255.0 / np.iinfo(self.dtype).max


def host_array(image: Any) -> Any:
    """Another library's array in the host's memory as a numpy array, without a copy, by DLPack;
    what has no DLPack as it is. A matrix or another kind of numpy's arrays is a plain one.

    Raises:
        UsageError: it is not in the host's memory, its library does not give it, or values of it
            are masked.
    """
    if isinstance(image, np.ma.MaskedArray) and np.ma.is_masked(image):
        raise UsageError(
            "image: expected all pixels, found masked ones. Fill them: image.filled()."
        )
    if isinstance(image, np.ndarray):
        return np.asarray(image)
    if not hasattr(image, "__dlpack_device__"):
        return image
    try:
        return np.from_dlpack(image)
    except DLPACK_ERRORS as exc:
        raise UsageError(
            f"image: expected an array in the host's memory; {type(image).__name__} does not give "
            f"one: {exc}. Arrays on the GPU go to Upscaler.enqueue."
        ) from exc


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
    lq = np.broadcast_to(planes[:, :, :1], (*image.shape[:2], 3)) if grey else planes[:, :, :3]
    alpha = planes[:, :, -1:] if channels in (2, 4) else None
    return Prepared(lq, alpha, grey, image.dtype)


def with_hidden_filled(image: Prepared) -> Prepared:
    """Colours under alpha 0 replaced by those around: network and colour match look at all pixels,
    and editors leave black there, which would come out as a dark fringe."""
    if image.alpha is None:
        return image
    filled = fill_hidden(image.lq[:, :, :1] if image.grey else image.lq, image.alpha)
    return replace(image, lq=cast(Pixels, np.broadcast_to(filled, image.lq.shape)))


def checked_out(out: Pixels | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Pixels:
    """The caller's array for the result, or a new one.

    Raises:
        UsageError: it is no array of this shape and dtype that can be written.
    """
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != dtype:
        found = f"{out.shape} {out.dtype}" if isinstance(out, np.ndarray) else type(out).__name__
        raise UsageError(f"out: expected an array {shape} {dtype}, found {found}.")
    if not out.flags.writeable:
        raise UsageError("out: expected a writeable array, found a read-only one.")
    return out


def restore_layout(sr: Pixels, source: Prepared, out: Pixels) -> None:
    """Write the result (H, W, 3) into ``out`` with the source's channels; alpha is upsampled."""
    planes = out.reshape(*out.shape[:2], -1)
    if not np.shares_memory(planes, out):  # a strided view: fill it channel by channel instead
        planes = out if out.ndim == 3 else out[:, :, None]
    colours = 1 if source.grey else 3
    height, width = out.shape[:2]
    if source.alpha is not None:
        upsampled = Resampler(source.alpha, (height, width))
    for rows in row_bands(height):
        if source.grey:
            planes[rows, :, 0] = np.rint(sr[rows] @ GREY_WEIGHTS)
        else:
            planes[rows, :, :3] = sr[rows]
        if source.alpha is not None:
            alpha = upsampled.box(rows.start, 0, rows.stop - rows.start, width)[:, :, 0]
            planes[rows, :, colours] = np.rint(np.clip(alpha, 0, np.iinfo(out.dtype).max))


def guide_window(lq: npt.NDArray[np.float32] | Pixels) -> npt.NDArray[np.float32]:
    """What the guide of rcod-s looks at: lq (H, W, 3) -> (1, 3, h, w) in [0, 1], the centre of at
    most MAX_GUIDE_PX a side. Floats are in 0..255."""
    top, left = (max(0, side - MAX_GUIDE_PX) // 2 for side in lq.shape[:2])
    window = lq[top : top + MAX_GUIDE_PX, left : left + MAX_GUIDE_PX]
    limit = 65535.0 if lq.dtype == np.uint16 else 255.0
    return np.ascontiguousarray(window.transpose(2, 0, 1)[None] / limit, np.float32)
