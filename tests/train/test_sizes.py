"""Sizes of the full networks, counted on the meta device."""

from __future__ import annotations

import torch

from benchmarks.geometry import sd21_unet, sd_vae, vit_l14
from rcod_train.adapters import SwitchedUnet, SwitchedVae
from rcod_train.models.guide import Guide
from rcod_train.models.guided import unet_branches, vae_branches
from rcod_train.models.sd import ClipVpim

RANK = 4


def count(parameters: object) -> int:
    return sum(p.numel() for p in parameters)  # type: ignore[attr-defined]


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
