"""Visual prompt injection module (VPIM): an image encoder and a linear alignment."""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from rcod_train.models.vae import ResidualBlock


class NanoVisualEncoder(nn.Module):
    """A small image encoder in the place of CLIP's: one token for each 8x8 patch."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width // 2, 3, padding=1),
            ResidualBlock(width // 2),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            *(ResidualBlock(width) for _ in range(blocks)),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        features = self.net(image)  # (B, width, S/8, S/8)
        return self.norm(features.flatten(2).transpose(1, 2))  # (B, (S/8)^2, width)


class Vpim(ModelMixin, ConfigMixin):
    """VPIM of the paper: tokens of the LR image take the place of a text prompt.

    Args:
        tokens_px: side of the square image that is looked at.
        width: width of the image encoder.
        blocks: residual blocks per resolution in the image encoder.
        cross_attention_dim: width of the U-Net's cross-attention.
    """

    @register_to_config
    def __init__(
        self,
        tokens_px: int = 64,
        width: int = 128,
        blocks: int = 2,
        cross_attention_dim: int = 128,
    ) -> None:
        super().__init__()
        self.encoder = NanoVisualEncoder(width, blocks)
        self.align = nn.Linear(width, cross_attention_dim)

    @property
    def tokens_px(self) -> int:
        """S, the side of the image that is looked at."""
        return int(self.config.tokens_px)

    def features(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) in [-1, 1] -> what is aligned, (B, N, width)."""
        return self.encoder(image)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) in [-1, 1], S = tokens_px -> tokens (B, N, cross_attention_dim)."""
        return self.align(self.features(image))
