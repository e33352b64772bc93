"""Stable Diffusion's and CLIP's classes at a tiny geometry, saved as their hubs lay them out."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from rcod_train.models.guide import Guide, GuidedMem
from rcod_train.models.sd import ClipVpim, SdVae
from rcod_train.network import Parts


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


def tiny_shallow_unet() -> UNet2DConditionModel:
    """Two of its levels: less to trace, where the other ones are not what is tested."""
    levels = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
    }
    return UNet2DConditionModel(**{**tiny_unet().config, **levels})


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


def tiny_guide() -> Guide:
    """For ``tiny_vae`` and ``tiny_unet``: their blocks are as many as at full size."""
    return Guide(
        rank_vae=3,
        rank_unet=5,
        frequencies=4,
        width=12,
        block_width=6,
        estimator_width=4,
        estimator_features=8,
        estimator_hidden=10,
    )


def tiny_guided_parts(seed: int = 0) -> Parts:
    """A tiny RCOD_S whose branches count, with a MEM."""
    torch.manual_seed(seed)
    guide = tiny_guide()
    vae = SdVae.from_config(tiny_vae().config)
    unet, clip = tiny_unet(), tiny_clip()
    for network in (vae, unet):
        guide.add_branches(network)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    vpim = ClipVpim(clip.config.to_dict(), 24)
    parts = Parts(vae, unet, vpim, GuidedMem(16), guide)
    for module in (vae, unet, vpim, parts.mem, guide):
        module.eval().requires_grad_(False)
    return parts
