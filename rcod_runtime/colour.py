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
# What comes back of the input's finer detail where it is far above the noise: this share, and as
# much again of its finest part, which upsampling smooths away. Below twice the noise nothing does.
DETAIL_SHARE, FINEST_SHARE = 0.75, 0.75
CELL_PX = 12  # of the input: a cell's detail is compared with that of the quietest cells
QUIETEST = 0.05  # this quantile of the cells shows the noise
CLIPPED = 0.05  # of the range: cells as near to black or white have lost their noise
LUMA = (0.299, 0.587, 0.114)
MIN_DETAIL_SCALE = 2.0  # of the result to the input; below, its finer detail is what was changed


def match_colour(sr: Pixels, lq: npt.NDArray[Any], method: ColourMatch) -> None:
    """Correct ``sr`` (H, W, C) in place to the colours of ``lq`` (h, w, C).

    ``adain``: each channel gets the input's mean and standard deviation.
    ``wavelet``: each channel's low frequencies are replaced by the input's, as the coarsest band of
    a wavelet transform would be.
    ``consistent``: the same, and what the result, averaged down to the input, lacks of the input's
    finer detail in brightness is added: a step of back-projection (Irani and Peleg 1991), weighted
    by how far that detail stands above the noise (Wiener). Results that are less than twice as
    large as the input: as ``wavelet``.

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
            store(values, sr[rows, :, c])

    in_parallel(correct, row_bands(sr.shape[0], width=sr.shape[1]))


def _is_larger(sr: Pixels, lq: npt.NDArray[Any]) -> bool:
    return all(a >= MIN_DETAIL_SCALE * b for a, b in zip(sr.shape[:2], lq.shape[:2], strict=True))


def _coarse(sr: Pixels, lq: npt.NDArray[Any]) -> Floats:
    """What the result lacks of the input, both averaged down to a few pixels: (h, w, C)."""
    size = _cells(lq.shape[:2], LOW_PASS_PX)
    difference = np.empty((*size, sr.shape[2]), np.float32)

    def compare(rows: slice) -> None:
        np.subtract(_averaged(lq, rows, size), _averaged(sr, rows, size), out=difference[rows])

    in_parallel(compare, row_bands(size[0], COARSE_ROWS, size[1]))
    return difference


def _detailed(sr: Pixels, lq: npt.NDArray[Any]) -> Floats:
    """What is to be added to the result, at the input's size: all that is missing of the low
    frequencies, and of the rest what is not noise."""
    size = lq.shape[:2]
    missing = np.empty((*size, sr.shape[2]), np.float32)

    def compare(rows: slice) -> None:
        np.subtract(lq[rows], _averaged(sr, rows, size), out=missing[rows])

    in_parallel(compare, row_bands(size[0], COARSE_ROWS, size[1]))
    broad = Resampler(_averaged(missing, *_all_rows(_cells(size, LOW_PASS_PX))), size)
    luma = _luma_weights(sr.shape[2])
    detail = np.empty((*size, 1), np.float32)

    def split(rows: slice) -> None:
        low = broad.box(rows.start, 0, rows.stop - rows.start, size[1])
        np.dot(missing[rows] - low, luma, out=detail[rows, :, 0])
        missing[rows] = low

    in_parallel(split, row_bands(size[0], width=size[1]))
    limit = CLIPPED * np.iinfo(sr.dtype).max
    brightness = _averaged(lq, *_all_rows(_cells(size, CELL_PX))) @ luma
    clipped = (brightness < limit) | (brightness > np.iinfo(sr.dtype).max - limit)
    share = Resampler(_above_noise(detail, clipped)[..., None], size)

    def add(rows: slice) -> None:
        wanted = (DETAIL_SHARE + FINEST_SHARE) * detail[rows]
        wanted -= FINEST_SHARE * _smoothed(detail, rows)
        wanted *= np.clip(share.box(rows.start, 0, rows.stop - rows.start, size[1]), 0, 1)
        missing[rows] += wanted

    in_parallel(add, row_bands(size[0], width=size[1]))
    return missing


def _above_noise(detail: Floats, clipped: npt.NDArray[np.bool_]) -> Floats:
    """The share of each cell's detail (h, w, 1) that is not noise, 0 to 1: (rows, columns).

    Noise is everywhere: the cells that differ least from the result show how much there is.
    """
    energy = _averaged(np.square(detail), *_all_rows(clipped.shape))[..., 0]
    open_ = energy if clipped.mean() > 0.9 else energy[~clipped]
    noise = 2 * np.quantile(open_, QUIETEST)
    # A cell without any detail has nothing to bring back, so its share doesn't matter.
    return np.maximum(0, 1 - noise / np.maximum(energy, 1e-6)).astype(np.float32)


def _smoothed(plane: Floats, rows: slice) -> Floats:
    """Rows of a plane (h, w, 1) under the kernel 1 2 1 in both directions, its edges repeated."""
    around = np.clip(np.arange(rows.start - 1, rows.stop + 1), 0, len(plane) - 1)
    part = plane[around]
    part = part[:-2] + 2 * part[1:-1] + part[2:]
    part = np.pad(part, ((0, 0), (1, 1), (0, 0)), mode="edge")
    smooth: Floats = (part[:, :-2] + 2 * part[:, 1:-1] + part[:, 2:]) / 16
    return smooth


def _luma_weights(channels: int) -> Floats:
    return np.asarray(LUMA if channels == 3 else [1 / channels] * channels, np.float32)


def _cells(size_hw: tuple[int, ...], side: int) -> tuple[int, int]:
    """How many cells of ``side`` pixels there are to an image's height and width."""
    height, width = (max(1, round(length / side)) for length in size_hw)
    return height, width


