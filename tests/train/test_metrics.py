"""PSNR and SSIM against values worked by hand and a plain reference."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
import pytest

from benchmarks.picture import draw_picture
from benchmarks.scores import bicubic
from rcod_train.errors import MetricError, MissingPackage
from rcod_train.quality.metrics import gaussian, luma, psnr_y, require_scipy, ssim_y


def flat(value: int, side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def test_luma_spans_16_to_235() -> None:
    assert luma(flat(0))[0, 0] == 16.0
    assert luma(flat(255))[0, 0] == pytest.approx(235.0)


def test_psnr_of_one_grey_level_is_worked_by_hand() -> None:
    # One level apart in all channels is 219/255 apart in Y; 20 log10(255 / (219/255)) = 49.4527.
    assert psnr_y(flat(100), flat(101)) == pytest.approx(49.4527, abs=1e-4)


def test_equal_images_are_perfect() -> None:
    image = draw_picture(64, 48)
    assert psnr_y(image, image) == math.inf
    assert ssim_y(image, image) == pytest.approx(1.0, abs=1e-12)


def test_stored_figures_of_a_drawn_picture_hold() -> None:
    hq = draw_picture(192, 288)
    sr = bicubic(hq[2::4, 2::4], hq.shape[:2])
    assert psnr_y(sr, hq) == pytest.approx(STORED["psnr_y"], abs=1e-4)
    assert ssim_y(sr, hq) == pytest.approx(STORED["ssim_y"], abs=1e-6)


def test_ssim_equals_a_plain_loop_over_windows() -> None:
    x, y = draw_picture(20, 17), draw_picture(20, 17)[::-1].copy()
    window = np.outer(gaussian(11, 1.5), gaussian(11, 1.5))
    a, b = np.rint(luma(x)), np.rint(luma(y))
    values = []
    for top in range(20 - 10):
        for left in range(17 - 10):
            p, q = (image[top : top + 11, left : left + 11] for image in (a, b))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p = (window * (p - mean_p) ** 2).sum()
            var_q = (window * (q - mean_q) ** 2).sum()
            both = (window * (p - mean_p) * (q - mean_q)).sum()
            contrast = (2 * both + 7.65**2) / (var_p + var_q + 7.65**2)
            light = (2 * mean_p * mean_q + 2.55**2) / (mean_p**2 + mean_q**2 + 2.55**2)
            values.append(max(contrast, 0.0) * light)
    assert min(values) == 0.0, "the clamp is not exercised"
    difference = abs(ssim_y(x, y) - float(np.mean(values)))
    assert difference < 1e-9, f"off by {difference}"


@pytest.mark.parametrize("metric", [psnr_y, ssim_y])
@pytest.mark.parametrize(
    ("sr", "said"),
    [
        (flat(0, 31), "same size"),
        (flat(0)[:, :, 0], "sr: expected"),
        (flat(0).astype(np.float32), "float32"),
    ],
)
def test_what_cannot_be_compared_is_refused(metric: Any, sr: np.ndarray, said: str) -> None:
    with pytest.raises(MetricError, match=said):
        metric(sr, flat(0))


def test_ssim_refuses_an_image_smaller_than_its_window() -> None:
    with pytest.raises(MetricError, match="at least 11 px"):
        ssim_y(flat(0, 10), flat(0, 10))


def test_without_scipy_the_error_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_scipy(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(MissingPackage, match=r'pip install "rcod\[iqa\]"'):
        require_scipy()


STORED = {"psnr_y": 30.01247, "ssim_y": 0.8120902}
