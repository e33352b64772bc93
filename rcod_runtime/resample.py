"""Bicubic resampling with Pillow's filter (a = -0.5), by boxes, without seams."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rcod_runtime.parallel import row_bands

Floats = npt.NDArray[np.float32]

TOKEN_BAND_ROWS = 256  # of the image, in work at once


class Resampler:
    """Resizes one image to one size, box by box; equal to the crop of the whole result.

    Makes no copy of the image: a box converts what it looks at.

    Args:
        image: (H, W, C), any real dtype.
        size_hw: height and width of the whole result.
        unit, offset: the result is that of ``unit`` times the image plus ``offset``.
    """

    def __init__(
        self,
        image: npt.NDArray[np.generic],
        size_hw: tuple[int, int],
        unit: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        self.image, self.size_hw = image, size_hw
        self.unit, self.offset = np.float32(unit), np.float32(offset)

    def box(
        self, top: int, left: int, height: int, width: int, out: Floats | None = None
    ) -> Floats:
        """Rows top.. and columns left.. of the result -> (height, width, C) float32.

        In memory the channels lie one after another, as the graphs take them, or in ``out``
        (C, height, width).
        """
        from PIL import Image

        rows, first_y, last_y = _looked_at(top, height, self.size_hw[0], self.image.shape[0])
        columns, first_x, last_x = _looked_at(left, width, self.size_hw[1], self.image.shape[1])
        region = (first_x, first_y, last_x, last_y)
        if out is None:
            out = np.empty((self.image.shape[2], height, width), np.float32)
        for c in range(self.image.shape[2]):
            plane = self.image[rows, columns, c].astype(np.float32, order="C")
            plane *= self.unit
            plane += self.offset
            resized = Image.fromarray(plane).resize(
                (width, height), Image.Resampling.BICUBIC, region
            )
            out[c] = np.asarray(resized)
        return out.transpose(1, 2, 0)


def _looked_at(start: int, length: int, size: int, source: int) -> tuple[slice, float, float]:
    """What ``length`` pixels of the result from ``start`` on are made of, along one axis: pixels
    of the source, and where in them the result's first pixel begins and its last one ends."""
    ratio = source / size
    begin, end = start * ratio, min((start + length) * ratio, float(source))
    reach = 2 * max(1.0, ratio) + 1  # the filter's, and one pixel for rounding
    first, last = max(0, math.floor(begin - reach)), min(source, math.ceil(end + reach))
    return slice(first, last), begin - first, end - first


def upsample(image: npt.NDArray[np.generic], size_hw: tuple[int, int], unit: float = 1.0) -> Floats:
    """The whole image at another size: (H, W, C) -> (height, width, C) float32, times ``unit``."""
    return Resampler(image, size_hw, unit).box(0, 0, *size_hw)


def resize_for_tokens(image: npt.NDArray[np.generic], side_px: int, unit: float = 1.0) -> Floats:
    """The whole image squashed to a square, antialiased: (H, W, C) -> (S, S, C) float32."""
    resampler = Resampler(image, (side_px, side_px), unit)
    out = np.empty((side_px, side_px, image.shape[2]), np.float32)
    for rows in row_bands(side_px, max(1, TOKEN_BAND_ROWS * side_px // image.shape[0])):
        out[rows] = resampler.box(rows.start, 0, rows.stop - rows.start, side_px)
    return out
