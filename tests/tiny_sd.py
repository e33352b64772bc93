"""Stable Diffusion's and CLIP's classes at a tiny geometry, saved as their hubs lay them out."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel


def tiny_unet() -> UNet2DConditionModel:
    """The blocks of Stable Diffusion 2.1's U-Net, narrow."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=(2, 4, 4, 4),
        use_linear_projection=True,
        norm_num_groups=8,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def tiny_clip() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=20,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )


def save_base(folder: Path) -> None:
    """``folder``/sd in diffusers' layout and ``folder``/clip in transformers'."""
    torch.manual_seed(3)
    tiny_vae().save_pretrained(folder / "sd" / "vae")
    tiny_unet().save_pretrained(folder / "sd" / "unet")
    tiny_clip().save_pretrained(folder / "clip")
