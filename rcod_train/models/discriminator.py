"""A small multi-scale patch discriminator; it is trained beside the generator and never ships."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """One scale: a map of scores, each of a patch of the image (Isola et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
            padding = (kernel - stride) // 2
            return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))

        self.net = nn.Sequential(
            nn.PixelUnshuffle(2),
            conv(12, channels, 3), nn.LeakyReLU(0.2),
            conv(channels, 2 * channels, 4, stride=2), nn.LeakyReLU(0.2),
            conv(2 * channels, 4 * channels, 4, stride=2), nn.LeakyReLU(0.2),
            conv(4 * channels, 4 * channels, 3), nn.LeakyReLU(0.2),
            conv(4 * channels, 1, 3),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.net(image)
        return scores


class Discriminator(nn.Module):
    """Scores of the image and of the image at half its size."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.scales = nn.ModuleList([PatchDiscriminator(channels), PatchDiscriminator(channels)])

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) in [-1, 1], sides multiples of 16 -> 2 x (B, 1, h, w)."""
        return [self.scales[0](image), self.scales[1](F.avg_pool2d(image, 2))]


def hinge_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """The discriminator's: mean relu(1 - D(hq)) + mean relu(1 + D(sr)), averaged over scales."""
    losses = [
        F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return sum(losses[1:], losses[0]) / len(losses)


def adversarial_loss(fake: list[Tensor]) -> Tensor:
    """The generator's, of each sample: -mean D(sr), averaged over scales; (B,)."""
    losses = [-f.float().mean((1, 2, 3)) for f in fake]
    return sum(losses[1:], losses[0]) / len(losses)
