"""The validation's PSNR and SSIM against the benchmarks', which reproduce published figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import metrics as published
from benchmarks.picture import draw_picture
from rcod_train.metrics import psnr_y, ssim_y


def test_psnr_and_ssim_are_those_of_published_tables() -> None:
    hq = draw_picture(40, 57)
    noise = np.random.default_rng(0).normal(0, 12, hq.shape)
    images = [np.clip(hq + noise * k, 0, 255).astype(np.uint8) for k in (0.3, 1, 3)]
    sr = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    x = torch.from_numpy(np.stack([hq] * 3)).permute(0, 3, 1, 2)
    assert psnr_y(sr, x).tolist() == pytest.approx([published.psnr_y(i, hq) for i in images])
    assert ssim_y(sr, x).tolist() == pytest.approx([published.ssim_y(i, hq) for i in images])


def test_equal_images_have_infinite_psnr_and_an_ssim_of_1() -> None:
    x = torch.from_numpy(draw_picture(20, 20)).permute(2, 0, 1)[None]
    assert psnr_y(x, x).item() == float("inf")
    assert ssim_y(x, x).item() == pytest.approx(1.0)
