"""Overlapping tiles over an image, and their blending into rows, ready one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcod_runtime.errors import UsageError
from rcod_runtime.parallel import row_bands

Floats = npt.NDArray[np.float32]

CACHED_ROWS = 16
# Tiles start on the grid of the latents, on which the enlarged pixels of the input lie too (where
# the scale is whole): between those the networks have never seen a photo, and two tiles that are
# not on one grid make different texture of what they share.
GRID_PX = 8
# Graphs for any size are slower than those that were compiled for one: by a quarter with AMX, by
# 14 % where these have Winograd's convolutions, by 2 % elsewhere.
WORTH_FITTING = 0.25


@dataclass(frozen=True)
class Axis:
    """Tiles along one axis: where each starts, and its weights, which sum to one at every pixel."""

    length_px: int
    tile_px: int
    starts: tuple[int, ...]
    weights: tuple[Floats, ...]

    def valid(self, index: int) -> int:
        """Pixels of a tile that lie inside the image; the rest is padding."""
        return min(self.tile_px, self.length_px - self.starts[index])


def check_tile(tile_px: int, multiple: int) -> None:
    """
    Raises:
        UsageError: no positive multiple, or no integer.
    """
    _check_whole("tile size", tile_px)
    if tile_px < multiple or tile_px % multiple:
        raise UsageError(f"tile size {tile_px} px: expected a multiple of {multiple} px.")


def is_whole(value: object) -> bool:
    """Whether it is an integer, of Python or of numpy."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_whole(name: str, value: object) -> None:
    if not is_whole(value):
        raise UsageError(f"{name} {value!r}: expected a whole number of pixels.")


def plan_axis(length_px: int, tile_px: int, overlap_px: int, multiple: int) -> Axis:
    """Cover ``length_px`` with tiles that overlap by at least ``overlap_px``.

    An image shorter than a tile gets one tile of the next multiple; the last of several may reach
    beyond the image, by less than GRID_PX. Raised-cosine ramps run over the overlaps.

    Raises:
        UsageError: a tile size that is not a positive multiple, or an overlap over half a tile.
    """
    check_tile(tile_px, multiple)
    if not 0 <= overlap_px <= tile_px // 2:
        raise UsageError(f"overlap {overlap_px} px: expected 0 to {tile_px // 2} px (half a tile).")
    if length_px <= tile_px:
        tile_px = math.ceil(length_px / multiple) * multiple
        return Axis(length_px, tile_px, (0,), (np.ones(length_px, np.float32),))
    last, count = _last_and_count(length_px, tile_px, overlap_px)
    starts = tuple(GRID_PX * round(i * last / (count - 1)) for i in range(count))
    windows = [np.ones(tile_px) for _ in starts]
    for i in range(count - 1):
        shared = starts[i] + tile_px - starts[i + 1]
        ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(shared) + 0.5) / max(1, shared))
        windows[i + 1][:shared] *= ramp
        windows[i][tile_px - shared :] *= ramp[::-1]
    total = np.zeros(starts[-1] + tile_px)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + tile_px] += window
    weights = tuple(
        (window / total[start : start + tile_px])[: length_px - start].astype(np.float32)
        for start, window in zip(starts, windows, strict=True)
    )
    return Axis(length_px, tile_px, starts, weights)


