"""The parts of the Stable Diffusion families behind the interfaces of nano's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

# OSEDiff's lists of the U-Net's layers that get a LoRA.
CONVOLUTIONS = ["conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
UNET_TARGETS = [*CONVOLUTIONS, *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


class SdVae(AutoencoderKL):
    """Stable Diffusion's autoencoder; the latent is the posterior's mean, so nothing is random."""

    factor = 8

    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> scaled z (B, 4, H/8, W/8)."""
        moments = self.quant_conv(self.encoder(image))
        return moments.chunk(2, dim=1)[0] * self.config.scaling_factor

    def encode_with_skip(self, image: Tensor) -> Tensor:
        """As ``encode``: there is no skip."""
        return self.encode(image)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled z (B, 4, h, w) -> image (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))


class ClipVpim(ModelMixin, ConfigMixin):
    """VPIM with CLIP's image encoder: all its tokens, aligned by one linear layer.

    As in the official code the image comes in [-1, 1], not normalised by CLIP's statistics.

    Args:
        vision: configuration of the CLIPVisionModel.
        cross_attention_dim: width of the U-Net's cross-attention.
    """

    @register_to_config
    def __init__(self, vision: dict[str, Any], cross_attention_dim: int = 1024) -> None:
        super().__init__()
        config = CLIPVisionConfig(**vision)
        self.encoder = CLIPVisionModel(config)
        self.align = nn.Linear(config.hidden_size, cross_attention_dim)

    @property
    def tokens_px(self) -> int:
        """S, the side of the image that is looked at."""
        return int(self.encoder.config.image_size)

    def features(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) in [-1, 1] -> what is aligned, (B, N, hidden size)."""
        return self.encoder(image).last_hidden_state

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) in [-1, 1], S = tokens_px -> tokens (B, N, cross_attention_dim)."""
        return self.align(self.features(image))


class FixedTokens(ModelMixin, ConfigMixin):
    """The tokens of one text prompt in the place of VPIM, for weights that were trained on text.

    Args:
        length: tokens of the prompt.
        cross_attention_dim: width of the U-Net's cross-attention.
    """

    tokens: Tensor
    tokens_px = 1  # the image isn't looked at

    @register_to_config
    def __init__(self, length: int = 77, cross_attention_dim: int = 1024) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(length, cross_attention_dim))

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, 1, 1), only counted -> tokens (B, length, cross_attention_dim)."""
        return self.tokens.expand(image.shape[0], -1, -1)
