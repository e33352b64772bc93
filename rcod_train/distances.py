"""Distances between two images (B, 3, H, W) in [-1, 1] that a generator is trained on."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rcod_train.quality.metrics import (
    LUMA_OFFSET,
    LUMA_WEIGHTS,
    PEAK,
    SSIM_C1,
    SSIM_C2,
    SSIM_SIGMA_PX,
    SSIM_WINDOW_PX,
    gaussian,
)


def gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the forward differences of both, in both directions."""
    d = a - b
    return (d[:, :, 1:] - d[:, :, :-1]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


def ssim_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM (Wang et al. 2004) of the luma, as quality.metrics.ssim_y but for its rounding and
    its clamp, both of which would stop gradients; at least 11 px a side.

    A variance is the mean square less the squared mean. Both are taken around mid-grey, so that
    they stay small: a GPU may multiply with TF32's 10 bits.
    """
    middle = 0.5
    y_a, y_b = luma(a) - middle, luma(b) - middle
    maps = torch.cat([y_a, y_b, y_a * y_a, y_b * y_b, y_a * y_b])  # (5 B, H, W)
    down, across = (_windows(length).to(a) for length in maps.shape[-2:])
    mean_a, mean_b, square_a, square_b, product = (down @ maps @ across.T).chunk(5)
    c1, c2 = SSIM_C1 / PEAK**2, SSIM_C2 / PEAK**2
    variances = (square_a - mean_a**2).clamp_min(0) + (square_b - mean_b**2).clamp_min(0)
    contrast_structure = (2 * (product - mean_a * mean_b) + c2) / (variances + c2)
    mean_a, mean_b = mean_a + middle, mean_b + middle
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return 1.0 - (contrast_structure * brightness).mean()


@cache
def _windows(length: int) -> Tensor:
    """Each row averages one window: (length - 10, length) float64. As a matrix product, since a
    convolution of one channel takes thirteen times as long on a CPU, with its backward pass."""
    taps = torch.from_numpy(gaussian(SSIM_WINDOW_PX, SSIM_SIGMA_PX))
    rows = torch.zeros(length - SSIM_WINDOW_PX + 1, length, dtype=taps.dtype)
    for i, row in enumerate(rows):
        row[i : i + SSIM_WINDOW_PX] = taps
    return rows


def luma(image: Tensor) -> Tensor:
    """Y of YCbCr, (B, H, W) in 16/255 to 235/255."""
    weights = torch.from_numpy(LUMA_WEIGHTS / PEAK).to(image).view(1, 3, 1, 1)
    return (((image + 1) / 2) * weights).sum(1) + LUMA_OFFSET / PEAK