def _last_and_count(length_px: int, tile_px: int, overlap_px: int) -> tuple[int, int]:
    """Where the last of several tiles starts, in GRID_PX, and how many there are."""
    last = math.ceil((length_px - tile_px) / GRID_PX)
    return last, math.ceil(last / max(1, (tile_px - overlap_px) // GRID_PX)) + 1


def fitting_tile_px(length_px: int, tile_px: int, overlap_px: int, multiple: int) -> int:
    """The least size of as many tiles as ``length_px`` needs of ``tile_px``."""
    if length_px <= tile_px:
        return tile_px
    _, count = _last_and_count(length_px, tile_px, overlap_px)
    while (
        tile_px - multiple >= max(multiple, 2 * overlap_px)
        and _last_and_count(length_px, tile_px - multiple, overlap_px)[1] == count
    ):
        tile_px -= multiple
    return tile_px


@dataclass(frozen=True)
class TilePlan:
    """Tiles of an image, row by row."""

    y: Axis
    x: Axis

    @property
    def count(self) -> int:
        return len(self.y.starts) * len(self.x.starts)

    @property
    def pixels(self) -> int:
        """Of all tiles, what they share counted as often as it is computed."""
        return self.count * self.y.tile_px * self.x.tile_px

    def positions(self) -> list[tuple[int, int]]:
        """(row, column) of every tile, rows first."""
        return [(i, j) for i in range(len(self.y.starts)) for j in range(len(self.x.starts))]

    def spread(self, count: int) -> list[tuple[int, int]]:
        """At most so many of the positions, all over the image: rows and columns evenly."""
        rows, columns = len(self.y.starts), len(self.x.starts)
        if self.count <= count:
            return self.positions()
        short, long = sorted((rows, columns))
        fewer = min(short, max(2, round(math.sqrt(count * short / long))))
        more = min(long, count // fewer)
        down, across = (fewer, more) if rows == short else (more, fewer)
        return [
            ((2 * i + 1) * rows // (2 * down), (2 * j + 1) * columns // (2 * across))
            for i in range(down)
            for j in range(across)
        ]

    def batch(self, most: int) -> int:
        """Tiles to a batch, at most so many. Batches end with a row of tiles: as few as can be are
        filled up."""
        columns = len(self.x.starts)
        return math.ceil(columns / math.ceil(columns / most))


def plan_image(
    size_px: tuple[int, ...],
    tile_px: int,
    overlap_px: int | None,
    usual_px: int,
    multiple: int,
    fit: bool = False,
) -> TilePlan:
    """Tiles of an image (height, width); without an overlap that of the bundle, or half a tile.

    ``fit``: as many smaller tiles, where that saves a WORTH_FITTING of the work: an image a little
    larger than a tile is mostly overlap otherwise.

    Raises:
        UsageError: as ``plan_axis``, or a size that is no integer.
    """
    check_tile(tile_px, multiple)
    if overlap_px is not None:
        _check_whole("overlap", overlap_px)
    tile_px = int(tile_px)  # numpy's have few bits
    overlap_px = min(usual_px, tile_px // 2) if overlap_px is None else int(overlap_px)
    plan = TilePlan(*(plan_axis(side, tile_px, overlap_px, multiple) for side in size_px))
    if not fit or plan.count == 1:
        return plan
    sides = (fitting_tile_px(side, tile_px, overlap_px, multiple) for side in size_px)
    y, x = (plan_axis(*both, overlap_px, multiple) for both in zip(size_px, sides, strict=True))
    fitted = TilePlan(y, x)
    return fitted if fitted.pixels <= (1 - WORTH_FITTING) * plan.pixels else plan


class Blender:
    """Adds weighted tiles and yields rows of the image as soon as no later tile touches them.

    Holds one row of tiles in float32, whatever the image's height; in memory the channels lie one
    after another, as they come from the graphs.
    """

    def __init__(self, plan: TilePlan, channels: int) -> None:
        self.plan = plan
        height = min(plan.y.tile_px, plan.y.length_px)
        self._band = np.zeros((channels, height, plan.x.length_px), np.float32)
        self._top = 0

    def add(self, row: int, column: int, tile: Floats) -> None:
        """Add tile (row, column), (tile height, tile width, C); padding is cut off."""
        y, x = self.plan.y, self.plan.x
        height, width = y.valid(row), x.valid(column)
        left = x.starts[column]
        weights = y.weights[row][:, None] * x.weights[column][None, :]
        planes = tile.transpose(2, 0, 1)
        for band, plane in zip(self._band, planes, strict=True):
            band[:height, left : left + width] += plane[:height, :width] * weights

    def finish_row(self, row: int) -> Iterator[tuple[int, Floats]]:
        """After a row's last tile: all (top, rows (n, width, C)) that are final, a few at a time,
        so that what is made of them stays in the processor's cache. The caller may change them,
        and is done with them before the next add.
        """
        starts = self.plan.y.starts
        last = row == len(starts) - 1
        until = self.plan.y.length_px if last else starts[row + 1]
        ready = until - self._top
        rows = self._band.transpose(1, 2, 0)
        for part in row_bands(ready, CACHED_ROWS, self.plan.x.length_px):
            yield self._top + part.start, rows[part]
        if not last:
            kept = self._band.shape[1] - ready
            self._band[:, :kept] = self._band[:, ready:].copy()
            self._band[:, kept:] = 0.0
            self._top = until


def pad_to(tile: Floats, height: int, width: int) -> Floats:
    """Mirror a tile (h, w, C) at its lower and right edge up to (height, width, C)."""
    missing = (height - tile.shape[0], width - tile.shape[1])
    if missing == (0, 0):
        return tile
    return np.pad(tile, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="reflect")
