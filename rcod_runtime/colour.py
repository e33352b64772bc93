"""Colour match: hold the result to what the input is sure of.

All methods change the result in place, a band of rows at a time; nothing as large as the result is
made.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rcod_runtime.parallel import in_parallel, row_bands
from rcod_runtime.resample import Resampler

ColourMatch = Literal["none", "adain", "wavelet", "consistent"]
COLOUR_MATCHES: tuple[ColourMatch, ...] = ("none", "adain", "wavelet", "consistent")
DEFAULT_COLOUR_MATCH: ColourMatch = "consistent"
SAMPLE_COLOUR_MATCH: ColourMatch = "wavelet"  # of the samples in bundles, whatever the default

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

COARSE_ROWS = 8  # averaged at once
LOW_PASS_PX = 4  # of the input: what is broader than this comes from the input
# Of the finer detail that the input has and the result lost. All of it would bring the input's
# noise back; on photos held out from training a half was best over all degradations.
DETAIL_SHARE = 0.5
MIN_DETAIL_SCALE = 2.0  # of the result to the input; below, its finer detail is what was changed


def match_colour(sr: Pixels, lq: npt.NDArray[Any], method: ColourMatch) -> None:
    """Correct ``sr`` (H, W, C) in place to the colours of ``lq`` (h, w, C).

    ``adain``: each channel gets the input's mean and standard deviation.
    ``wavelet``: each channel's low frequencies are replaced by the input's, as the coarsest band of
    a wavelet transform would be.
    ``consistent``: the same, and what the result, averaged down to the input, lacks of the input's
    finer detail is added by half: a step of back-projection (Irani and Peleg 1991). Results that
    are less than twice as large as the input: as ``wavelet``.

    Args:
        sr: uint8 or uint16.
        lq: the input, any real dtype, in the units of ``sr``.
    """
    if method == "adain":
        _adain(sr, lq)
    elif method == "wavelet" or (method == "consistent" and not _is_larger(sr, lq)):
        _add_upsampled(sr, _coarse(sr, lq))
    elif method == "consistent":
        _add_upsampled(sr, _detailed(sr, lq))


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


def _is_larger(sr: Pixels, lq: npt.NDArray[Any]) -> bool:
    return all(a >= MIN_DETAIL_SCALE * b for a, b in zip(sr.shape[:2], lq.shape[:2], strict=True))


def _coarse(sr: Pixels, lq: npt.NDArray[Any]) -> Floats:
    """What the result lacks of the input, both averaged down to a few pixels: (h, w, C)."""
    size = _coarse_size(lq)
    difference = np.empty((*size, sr.shape[2]), np.float32)

    def compare(rows: slice) -> None:
        np.subtract(_averaged(lq, rows, size), _averaged(sr, rows, size), out=difference[rows])

    in_parallel(compare, row_bands(size[0], COARSE_ROWS))
    return difference


def _detailed(sr: Pixels, lq: npt.NDArray[Any]) -> Floats:
    """What is to be added to the result, at the input's size: all that is missing of the low
    frequencies, and a share of the rest."""
    size = lq.shape[:2]
    missing = np.empty((*size, sr.shape[2]), np.float32)

    def compare(rows: slice) -> None:
        np.subtract(lq[rows], _averaged(sr, rows, size), out=missing[rows])

    in_parallel(compare, row_bands(size[0], COARSE_ROWS))
    coarse_size = _coarse_size(lq)
    coarse = Resampler(_averaged(missing, slice(0, coarse_size[0]), coarse_size), size)

    def share(rows: slice) -> None:
        missing[rows] *= DETAIL_SHARE
        broad = coarse.box(rows.start, 0, rows.stop - rows.start, size[1])
        broad *= 1.0 - DETAIL_SHARE
        missing[rows] += broad

    in_parallel(share, row_bands(size[0]))
    return missing


def _coarse_size(lq: npt.NDArray[Any]) -> tuple[int, int]:
    height, width = (max(1, round(side / LOW_PASS_PX)) for side in lq.shape[:2])
    return height, width


def _add_upsampled(sr: Pixels, difference: Floats) -> None:
    height, width = sr.shape[:2]
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
