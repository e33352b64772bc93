"""Losses between images, against the metrics they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rcod_export.bundle import DEFAULT_SAMPLE
from rcod_runtime.image_io import read_image
from rcod_train.data import to_unit
from rcod_train.distances import gradient_loss, ssim_loss
from rcod_train.quality.metrics import ssim_y


def unit(images: list[np.ndarray]) -> torch.Tensor:
    return to_unit(torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2)))


def test_ssim_loss_is_one_less_the_metric() -> None:
    rng = np.random.default_rng(0)
    photo = read_image(DEFAULT_SAMPLE).pixels[:48, :40]
    noisy = [
        np.clip(photo + rng.normal(0, sigma, photo.shape), 0, 255).astype(np.uint8)
        for sigma in (6, 20)
    ]
    for image in noisy:  # one by one and as a batch: the same mean
        loss = ssim_loss(unit([image]), unit([photo]))
        assert loss.item() == pytest.approx(1 - ssim_y(image, photo), abs=4e-3)
    both = ssim_loss(unit(noisy), unit([photo, photo])).item()
    assert both == pytest.approx(1 - np.mean([ssim_y(x, photo) for x in noisy]), abs=4e-3)
    assert ssim_loss(unit(noisy), unit(noisy)).item() == pytest.approx(0, abs=1e-5)


def test_its_gradient_leads_to_the_photo() -> None:
    photo = unit([read_image(DEFAULT_SAMPLE).pixels[:48, :40]])
    image = torch.nn.functional.avg_pool2d(photo, 5, 1, 2).requires_grad_()
    before = ssim_loss(image, photo)
    before.backward()
    assert image.grad is not None
    step = image.detach() - 2 * image.grad
    assert ssim_loss(step, photo) < 0.95 * before


def test_gradient_loss_sees_edges_and_not_brightness() -> None:
    a = torch.zeros(1, 3, 4, 6)
    assert gradient_loss(a + 0.5, a) == 0
    edge = a.clone()
    edge[..., 3:] = 1.0  # one of five differences along x
    assert gradient_loss(edge, a).item() == pytest.approx(1 / 5)
