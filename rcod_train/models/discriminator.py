"""A small multi-scale patch discriminator; it is trained beside the generator and never ships."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """One scale: features, and last a map of scores of patches (Isola et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
            padding = (kernel - stride) // 2
            return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))

        self.blocks = nn.ModuleList(
            [
                conv(12, channels, 3),
                conv(channels, 2 * channels, 4, stride=2),
                conv(2 * channels, 4 * channels, 4, stride=2),
                conv(4 * channels, 4 * channels, 3),
            ]
        )
        self.scores = conv(4 * channels, 1, 3)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [F.pixel_unshuffle(image, 2)]
        for block in self.blocks:
            maps.append(F.leaky_relu(block(maps[-1]), 0.2))
        return [*maps[1:], self.scores(maps[-1])]


class Discriminator(nn.Module):
    """Looks at the image and at the image at half its size."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.scales = nn.ModuleList([PatchDiscriminator(channels), PatchDiscriminator(channels)])

    def forward(self, image: Tensor) -> list[list[Tensor]]:
        """image (B, 3, H, W) in [-1, 1], sides multiples of 16 -> of each scale the features of its
        four blocks, (B, C, h, w), and last the scores, (B, 1, h, w)."""
        return [self.scales[0](image), self.scales[1](F.avg_pool2d(image, 2))]


def hinge_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """The discriminator's: mean relu(1 - D(hq)) + mean relu(1 + D(sr)), averaged over scales."""
    losses = [
        F.relu(1 - r[-1].float()).mean() + F.relu(1 + f[-1].float()).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return sum(losses[1:], losses[0]) / len(losses)


def adversarial_loss(fake: list[list[Tensor]]) -> Tensor:
    """The generator's, of each sample: -mean D(sr), averaged over scales; (B,)."""
    losses = [-f[-1].float().mean((1, 2, 3)) for f in fake]
    return sum(losses[1:], losses[0]) / len(losses)


def feature_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """Mean distance of the features (Wang et al. 2018, Eq. 4), of each sample; (B,).

    It holds an adversarial training to the photo: noise that fools the scores has other features.
    """
    losses = [
        (r.float() - f.float()).abs().mean((1, 2, 3))
        for scale_r, scale_f in zip(real, fake, strict=True)
        for r, f in zip(scale_r[:-1], scale_f[:-1], strict=True)
    ]
    return torch.stack(losses).mean(0)
