"""nano's autoencoder: deterministic, without normalisation layers, factor 8."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))). The second convolution starts small: near identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)
            self.conv2.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Upsample(nn.Module):
    """Nearest x2, then a convolution: free of the checkerboard of transposed convolutions."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class NanoVae(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Autoencoder of the nano family.

    The pixels enter and leave through a 2x2 space-to-depth, so that no convolution runs at full
    resolution, where a CPU is bound by memory.

    Args:
        latent_channels: channels of the latent.
        block_channels: width at 1/2, 1/4 and 1/8 resolution.
        encoder_blocks: residual blocks per resolution in the encoder.
        decoder_blocks: the same in the decoder.
        scaling_factor: latents leave ``encode`` multiplied by it, as in Stable Diffusion.
    """

    factor = 8

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_channels: tuple[int, int, int] = (32, 64, 128),
        encoder_blocks: tuple[int, int, int] = (1, 2, 2),
        decoder_blocks: tuple[int, int, int] = (2, 3, 3),
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        half, quarter, eighth = block_channels

        def blocks(channels: int, count: int) -> list[nn.Module]:
            return [ResidualBlock(channels) for _ in range(count)]

        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, half, 3, padding=1),
            *blocks(half, encoder_blocks[0]),
            nn.Conv2d(half, quarter, 3, stride=2, padding=1),
            *blocks(quarter, encoder_blocks[1]),
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            *blocks(eighth, encoder_blocks[2]),
            nn.Conv2d(eighth, latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, eighth, 3, padding=1),
            *blocks(eighth, decoder_blocks[2]),
            Upsample(eighth, quarter),
            *blocks(quarter, decoder_blocks[1]),
            Upsample(quarter, half),
            *blocks(half, decoder_blocks[0]),
            nn.Conv2d(half, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> scaled z (B, C, H/8, W/8)."""
        return self.encoder(image) * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Scaled z (B, C, h, w) -> image (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(z / self.config.scaling_factor)
