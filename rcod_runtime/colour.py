"""Colour match: take the broad colours of the input over to the result.

Both methods change the result in place, a band of rows at a time, from statistics of a copy the
size of the input; no second full-size image is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from rcod_runtime.parallel import in_parallel
from rcod_runtime.resample import Resampler

ColourMatch = Literal["none", "adain", "wavelet"]
COLOUR_MATCHES: tuple[ColourMatch, ...] = ("none", "adain", "wavelet")
DEFAULT_COLOUR_MATCH: ColourMatch = "wavelet"

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

BAND_ROWS = 64  # in work at once: what fits the processor's cache
LOW_PASS_PX = 4  # of the input: what is broader than this comes from the input


def match_colour(sr: Pixels, lq: Floats, method: ColourMatch) -> None:
    """Correct ``sr`` (H, W, C) in place to the colours of ``lq`` (h, w, C).

    ``adain``: each channel gets the input's mean and standard deviation.
    ``wavelet``: each channel's low frequencies are replaced by the input's, as the coarsest band of
    a wavelet transform would be.

    Args:
        sr: uint8 or uint16.
        lq: the input in the same units as ``sr``.
    """
    if method == "none":
        return
    small = _reduced(sr, lq.shape[:2])
    if method == "adain":
        _adain(sr, small, lq)
    else:
        _wavelet(sr, small, lq)


def _reduced(sr: Pixels, size_hw: tuple[int, ...]) -> Floats:
    """Area average at the size of the input, (h, w, C) float32."""
    from PIL import Image

    height, width = size_hw
    out = np.empty((height, width, sr.shape[2]), np.float32)
    y = sr.shape[0] / height

    def reduce(rows: slice) -> None:
        first, last = int(rows.start * y), min(sr.shape[0], int(np.ceil(rows.stop * y)))
        box = (0, rows.start * y - first, sr.shape[1], min(rows.stop * y - first, last - first))
        size = (width, rows.stop - rows.start)
        for c in range(sr.shape[2]):
            plane = Image.fromarray(sr[first:last, :, c].astype(np.float32))
            out[rows, :, c] = np.asarray(plane.resize(size, Image.Resampling.BOX, box))

    in_parallel(reduce, _bands(height))
    return out


def _bands(height: int) -> Iterator[slice]:
    for top in range(0, height, BAND_ROWS):
        yield slice(top, min(height, top + BAND_ROWS))


def _adain(sr: Pixels, small: Floats, lq: Floats) -> None:
    mean_sr, mean_lq = small.mean((0, 1)), lq.mean((0, 1))
    gain = lq.std((0, 1)) / np.maximum(small.std((0, 1)), 1e-3)
    # A flat image has no contrast to match, and a ratio of two roundings would be noise.
    gain = np.where(lq.std((0, 1)) < 1.0, 1.0, gain).astype(np.float32)

    def correct(rows: slice) -> None:
        for c in range(sr.shape[2]):
            values = sr[rows, :, c].astype(np.float32)
            values -= mean_sr[c]
            values *= gain[c]
            values += mean_lq[c]
            _store(sr[rows, :, c], values)

    in_parallel(correct, _bands(sr.shape[0]))


def _wavelet(sr: Pixels, small: Floats, lq: Floats) -> None:
    from PIL import Image

    difference = lq - small
    coarse_hw = tuple(max(1, round(side / LOW_PASS_PX)) for side in lq.shape[:2])
    coarse = np.stack(
        [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(difference[:, :, c])).resize(
                    coarse_hw[::-1], Image.Resampling.BOX
                )
            )
            for c in range(lq.shape[2])
        ],
        axis=2,
    )
    height, width = sr.shape[:2]
    correction = Resampler(coarse, (height, width))

    def correct(rows: slice) -> None:
        field = correction.box(rows.start, 0, rows.stop - rows.start, width)
        for c in range(sr.shape[2]):
            values = field[:, :, c]
            values += sr[rows, :, c]
            _store(sr[rows, :, c], values)

    in_parallel(correct, _bands(height))


def _store(plane: Pixels, values: Floats) -> None:
    """Round ``values`` into ``plane`` of the same shape; ``values`` is used up."""
    np.clip(values, 0, np.iinfo(plane.dtype).max, out=values)
    np.rint(values, out=values)
    plane[:] = values