def _all_rows(size_hw: tuple[int, ...]) -> tuple[slice, tuple[int, ...]]:
    return slice(0, size_hw[0]), size_hw


def _add_upsampled(sr: Pixels, difference: Floats) -> None:
    height, width = sr.shape[:2]
    correction = Resampler(difference, (height, width))

    def correct(rows: slice) -> None:
        field = correction.box(rows.start, 0, rows.stop - rows.start, width)
        for c in range(sr.shape[2]):
            values = field[:, :, c]
            values += sr[rows, :, c]
            store(values, sr[rows, :, c])

    in_parallel(correct, row_bands(height, width=width))


def _statistics(
    image: npt.NDArray[Any], size_hw: tuple[int, ...]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of each channel of the image averaged down to a size."""

    def sums(rows: slice) -> npt.NDArray[np.float64]:
        values = _averaged(image, rows, size_hw).astype(np.float64)
        return np.stack([values.sum((0, 1)), np.square(values).sum((0, 1))])

    total = np.sum(in_parallel(sums, row_bands(size_hw[0], COARSE_ROWS, size_hw[1])), axis=0)
    mean, square = total / (size_hw[0] * size_hw[1])
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def _averaged(image: npt.NDArray[Any], rows: slice, size_hw: tuple[int, ...]) -> Floats:
    """Rows of the image's area average at a size, (rows, w, C) float32."""
    from PIL import Image

    whole = all(a % b == 0 for a, b in zip(image.shape, size_hw, strict=False))
    if whole and image.dtype in (np.uint8, np.uint16):
        return _averaged_cells(image, rows, size_hw)
    y = image.shape[0] / size_hw[0]
    first, last = int(rows.start * y), min(image.shape[0], math.ceil(rows.stop * y))
    box = (0, rows.start * y - first, image.shape[1], min(rows.stop * y - first, last - first))
    size = (size_hw[1], rows.stop - rows.start)
    out = np.empty((size[1], size[0], image.shape[2]), np.float32)
    for c in range(image.shape[2]):
        plane = Image.fromarray(image[first:last, :, c].astype(np.float32, order="C"))
        out[:, :, c] = np.asarray(plane.resize(size, Image.Resampling.BOX, box))
    return out


def _averaged_cells(image: Pixels, rows: slice, size_hw: tuple[int, ...]) -> Floats:
    """The same for cells of whole pixels, by sums of integers, in a tenth of the time."""
    height, width = (a // b for a, b in zip(image.shape, size_hw, strict=False))
    largest = height * width * np.iinfo(image.dtype).max
    cells = image[rows.start * height : rows.stop * height]
    columns: npt.NDArray[Any]
    columns = cells[::height].astype(np.uint16 if largest < 2**16 else np.uint32)
    for row in range(1, height):
        columns += cells[row::height]
    out = np.empty((len(columns), size_hw[1], image.shape[2]), np.float32)
    for c in range(image.shape[2]):
        total = columns[:, ::width, c].copy()
        for column in range(1, width):
            total += columns[:, column::width, c]
        np.multiply(total, np.float32(1 / (height * width)), out=out[:, :, c])
    return out


def store(values: Floats, plane: Pixels) -> None:
    """Round ``values`` into ``plane`` of the same shape; ``values`` is used up."""
    np.clip(values, 0, np.iinfo(plane.dtype).max, out=values)
    np.rint(values, out=values)
    plane[:] = values.astype(plane.dtype)  # faster than into places apart
