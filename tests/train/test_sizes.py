"""Sizes of the full networks, counted on the meta device."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionConfig

from rcod_train.adapters import SwitchedUnet, SwitchedVae
from rcod_train.models.sd import ClipVpim, SdVae

RANK = 4


def count(parameters: object) -> int:
    return sum(p.numel() for p in parameters)  # type: ignore[attr-defined]


def sd21_unet() -> UNet2DConditionModel:
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


def vit_l14() -> dict[str, object]:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ).to_dict()


def test_rcod_o_trains_and_ships_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        unet = SwitchedUnet(sd21_unet(), RANK, RANK)
        vae = SwitchedVae(sd_vae(), RANK, train_decoder=False)
        vpim = ClipVpim(vit_l14(), 1024)
    generator = count(unet.parameters_of("generator").values())
    encoder = count(vae.encoder_parameters().values())
    alignment = count(vpim.align.parameters())
    regulariser = count(unet.parameters_of("regulariser").values())
    assert (encoder, alignment, regulariser) == (369_356, 1_049_600, 4_055_712)
    assert generator == 4_055_712 + 11_840
    ships = generator + encoder + alignment
    assert ships == 5_486_508
    assert ships + regulariser == 9_542_220
    assert vpim.tokens_px == 224
