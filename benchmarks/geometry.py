"""The full-size networks with random weights: their published weights can't be had everywhere."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from transformers import CLIPVisionConfig

from rcod_train.models.sd import SdVae


def sd21_unet() -> UNet2DConditionModel:
    """Of Stable Diffusion 2.1-base, and of SD-Turbo: 866 M parameters."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )


def sd_vae() -> SdVae:
    """Of Stable Diffusion 2.1: 84 M parameters."""
    return SdVae(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=768,
        scaling_factor=0.18215,
    )


def vit_l14() -> dict[str, Any]:
    """CLIP's image encoder ViT-L/14: 303 M parameters."""
    config: dict[str, Any] = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ).to_dict()
    return config
