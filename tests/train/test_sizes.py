"""Sizes of the full networks, counted on the meta device."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionConfig

from rcod_train.adapters import SwitchedUnet, SwitchedVae
from rcod_train.models.guide import Guide
from rcod_train.models.guided import unet_branches, vae_branches
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


def test_rcod_s_trains_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        unet, vae, vpim, guide = sd21_unet(), sd_vae(), ClipVpim(vit_l14(), 1024), Guide()
    assert (len(unet_branches(unet)), len(vae_branches(vae))) == (257, 31)
    assert set(unet_branches(unet).values()) == set(range(guide.config.blocks_unet))
    assert set(vae_branches(vae).values()) == set(range(guide.config.blocks_vae))
    guide.add_branches(unet)
    guide.add_branches(vae)
    low_rank = [
        count(p for n, p in network.named_parameters() if "lora_" in n) for network in (unet, vae)
    ]
    assert low_rank == [32_434_304, 1_477_168]
    s3diff = sum(low_rank) + count(unet.conv_in.parameters()) + count(guide.network.parameters())
    assert s3diff == 34_475_120  # "34.475 M"
    assert s3diff + count(vpim.align.parameters()) == 35_524_720  # "35.5 M"
    assert count(guide.estimator.parameters()) == 2_351_362  # frozen
