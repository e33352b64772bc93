"""LPIPS (Zhang et al. 2018), version 0.1: how far apart two images look."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rcod_train.errors import MetricError
from rcod_train.quality.features import ARCHITECTURES, Features, read_weights

SMALLEST_PX = 32  # a side; below, AlexNet's last features are nothing


class Lpips(nn.Module):
    """Two images (B, 3, H, W), RGB in [-1, 1] -> (B,), fp32, from 0 on; 0 for equal ones.

    Under autocast its convolutions run in the lower precision, and what is made of them in fp32.
    Gradients go to both images. Published figures of super-resolution are "alex"; trainings use
    "vgg".

    Raises:
        MissingPackage: the weights are not installed. MetricError: they are others; an image is
            smaller than 32 px a side.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: str) -> None:
        super().__init__()
        architecture = ARCHITECTURES[network]
        weights = read_weights(architecture)
        self.features = Features(architecture, weights)
        for i in range(len(architecture.taps)):
            values = torch.from_numpy(weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
            self.register_buffer(f"weight_{i}", values.view(1, -1, 1, 1))
        # The mean and the deviation of ImageNet, for values in [-1, 1], as published.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if min(a.shape[-2:]) < SMALLEST_PX:
            raise MetricError(
                f"LPIPS: expected at least {SMALLEST_PX} px a side, found {a.shape[-1]} x "
                f"{a.shape[-2]} px. Leave this image out, or use larger crops."
            )
        maps_a, maps_b = (self.features((x - self.shift) / self.scale) for x in (a, b))
        distance = a.new_zeros(len(a))
        for i, (map_a, map_b) in enumerate(zip(maps_a, maps_b, strict=True)):
            difference = (_unit(map_a) - _unit(map_b)).square() * self.get_buffer(f"weight_{i}")
            distance = distance + difference.sum(1).mean((1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    """Of length 1 at each place, fp32; in memory as the convolution left it."""
    features = features.float()
    unit: Tensor = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
    return unit
