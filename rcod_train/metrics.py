"""PSNR and SSIM on luma, in the conventions of published super-resolution tables."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PEAK = 255.0
WINDOW_PX, SIGMA_PX = 11, 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def luma(image: Tensor) -> Tensor:
    """Y of BT.601 in studio range, not rounded: (B, 3, H, W) RGB in 0..255 -> (B, 1, H, W)."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=image.device)
    return 16.0 + (image.double() * weights.view(1, 3, 1, 1)).sum(1, keepdim=True) / PEAK


def psnr_y(sr: Tensor, hq: Tensor) -> Tensor:
    """PSNR in dB of the luma, (B, 3, H, W) uint8 x 2 -> (B,); infinite for equal images."""
    return 10 * torch.log10(PEAK**2 / (luma(sr) - luma(hq)).square().mean((1, 2, 3)))


def ssim_y(sr: Tensor, hq: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of the rounded luma on the valid area of an 11 px gaussian window,
    the contrast-structure term clamped at 0. (B, 3, H, W) uint8 x 2, sides >= 11 px -> (B,)."""
    x, y = luma(sr).round(), luma(hq).round()
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x = _windowed(x * x) - mean_x.square()
    var_y = _windowed(y * y) - mean_y.square()
    covariance = _windowed(x * y) - mean_x * mean_y
    contrast_structure = (2 * covariance + C2) / (var_x + var_y + C2)
    brightness = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    return (contrast_structure.clamp(min=0) * brightness).mean((1, 2, 3))


def _windowed(x: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW_PX, dtype=x.dtype, device=x.device) - WINDOW_PX // 2
    taps = torch.exp(-0.5 * (offsets / SIGMA_PX).square())
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(x, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
