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


class Skip(nn.Module):
    """From the encoder's features at 1/4 of the resolution to the decoder's, past the denoiser.

    It travels at the latent's resolution, so that it fits behind the latent's channels. What enters
    is added, and is nothing before it is trained.

    Args:
        features: channels at 1/4 of the resolution.
        channels: channels that travel, a multiple of 4.
    """

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.leave = nn.Conv2d(features, channels // 4, 1)
        self.enter = nn.Conv2d(channels // 4, features, 3, padding=1)
        nn.init.zeros_(self.enter.weight)
        nn.init.zeros_(self.enter.bias)

    def packed(self, features: Tensor) -> Tensor:
        """(B, F, H/4, W/4) -> (B, S, H/8, W/8)."""
        return F.pixel_unshuffle(self.leave(features), 2)

    def added(self, features: Tensor, packed: Tensor) -> Tensor:
        """The decoder's (B, F, H/4, W/4), with what was packed."""
        return features + self.enter(F.pixel_shuffle(packed, 2))


def _through(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class NanoVae(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Autoencoder of the nano family.

    The pixels enter and leave through a 2x2 space-to-depth, so that no convolution runs at full
    resolution, where a CPU is bound by memory.

    What no latent holds, the decoder takes from the photo itself: ``skip_channels`` travel from the
    encoder beside the latent (Parmar et al. 2024 have such connections in their one-step models).

    Args:
        latent_channels: channels of the latent.
        block_channels: width at 1/2, 1/4 and 1/8 resolution.
        encoder_blocks: residual blocks per resolution in the encoder.
        decoder_blocks: the same in the decoder.
        scaling_factor: latents leave ``encode`` multiplied by it, as in Stable Diffusion.
        skip_channels: channels beside the latent, a multiple of 4; 0: none.

    Raises:
        ValueError: another number of ``skip_channels``.
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
        skip_channels: int = 0,
    ) -> None:
        super().__init__()
        if skip_channels % 4:
            raise ValueError(f"skip_channels: expected a multiple of 4, found {skip_channels}.")
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
        self.skip = Skip(quarter, skip_channels) if skip_channels else None
        # Where both sequences are at 1/4 of the resolution, before the next change of it.
        self._leaves_after = 2 + encoder_blocks[0] + 1 + encoder_blocks[1]
        self._enters_after = 1 + decoder_blocks[2] + 1

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> scaled z (B, C, H/8, W/8)."""
        return self.encoder(image) * self.config.scaling_factor

    def encode_with_skip(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) -> (B, C + S, H/8, W/8): z as ``encode`` gives it, then the skip."""
        if self.skip is None:
            return self.encode(image)
        layers = list(self.encoder)
        quarter = _through(layers[: self._leaves_after], image)
        z = _through(layers[self._leaves_after :], quarter) * self.config.scaling_factor
        return torch.cat([z, self.skip.packed(quarter)], 1)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled z (B, C, h, w), or with the skip behind it (B, C + S, h, w) -> image
        (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        c = self.config.latent_channels
        latent, packed = z[:, :c] / self.config.scaling_factor, z[:, c:]
        if not packed.shape[1]:
            return self.decoder(latent)
        assert self.skip is not None, "channels behind the latent, and no skip that takes them"
        layers = list(self.decoder)
        quarter = self.skip.added(_through(layers[: self._enters_after], latent), packed)
        return _through(layers[self._enters_after :], quarter)

    def with_skip(self, channels: int) -> NanoVae:
        """A copy that has a new skip, which adds nothing yet: it decodes the same images."""
        geometry = {name: v for name, v in self.config.items() if not name.startswith("_")}
        vae = NanoVae(**geometry | {"skip_channels": channels})
        vae.load_state_dict(vae.state_dict() | self.state_dict())
        return vae
