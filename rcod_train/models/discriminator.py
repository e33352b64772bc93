"""Discriminators: they are trained beside the generator and never ship.

A small multi-scale one of our own, or heads on the frozen features of a user's vision model
(vision-aided, Kumari et al. 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter
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

    def trained_parameters(self) -> dict[str, Parameter]:
        return dict(self.named_parameters())


class BackboneDiscriminator(nn.Module):
    """Heads on hidden states of a frozen transformer of images, such as DINOv2 or CLIP.

    Args:
        backbone: its output has ``hidden_states``, (B, N, width) each.
        mean, std: of the RGB in [0, 1] that it takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], heads: int = 4
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.side = int(backbone.config.image_size)
        layers = int(backbone.config.num_hidden_layers)
        self.layers = [round((i + 1) * layers / heads) for i in range(heads)]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        width = int(backbone.config.hidden_size)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                spectral_norm(nn.Linear(width, width // 2)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Linear(width // 2, 1)),
            )
            for _ in range(heads)
        )

    def forward(self, image: Tensor) -> list[list[Tensor]]:
        """image (B, 3, H, W) in [-1, 1], squashed to the backbone's square -> of each head its
        hidden state, (B, width, 1, N), and its scores, (B, 1, 1, N)."""
        size = (self.side, self.side)
        small = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
        normalised = ((small + 1) / 2 - self.mean) / self.std
        states = self.backbone(normalised, output_hidden_states=True).hidden_states
        maps = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            state = states[layer]  # (B, N, width)
            maps.append([x.transpose(1, 2)[:, :, None] for x in (state, head(state))])
        return maps

    def trained_parameters(self) -> dict[str, Parameter]:
        return {name: p for name, p in self.named_parameters() if name.startswith("heads.")}


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
