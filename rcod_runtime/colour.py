"""Colour match: take the broad colours of the input over to the result.

Both methods change the result in place, a band of rows at a time; nothing as large as the input or
the result is made.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rcod_runtime.parallel import in_parallel, row_bands
from rcod_runtime.resample import Resampler

ColourMatch = Literal["none", "adain", "wavelet"]
COLOUR_MATCHES: tuple[ColourMatch, ...] = ("none", "adain", "wavelet")
DEFAULT_COLOUR_MATCH: ColourMatch = "wavelet"

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

COARSE_ROWS = 8  # averaged at once
LOW_PASS_PX = 4  # of the input: what is broader than this comes from the input


def match_colour(sr: Pixels, lq: npt.NDArray[Any], method: ColourMatch) -> None:
    """Correct ``sr`` (H, W, C) in place to the colours of ``lq`` (h, w, C).

    ``adain``: each channel gets the input's mean and standard deviation.
    ``wavelet``: each channel's low frequencies are replaced by the input's, as the coarsest band of
    a wavelet transform would be.

    Args:
        sr: uint8 or uint16.
        lq: the input, any real dtype, in the units of ``sr``.
    """
    if method == "adain":
        _adain(sr, lq)
    elif method == "wavelet":
        _wavelet(sr, lq)


def _adain(sr: Pixels, lq: npt.NDArray[Any]) -> None:
    mean_lq, std_lq = _statistics(lq, lq.shape[:2])
    mean_sr, std_sr = _statistics(sr, lq.shape[:2])
    # A flat image has no contrast to match, and a ratio of two roundings would be noise.
    gain = np.where(std_lq < 1.0, 1.0, std_lq / np.maximum(std_sr, 1e-3)).astype(np.float32)
    shift = (mean_lq - mean_sr * gain).astype(np.float32)

    def correct(rows: slice) -> None:
        for c in range(sr.shape[2]):
            values = sr[rows, :, c].astype(np.float32)
            values *= gain[c]
            values += shift[c]
            _store(sr[rows, :, c], values)

    in_parallel(correct, row_bands(sr.shape[0]))


def _wavelet(sr: Pixels, lq: npt.NDArray[Any]) -> None:
    height, width = sr.shape[:2]
    coarse_h, coarse_w = (max(1, round(side / LOW_PASS_PX)) for side in lq.shape[:2])
    difference = np.empty((coarse_h, coarse_w, sr.shape[2]), np.float32)

    def compare(rows: slice) -> None:
        size = (coarse_h, coarse_w)
        np.subtract(_averaged(lq, rows, size), _averaged(sr, rows, size), out=difference[rows])

    in_parallel(compare, row_bands(coarse_h, COARSE_ROWS))
    correction = Resampler(difference, (height, width))

    def correct(rows: slice) -> None:
        field = correction.box(rows.start, 0, rows.stop - rows.start, width)
        for c in range(sr.shape[2]):
            values = field[:, :, c]
            values += sr[rows, :, c]
            _store(sr[rows, :, c], values)

    in_parallel(correct, row_bands(height))


def _statistics(
    image: npt.NDArray[Any], size_hw: tuple[int, ...]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of each channel of the image averaged down to a size."""

    def sums(rows: slice) -> npt.NDArray[np.float64]:
        values = _averaged(image, rows, size_hw).astype(np.float64)
        return np.stack([values.sum((0, 1)), np.square(values).sum((0, 1))])

    total = np.sum(in_parallel(sums, row_bands(size_hw[0], COARSE_ROWS)), axis=0)
    mean, square = total / (size_hw[0] * size_hw[1])
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def _averaged(image: npt.NDArray[Any], rows: slice, size_hw: tuple[int, ...]) -> Floats:
    """Rows of the image's area average at a size, (rows, w, C) float32."""
    from PIL import Image

    y = image.shape[0] / size_hw[0]
    first, last = int(rows.start * y), min(image.shape[0], math.ceil(rows.stop * y))
    box = (0, rows.start * y - first, image.shape[1], min(rows.stop * y - first, last - first))
    size = (size_hw[1], rows.stop - rows.start)
    out = np.empty((size[1], size[0], image.shape[2]), np.float32)
    for c in range(image.shape[2]):
        plane = Image.fromarray(image[first:last, :, c].astype(np.float32, order="C"))
        out[:, :, c] = np.asarray(plane.resize(size, Image.Resampling.BOX, box))
    return out


def _store(plane: Pixels, values: Floats) -> None:
    """Round ``values`` into ``plane`` of the same shape; ``values`` is used up."""
    np.clip(values, 0, np.iinfo(plane.dtype).max, out=values)
    np.rint(values, out=values)
    plane[:] = values
