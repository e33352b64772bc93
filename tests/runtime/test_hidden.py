"""Pixels under alpha 0: which colours they get, and which pixels stay as they are."""

from __future__ import annotations

import numpy as np
import pytest

from rcod_runtime.hidden import fill_hidden


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 9, 3), (7, 1, 1), (2, 2, 3), (65, 131, 3), (200, 33, 1)])
def test_visible_pixels_stay_and_hidden_ones_get_their_colours(
    dtype: type, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    colours = rng.integers(0, top + 1, shape).astype(dtype)
    alpha = (rng.integers(0, 2, (*shape[:2], 1)) * rng.integers(1, top, (*shape[:2], 1))).astype(
        dtype
    )
    alpha[0, 0], alpha[-1, -1] = 0, 1
    before = colours.copy()
    filled = fill_hidden(colours, alpha)
    np.testing.assert_array_equal(colours, before)
    assert filled.dtype == dtype and filled.shape == shape
    seen = alpha[:, :, 0] > 0
    np.testing.assert_array_equal(filled[seen], colours[seen])
    colours[seen], colours[~seen] = top // 3, top
    assert (fill_hidden(colours, alpha) == top // 3).all()


def test_each_hidden_pixel_gets_the_colours_of_its_own_neighbourhood() -> None:
    colours = np.zeros((64, 256, 3), np.uint8)
    alpha = np.zeros((64, 256, 1), np.uint8)
    colours[:, :16], colours[:, -16:] = (200, 100, 50), (20, 40, 60)
    alpha[:, :16] = alpha[:, -16:] = 255
    filled = fill_hidden(colours, alpha).astype(int)
    assert np.abs(filled[:, :20] - (200, 100, 50)).max() <= 12
    assert np.abs(filled[:, -20:] - (20, 40, 60)).max() <= 12
    assert np.abs(filled[:, 128] - (110, 70, 55)).max() <= 20


@pytest.mark.parametrize("alpha", [0, 1, 255])
def test_an_image_of_which_nothing_or_all_is_hidden_is_not_copied(alpha: int) -> None:
    colours = np.full((9, 7, 3), 5, np.uint8)
    assert fill_hidden(colours, np.full((9, 7, 1), alpha, np.uint8)) is colours
