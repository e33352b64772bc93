"""The runtime's colour match ``consistent``, with gradients: losses can look at what users see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# rcod_runtime/colour.py says what they are; a test holds the two to each other.
DETAIL_SHARE, FINEST_SHARE = 0.75, 0.75
LOW_PASS_PX, CELL_PX = 4, 12
QUIETEST, CLIPPED = 0.05, 0.05
LUMA = (0.299, 0.587, 0.114)


def match_consistently(sr: Tensor, lq_u8: Tensor) -> Tensor:
    """sr (B, 3, H, W) in [-1, 1], of lq (B, 3, h, w) uint8 as it was before upsampling -> the same
    with the lq's colours, and with the detail of its brightness that is no noise.

    One step of back-projection, linear in sr: the share of the detail that comes back is measured,
    and no gradient goes through it. Noise is measured in each crop, which has fewer cells than a
    photo, so less comes back here of a crop that is detailed everywhere.
    """
    lq = lq_u8.float() / 127.5 - 1.0
    size = lq.shape[-2:]
    missing = lq - F.adaptive_avg_pool2d(sr, size)
    low = _resized(F.adaptive_avg_pool2d(missing, _cells(size, LOW_PASS_PX)), size)
    weights = sr.new_tensor(LUMA).view(1, 3, 1, 1)
    detail = ((missing - low) * weights).sum(1, keepdim=True)
    with torch.no_grad():
        share = _resized(_above_noise(detail, lq, weights), size).clamp(0, 1)
    finest = detail - _smoothed(detail)
    correction = low + share * (DETAIL_SHARE * detail + FINEST_SHARE * finest)
    return (sr + _resized(correction, sr.shape[-2:])).clamp(-1, 1)


def _above_noise(detail: Tensor, lq: Tensor, weights: Tensor) -> Tensor:
    """The share of each cell's detail that is not noise, 0 to 1: (B, 1, rows, columns)."""
    cells = _cells(detail.shape[-2:], CELL_PX)
    energy = F.adaptive_avg_pool2d(detail.square(), cells)
    brightness = (F.adaptive_avg_pool2d(lq, cells) * weights).sum(1, keepdim=True)
    clipped = brightness.abs() > 1 - 2 * CLIPPED
    nearly_all = clipped.float().mean((1, 2, 3), keepdim=True) > 0.9
    open_ = energy.masked_fill(clipped & ~nearly_all, torch.nan)
    noise = 2 * torch.nanquantile(open_.flatten(1), QUIETEST, dim=1).view(-1, 1, 1, 1)
    least = 1e-6 / 127.5**2
    return (1 - noise / energy.clamp_min(least)).clamp_min(0)


def _smoothed(plane: Tensor) -> Tensor:
    """Under the kernel 1 2 1 in both directions, its edges repeated."""
    taps = plane.new_tensor([1.0, 2.0, 1.0]) / 4
    padded = F.pad(plane, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 3, 1)), taps.view(1, 1, 1, 3))


def _cells(size_hw: tuple[int, ...], side: int) -> tuple[int, int]:
    height, width = (max(1, round(length / side)) for length in size_hw)
    return height, width


def _resized(image: Tensor, size_hw: tuple[int, ...]) -> Tensor:
    """Bicubic with Pillow's a = -0.5, which PyTorch's has with antialiasing alone."""
    return F.interpolate(image, tuple(size_hw), mode="bicubic", antialias=True, align_corners=False)
