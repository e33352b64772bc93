"""Tiles: cover, weights, streaming, and blending against the untiled pipeline."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from rcod_runtime import Upscaler, resample
from rcod_runtime.errors import UsageError
from rcod_runtime.resample import Resampler, resize_for_tokens, upsample
from rcod_runtime.tiles import (
    GRID_PX,
    WORTH_FITTING,
    Blender,
    TilePlan,
    fitting_tile_px,
    pad_to,
    plan_axis,
    plan_image,
)

AXES = [(1, 64, 16), (63, 64, 16), (64, 64, 16), (65, 64, 16), (130, 64, 0), (511, 128, 64)]


@pytest.mark.parametrize(("length", "tile", "overlap"), AXES)
def test_weights_sum_to_one_at_every_pixel(length: int, tile: int, overlap: int) -> None:
    axis = plan_axis(length, tile, overlap, 32)
    total = np.zeros(length)
    for i, (start, weights) in enumerate(zip(axis.starts, axis.weights, strict=True)):
        assert len(weights) == axis.valid(i)
        total[start : start + len(weights)] += weights
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


@pytest.mark.parametrize(("length", "tile", "overlap"), AXES)
def test_neighbours_overlap_by_at_least_what_was_asked(
    length: int, tile: int, overlap: int
) -> None:
    axis = plan_axis(length, tile, overlap, 32)
    shared = [a + axis.tile_px - b for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
    assert all(s >= overlap for s in shared)
    assert axis.tile_px % 32 == 0


@pytest.mark.parametrize("overlap", [0, 16, 64, 128])
def test_tiles_start_on_the_grid_that_the_networks_have_seen(overlap: int) -> None:
    """Between its pixels and latents two tiles make different texture of what they share."""
    for length in range(257, 2400, 7):
        axis = plan_axis(length, 256, overlap, 32)
        assert all(start % GRID_PX == 0 for start in axis.starts)
        assert axis.starts[0] == 0 and length <= axis.starts[-1] + 256 < length + GRID_PX
        apart = [b - a for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
        assert min(apart) > 0 and max(apart) <= 256 - overlap
        assert max(apart) - min(apart) <= GRID_PX
        assert len(axis.starts) <= -(-(length - overlap) // (256 - overlap)) + (overlap % GRID_PX)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 24, 33])
def test_what_is_looked_at_is_spread_over_the_image(rows: int) -> None:
    """16 of 16 rows had all been of one column."""
    for columns in (1, 2, 5, 16, 22, 40):
        y, x = (plan_axis(40 * n + 24, 64, 24, 8) for n in (rows, columns))
        plan = TilePlan(y, x)
        assert plan.count == rows * columns
        chosen = plan.spread(16)
        assert len(set(chosen)) == len(chosen) <= 16 and set(chosen) <= set(plan.positions())
        assert len(chosen) == plan.count if plan.count <= 16 else len(chosen) >= 8
        for axis, count in enumerate((rows, columns)):
            places = sorted({position[axis] for position in chosen})
            if count > 1 and len(places) > 1:
                assert places[0] < count / 2 <= places[-1]
            if rows > 2 and columns > 2:
                assert len(places) > 1, (rows, columns, chosen)


def test_batches_end_with_a_row_and_are_as_even_as_can_be() -> None:
    for columns, most, size in ((1, 4, 1), (2, 4, 2), (3, 4, 3), (5, 4, 3), (9, 4, 3), (8, 4, 4)):
        axis = plan_axis(40 * columns + 24, 64, 24, 8)
        plan = TilePlan(plan_axis(64, 64, 24, 8), axis)
        assert len(axis.starts) == columns and plan.batch(most) == size


def test_a_small_image_gets_one_small_tile() -> None:
    axis = plan_axis(70, 512, 64, 32)
    assert (axis.tile_px, axis.starts) == (96, (0,))


@pytest.mark.parametrize("overlap", [0, 16, 64, 128])
def test_fitting_tiles_are_the_least_that_make_no_more(overlap: int) -> None:
    for length in range(1, 2400, 7):
        usual = plan_axis(length, 256, overlap, 32)
        tile_px = fitting_tile_px(length, 256, overlap, 32)
        fitted = plan_axis(length, tile_px, overlap, 32)
        assert len(fitted.starts) == len(usual.starts) and fitted.tile_px <= usual.tile_px
        if 32 <= 2 * overlap <= tile_px - 32 and length > 256:
            assert len(plan_axis(length, tile_px - 32, overlap, 32).starts) > len(usual.starts)


def test_tiles_fit_where_that_saves_a_quarter_of_the_work() -> None:
    def sides(height: int, width: int, fit: bool) -> tuple[int, int, int]:
        plan = plan_image((height, width), 512, None, 64, 32, fit)
        return plan.count, plan.y.tile_px, plan.x.tile_px

    assert sides(1024, 1024, False) == (9, 512, 512)
    assert sides(1024, 1024, True) == (9, 384, 384)
    assert sides(640, 400, True) == (2, 352, 416)
    assert sides(2048, 2048, True) == (25, 512, 512), "an eighth is not worth it"
    assert sides(300, 512, True) == sides(300, 512, False) == (1, 320, 512)
    for height in range(500, 1500, 64):
        for width in range(500, 1500, 64):
            usual, fitted = (
                plan_image((height, width), 512, None, 64, 32, fit) for fit in (False, True)
            )
            assert fitted.positions() == usual.positions()
            saved = 1 - fitted.pixels / usual.pixels
            assert saved == 0 or saved >= WORTH_FITTING


@pytest.mark.parametrize(("tile", "overlap"), [(100, 0), (0, 0), (64, 33), (64, -1)])
def test_tiles_the_network_cannot_take_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="expected"):
        plan_axis(200, tile, overlap, 32)


def test_blended_constant_tiles_give_the_constant_row_by_row() -> None:
    plan = TilePlan(plan_axis(150, 64, 16, 32), plan_axis(90, 64, 16, 32))
    blender = Blender(plan, 2)
    seen = np.full((150, 90, 2), np.nan, np.float32)
    for row in range(len(plan.y.starts)):
        for column in range(len(plan.x.starts)):
            blender.add(row, column, np.full((64, 64, 2), 7.0, np.float32))
        for top, rows in blender.finish_row(row):
            assert np.isnan(seen[top : top + len(rows)]).all(), "a row came twice"
            seen[top : top + len(rows)] = rows
    np.testing.assert_allclose(seen, 7.0, atol=1e-5)


def test_upsampling_a_box_equals_the_crop_of_the_whole(photo: Callable[..., np.ndarray]) -> None:
    image, size = photo(23, 31), (77, 101)
    whole = upsample(image, size)
    resampler = Resampler(image, size)
    for top, left, height, width in [(0, 0, 77, 101), (5, 40, 32, 61), (60, 0, 17, 20)]:
        box = resampler.box(top, left, height, width)
        np.testing.assert_allclose(box, whole[top : top + height, left : left + width], atol=2e-3)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((23, 31), (92, 124)),
        ((130, 70), (307, 166)),
        ((100, 100), (100, 100)),
        ((300, 41), (64, 64)),
        ((900, 13), (7, 200)),
        ((1, 1), (4, 4)),
        ((2, 3), (8, 11)),
    ],
)
def test_it_is_pillow_s_bicubic(
    photo: Callable[..., np.ndarray], shape: tuple[int, int], size: tuple[int, int]
) -> None:
    """Growing, shrinking (antialiased), at edges and across blocks."""
    image = photo(*shape)
    for found, plane in zip(
        upsample(image, size).transpose(2, 0, 1), image.transpose(2, 0, 1), strict=True
    ):
        wanted = Image.fromarray(plane.astype(np.float32)).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        np.testing.assert_allclose(found, np.asarray(wanted), atol=2e-4)


@pytest.mark.parametrize("shape", [(1, 400_000, 3), (400_000, 1, 3)])
def test_memory_for_tokens_of_a_line_follows_its_pixels(shape: tuple[int, ...]) -> None:
    """Not its pixels times the tokens' rows."""
    image = np.zeros(shape, np.uint8)
    tracemalloc.start()
    try:
        assert resize_for_tokens(image, 64).shape == (64, 64, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150 * image.size


def test_weights_are_kept_within_their_bound() -> None:
    axis = resample._Axis(50_000, 200_000)
    made = [list(axis.blocks(start, 64)) for start in range(0, 200_000, 64)]
    assert sum(weights.nbytes for blocks in made for *_, weights in blocks) > resample.KEPT_BYTES
    kept = sum(weights.nbytes for _, weights in axis._kept.values())
    assert 0.9 * resample.KEPT_BYTES < kept <= resample.KEPT_BYTES
    again = list(axis.blocks(0, 64))
    assert again[0][-1].base is made[0][0][-1].base, "those are not made again"


def test_padding_mirrors_even_a_single_pixel() -> None:
    assert (pad_to(np.full((1, 1, 3), 5.0, np.float32), 32, 64) == 5.0).all()


def test_tiled_equals_untiled_on_a_network_with_a_local_receptive_field(
    upscaler: Upscaler, photo: Callable[..., np.ndarray]
) -> None:
    lq = photo(48, 72)  # 192 x 288: no padding, so that both see the same image edges
    untiled = upscaler(lq, "realism", colour_match="none", tile_px=320, overlap_px=0)
    tiled = upscaler(lq, "realism", colour_match="none", tile_px=64, overlap_px=24)
    difference = np.abs(tiled.astype(int) - untiled.astype(int))
    histogram = np.bincount(difference.ravel(), minlength=4)
    assert difference.max() <= 1, f"pixels off by 0, 1, 2, ...: {histogram[:10]}"


@pytest.mark.parametrize("batch", [2, 3, 64])
def test_a_batch_of_tiles_gives_the_image_of_single_tiles(
    upscaler: Upscaler, photo: Callable[..., np.ndarray], batch: int
) -> None:
    lq = photo(40, 60)
    np.testing.assert_array_equal(upscaler(lq, 0.5, batch=batch), upscaler(lq, 0.5))
