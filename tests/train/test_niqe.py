"""NIQE's parts against plain references; its whole against a stored figure."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.picture import draw_picture
from rcod_train.errors import MetricError, MissingPackage
from rcod_train.quality.niqe import (
    FEATURES_PER_SCALE,
    SHAPES,
    _moment_ratio,
    fit_asymmetric_gaussian,
    halved,
    niqe,
    patch_features,
)
from rcod_train.quality.pristine import Pristine, load_pristine

UNIT = Pristine(np.zeros(36), np.eye(36), "made by the test")


def test_fit_finds_the_shape_of_known_distributions() -> None:
    random = np.random.default_rng(0)
    samples = np.stack([random.laplace(0, 2, 200_000), random.normal(0, 3, 200_000)])
    shape, left, right = fit_asymmetric_gaussian(samples)
    assert shape == pytest.approx([1.0, 2.0], abs=0.03)
    # The scale of a Laplacian is its own, that of a gaussian is sqrt(2) sigma.
    assert left == pytest.approx([2.0, 3 * np.sqrt(2)], rel=0.03)
    assert right == pytest.approx(left, rel=0.03)


def test_fit_finds_both_sides_of_a_lopsided_distribution() -> None:
    random = np.random.default_rng(1)
    half = np.abs(random.normal(0, 1, 100_000))
    # Of an asymmetric gaussian each side has as much mass as its scale has of their sum.
    x = np.concatenate([-1.0 * half[:25_000], 3.0 * half[25_000:]])[None]
    shape, left, right = fit_asymmetric_gaussian(x)
    assert shape[0] == pytest.approx(2.0, abs=0.1)
    assert right[0] / left[0] == pytest.approx(3.0, rel=0.03)


def test_shape_search_equals_trying_every_candidate() -> None:
    curve = _moment_ratio()
    assert (np.diff(curve) > 0).all()
    samples = np.random.default_rng(2).standard_t(4, (40, 500))
    shape, _, _ = fit_asymmetric_gaussian(samples)
    for row, found in zip(samples, shape, strict=True):
        left, right = (np.sqrt((row[side] ** 2).mean()) for side in (row < 0, row > 0))
        g = left / right
        ratio = np.abs(row).mean() ** 2 / (row**2).mean()
        ratio *= (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
        assert found == SHAPES[np.argmin((curve - ratio) ** 2)]


def test_halving_equals_antialiased_bicubic_inside() -> None:
    grey = draw_picture(96, 128).astype(np.float64).mean(axis=2)
    small = Image.fromarray(grey.astype(np.float32)).resize((64, 48), Image.Resampling.BICUBIC)
    difference = np.abs(halved(grey) - np.asarray(small))[2:-2, 2:-2].max()
    assert difference < 1e-3, f"off by {difference}"


def test_features_have_one_row_for_each_patch() -> None:
    grey = draw_picture(200, 300).astype(np.float64).mean(axis=2)
    features = patch_features(grey)
    assert features.shape == (2 * 3, 2 * FEATURES_PER_SCALE)
    assert np.isfinite(features).all()
    np.testing.assert_array_equal(features, patch_features(grey[:192, :288]))


def test_distance_is_worked_by_hand() -> None:
    image = draw_picture(192, 288)
    features = patch_features(np.rint(image @ np.array([0.299, 0.587, 0.114])))
    mean, covariance = features.mean(axis=0), np.cov(features.T)
    expected = np.sqrt(mean @ np.linalg.solve((np.eye(36) + covariance) / 2, mean))
    assert niqe(image, UNIT) == pytest.approx(expected, rel=1e-9)


def test_stored_figure_of_a_drawn_picture_holds() -> None:
    assert niqe(draw_picture(192, 288), UNIT) == pytest.approx(STORED_UNIT, rel=1e-6)


def test_stored_figure_with_the_authors_parameters_holds() -> None:
    try:
        pristine = load_pristine()
    except MissingPackage as error:
        pytest.skip(str(error).splitlines()[0])
    assert niqe(draw_picture(288, 384), pristine) == pytest.approx(STORED_ORIGINAL, rel=1e-6)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (draw_picture(96, 191), "two patches"),
        (draw_picture(192, 192)[:, :, 0], "expected"),
        (draw_picture(192, 192).astype(np.float64), "float64"),
        (np.full((192, 192, 3), 90, np.uint8), "patches with contrast"),
    ],
)
def test_an_image_it_cannot_judge_is_refused(image: np.ndarray, said: str) -> None:
    with pytest.raises(MetricError, match=said):
        niqe(image, UNIT)


def test_a_flat_patch_does_not_spoil_the_others() -> None:
    image = draw_picture(192, 288)
    image[:96, :96] = 90
    assert np.isfinite(niqe(image, UNIT))


STORED_UNIT = 5.8400887
STORED_ORIGINAL = 16.3560918
