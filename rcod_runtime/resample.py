"""Bicubic resampling with Pillow's filter (a = -0.5), by boxes, without seams.

Along an axis, a block of results is a matrix times the pixels that it looks at: most of its
weights are zero, and products of small matrices are faster all the same than Pillow's loops.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rcod_runtime.parallel import row_bands

Floats = npt.NDArray[np.float32]

# Results along an axis that have one matrix, when an image grows and when it shrinks: with more
# there are more zeros.
BLOCK, BLOCK_SHRINKING = 64, 8
# Multiplications of one product: numpy's BLAS wakes threads of its own beyond 2**18, and they wait
# for more work where graphs would compute.
PRODUCTS = 2**18
# Weights are kept, of an axis and of the last axes of all images: photo after photo has one size.
KEPT_BYTES, KEPT_AXES = 2**21, 16
TOKEN_BAND_ROWS, TOKEN_BAND_PIXELS = 256, 2**20  # of the image, in work at once


class Resampler:
    """Resizes one image to one size, box by box; equal to the crop of the whole result but for
    rounding.

    Makes no copy of the image: a box converts what it looks at. May be shared by threads.

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
        self._rows = _axis(image.shape[0], size_hw[0])
        self._columns = _axis(image.shape[1], size_hw[1])

    def box(
        self, top: int, left: int, height: int, width: int, out: Floats | None = None
    ) -> Floats:
        """Rows top.. and columns left.. of the result -> (height, width, C) float32.

        In memory the channels lie one after another, as the graphs take them, or in ``out``
        (C, height, width).
        """
        first_y, last_y = self._rows.looked_at(top, height)
        first_x, last_x = self._columns.looked_at(left, width)
        region = self.image[first_y:last_y, first_x:last_x].transpose(2, 0, 1)
        planes = region.astype(np.float32, order="C")
        planes *= self.unit
        planes += self.offset
        channels = len(planes)
        narrow = np.empty((channels, height, planes.shape[2]), np.float32)
        for begin, end, first, weights in self._rows.blocks(top, height):
            rows = planes[:, first - first_y : first - first_y + weights.shape[1]]
            for part in _parts(planes.shape[2], weights.size):
                np.matmul(weights, rows[:, :, part], out=narrow[:, begin:end, part])
        if out is None:
            out = np.empty((channels, height, width), np.float32)
        for begin, end, first, weights in self._columns.blocks(left, width):
            columns = narrow[:, :, first - first_x : first - first_x + weights.shape[1]]
            turned = np.ascontiguousarray(weights.T)  # small ones are twice as fast so
            for part in _parts(height, weights.size):
                np.matmul(columns[:, part], turned, out=out[:, part, begin:end])
        return out.transpose(1, 2, 0)


class _Axis:
    """What each result along one axis is made of. May be shared by threads: at worst two make the
    same weights."""

    def __init__(self, source: int, size: int) -> None:
        self._source, self._size = source, size
        self._step = BLOCK if size >= source else BLOCK_SHRINKING
        self._kept: dict[int, tuple[int, Floats]] = {}
        self._room = KEPT_BYTES

    def looked_at(self, start: int, length: int) -> tuple[int, int]:
        """The first pixel of the source that the blocks of these results need, and the end."""
        last_first, last = self._block((start + length - 1) // self._step)
        return self._block(start // self._step)[0], last_first + last.shape[1]

    def blocks(self, start: int, length: int) -> Iterator[tuple[int, int, int, Floats]]:
        """(begin, end, first, weights) for results begin.. to end of these, counted from the first
        of them: weights (end - begin, pixels), of pixels of the source from ``first`` on."""
        for index in range(start // self._step, (start + length - 1) // self._step + 1):
            first, weights = self._block(index)
            top = index * self._step
            begin, end = max(start, top), min(start + length, top + len(weights))
            yield begin - start, end - start, first, weights[begin - top : end - top]

    def _block(self, index: int) -> tuple[int, Floats]:
        found = self._kept.get(index)
        if found is None:
            found = _block(self._source, self._size, index * self._step, self._step)
            if found[1].nbytes <= self._room:
                self._room -= found[1].nbytes
                self._kept[index] = found
        return found


_axis = functools.lru_cache(KEPT_AXES)(_Axis)


def _block(source: int, size: int, top: int, length: int) -> tuple[int, Floats]:
    """The first pixel of the source that results from ``top`` on are made of, and their weights."""
    ratio = source / size
    stretch = max(1.0, ratio)  # when it shrinks, the filter sees all pixels
    centres = (np.arange(top, min(size, top + length)) + 0.5) * ratio
    first = max(0, math.floor(centres[0] - 2 * stretch))
    last = min(source, math.ceil(centres[-1] + 2 * stretch))
    places = np.arange(first, last) + 0.5
    weights = _bicubic(np.abs(places - centres[:, None]) / stretch)
    weights /= weights.sum(1, keepdims=True)  # at the edges, of what there is
    return first, weights.astype(np.float32)


def _bicubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' kernel (1981) with a = -0.5."""
    x = np.minimum(distance, 2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, far)


def _parts(length: int, products: int) -> Iterator[slice]:
    """``length`` columns or rows, so many at a time that each product stays below PRODUCTS."""
    step = max(16, PRODUCTS // max(1, products))
    for first in range(0, length, step):
        yield slice(first, first + step)


def upsample(image: npt.NDArray[np.generic], size_hw: tuple[int, int], unit: float = 1.0) -> Floats:
    """The whole image at another size: (H, W, C) -> (height, width, C) float32, times ``unit``."""
    return Resampler(image, size_hw, unit).box(0, 0, *size_hw)


def resize_for_tokens(image: npt.NDArray[np.generic], side_px: int, unit: float = 1.0) -> Floats:
    """The whole image squashed to a square, antialiased: (H, W, C) -> (S, S, C) float32."""
    resampler = Resampler(image, (side_px, side_px), unit)
    out = np.empty((side_px, side_px, image.shape[2]), np.float32)
    height, width = image.shape[:2]
    shorter, longer = sorted((height, width))
    band = min(TOKEN_BAND_ROWS * side_px // longer, TOKEN_BAND_PIXELS // shorter)
    block = min(BLOCK_SHRINKING, max(1, side_px // 8))  # what weights are made for
    band = max(block, band // block * block)
    for part in row_bands(side_px, band):  # along the longer side: each pixel once
        count = part.stop - part.start
        if height < width:
            out[:, part] = resampler.box(0, part.start, side_px, count)
        else:
            out[part] = resampler.box(part.start, 0, count, side_px)
    return out
