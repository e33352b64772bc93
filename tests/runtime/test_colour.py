"""Colour match `consistent`: what comes back of the input and what doesn't."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from rcod_runtime import colour
from rcod_runtime.colour import match_colour

Photo = Callable[..., np.ndarray]


def low_and_missing(sr: np.ndarray, lq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``sr`` with the input's broad colours, and the brightness that it then lacks of the input."""
    broad = sr.copy()
    match_colour(broad, lq, "wavelet")
    height, width = lq.shape[:2]
    averaged = broad.reshape(height, 4, width, 4, 3).mean((1, 3))
    return broad, (lq - averaged) @ (0.299, 0.587, 0.114)


def test_consistent_match_gives_detail_back_that_stands_above_the_noise(photo: Photo) -> None:
    """A photo whose left third is flat: what the result has lost of the rest can't be noise."""
    lq = photo(96, 144)
    lq[:, :48] = 90
    sr = np.full((4 * 96, 4 * 144, 3), 90, np.uint8)  # no detail at all
    match_colour(sr, lq, "consistent")
    _, missing = low_and_missing(np.full_like(sr, 90), lq)
    _, left = low_and_missing(sr, lq)
    # Upsampling smooths what it brings back, so a part of the finest is lost.
    assert np.square(left[:, 60:]).sum() < 0.5 * np.square(missing[:, 60:]).sum()
    assert np.abs(sr.mean((0, 1)) - lq.mean((0, 1))).max() < 1


def test_consistent_match_leaves_noise_out(photo: Photo) -> None:
    clean = photo(96, 144) // 2 + 60
    noise = np.random.default_rng(0).normal(0, 8, (96, 144, 1))
    lq = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    sr = np.asarray(Image.fromarray(clean).resize((576, 384), Image.Resampling.NEAREST)).copy()
    broad, _ = low_and_missing(sr, lq)
    match_colour(sr, lq, "consistent")
    added = (sr.astype(float) - broad).reshape(96, 4, 144, 4, 3).mean((1, 3))
    assert 0 < added.std() < 0.15 * noise.std()


def test_consistent_match_keeps_to_brightness_beyond_the_broad_colours(photo: Photo) -> None:
    lq = np.repeat(photo(96, 144)[:, :, :1], 3, axis=2)
    lq[:, :48] = 90
    lq[::2, 48:, 0] ^= 16  # colour in every second row
    sr = np.full((4 * 96, 4 * 144, 3), 90, np.uint8)
    broad, _ = low_and_missing(sr, lq)
    match_colour(sr, lq, "consistent")
    added = sr.astype(int) - broad
    assert np.abs(added).max() > 20
    assert np.abs(added[..., 0] - added[..., 1]).max() <= 2  # it was rounded twice


def test_consistent_match_changes_nothing_that_is_consistent(photo: Photo) -> None:
    sr = photo(128, 192)
    lq = sr.reshape(32, 4, 48, 4, 3).mean((1, 3)).astype(np.float32)
    matched = sr.copy()
    match_colour(matched, lq, "consistent")
    assert np.abs(matched.astype(int) - sr).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("cell", [(4, 4), (3, 2), (1, 4), (24, 16)])
def test_averages_of_whole_cells_are_those_of_pillow(dtype: type, cell: tuple[int, int]) -> None:
    size = 4, 6
    shape = size[0] * cell[0], size[1] * cell[1], 3
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    rows = slice(1, 3)
    expected = colour._averaged(image.astype(np.float32), rows, size)  # floats are Pillow's
    np.testing.assert_allclose(colour._averaged(image, rows, size), expected, rtol=1e-6)
