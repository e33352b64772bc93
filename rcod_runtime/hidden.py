"""Colours for the pixels under alpha 0, so that what nobody sees does not darken what is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rcod_runtime.parallel import in_parallel, row_bands
from rcod_runtime.resample import Resampler

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


def fill_hidden(colours: Pixels, alpha: Pixels) -> Pixels:
    """The colours (H, W, C), and where ``alpha`` (H, W, 1) is 0 what the visible ones around give.

    Pull and push (Gortler et al. 1996): the colours, weighted by alpha, are halved until none
    is missing, and on the way back each level fills the holes of the next finer one. Beside the
    result it takes some 8 bytes a pixel.

    Returns:
        A new array; ``colours`` itself where no pixel is hidden, or all are.
    """
    if alpha.all() or not alpha.any():
        return colours
    levels = [_halved_input(colours, alpha)]  # (C + 1, h, w): sums of colour times alpha, of alpha
    while not levels[-1][-1].all():
        levels.append(_halved(levels[-1]))
    coarser: Floats | None = None
    while levels:
        sums = levels.pop()
        known, weight = sums[:-1].transpose(1, 2, 0), sums[-1]
        np.divide(sums[:-1], weight, out=sums[:-1], where=weight > 0)
        if coarser is not None:
            _fill(known, weight, coarser)
        coarser = known
    assert coarser is not None
    filled = colours.copy()
    _fill(filled, alpha[:, :, 0], coarser)
    return filled


def _halved_input(colours: Pixels, alpha: Pixels) -> Floats:
    height, width, channels = colours.shape
    halved = np.empty((channels + 1, (height + 1) // 2, (width + 1) // 2), np.float32)

    def halve(rows: slice) -> None:
        weighted = np.empty((channels + 1, rows.stop - rows.start, width), np.float32)
        weighted[-1] = alpha[rows, :, 0]
        for c in range(channels):
            np.multiply(colours[rows, :, c], weighted[-1], out=weighted[c])
        halved[:, rows.start // 2 : (rows.stop + 1) // 2] = _halved(weighted)

    in_parallel(halve, row_bands(height))
    return halved


def _halved(sums: Floats) -> Floats:
    """Sums over 2 x 2 pixels; beyond the edges is nothing, which weighs nothing."""
    _, height, width = sums.shape
    even = np.pad(sums, ((0, 0), (0, height % 2), (0, width % 2)))
    rows: Floats = even[:, ::2] + even[:, 1::2]
    return rows[:, :, ::2] + rows[:, :, 1::2]


def _fill(colours: npt.NDArray[Any], weight: npt.NDArray[Any], coarser: Floats) -> None:
    """Put what the level of half the size gives where ``weight`` (H, W) is 0, in place."""
    height, width, channels = colours.shape
    upsampled = Resampler(coarser, (2 * coarser.shape[0], 2 * coarser.shape[1]))

    def fill(rows: slice) -> None:
        hidden = weight[rows] == 0
        if not hidden.any():
            return
        values = upsampled.box(rows.start, 0, rows.stop - rows.start, width)
        if colours.dtype != np.float32:
            np.rint(np.clip(values, 0, np.iinfo(colours.dtype).max, out=values), out=values)
        for c in range(channels):
            np.copyto(colours[rows, :, c], values[:, :, c], where=hidden, casting="unsafe")

    in_parallel(fill, row_bands(height))
