"""PSNR and SSIM on luma, in the conventions of published super-resolution tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rcod_train.errors import MetricError, MissingPackage

Floats = npt.NDArray[np.float64]

PEAK = 255.0
LUMA_OFFSET = 16.0
LUMA_WEIGHTS = np.array([65.481, 128.553, 24.966])  # ITU-R BT.601, studio range

SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
SSIM_C1, SSIM_C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def luma(image: npt.NDArray[np.generic]) -> Floats:
    """Y of YCbCr, not rounded: (H, W, 3) RGB in 0..255 -> (H, W) in 16..235."""
    y: Floats = LUMA_OFFSET + image.astype(np.float64) @ LUMA_WEIGHTS / PEAK
    return y


def psnr_y(sr: npt.NDArray[np.uint8], hq: npt.NDArray[np.uint8]) -> float:
    """PSNR in dB of the unrounded luma, peak 255, borders included; inf for equal images.

    Args:
        sr, hq: (H, W, 3) RGB uint8 of the same size.
    """
    _check_pair(sr, hq)
    error = float(np.mean((luma(sr) - luma(hq)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim_y(sr: npt.NDArray[np.uint8], hq: npt.NDArray[np.uint8]) -> float:
    """SSIM (Wang et al. 2004) of the luma rounded to integers, over the valid area of an 11x11
    gaussian window, without downsampling.

    The contrast-structure term is clamped at 0, as the tool behind the published tables does it.

    Args:
        sr, hq: (H, W, 3) RGB uint8 of the same size, at least 11 px a side.
    """
    _check_pair(sr, hq)
    if min(sr.shape[:2]) < SSIM_WINDOW_PX:
        raise MetricError(
            f"SSIM: expected at least {SSIM_WINDOW_PX} px a side, found "
            f"{sr.shape[1]} x {sr.shape[0]} px. Leave this image out."
        )
    x, y = np.rint(luma(sr)), np.rint(luma(hq))
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x = _windowed(x * x) - mean_x**2
    var_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    contrast_structure = (2 * covariance + SSIM_C2) / (var_x + var_y + SSIM_C2)
    brightness = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return float(np.mean(np.maximum(contrast_structure, 0.0) * brightness))


def gaussian(size_px: int, sigma_px: float) -> Floats:
    """A gaussian of ``size_px`` taps that sums to 1."""
    x = np.arange(size_px) - (size_px - 1) / 2
    taps: Floats = np.exp(-0.5 * (x / sigma_px) ** 2)
    taps /= taps.sum()
    return taps


def require_scipy() -> Any:
    """scipy, which the metrics need.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import scipy
    except ImportError as exc:
        raise MissingPackage(
            'image metrics need scipy, which is not installed: pip install "rcod[iqa]"'
        ) from exc
    return scipy


def _windowed(x: Floats) -> Floats:
    require_scipy()
    from scipy.ndimage import correlate1d

    taps = gaussian(SSIM_WINDOW_PX, SSIM_SIGMA_PX)
    margin = SSIM_WINDOW_PX // 2
    inside = slice(margin, -margin)
    smooth: Floats = correlate1d(correlate1d(x, taps, axis=0), taps, axis=1)
    return smooth[inside, inside]


def _check_pair(sr: npt.NDArray[np.uint8], hq: npt.NDArray[np.uint8]) -> None:
    for name, image in (("sr", sr), ("hq", hq)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise MetricError(
                f"{name}: expected (H, W, 3) uint8, found {image.shape} {image.dtype}."
            )
    if sr.shape != hq.shape:
        raise MetricError(f"sr and hq: expected the same size, found {sr.shape} and {hq.shape}.")
