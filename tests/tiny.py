"""A model of nano's classes at a tiny geometry."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from rcod_train.checkpoint import CheckpointInfo, levels_of
from rcod_train.grouping import Grouping
from rcod_train.models.mem import Mem
from rcod_train.models.vae import NanoVae
from rcod_train.models.vpim import Vpim
from rcod_train.network import Parts


def tiny_parts(seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = NanoVae(4, (8, 16, 16), (1, 1, 1), (1, 1, 1), scaling_factor=1.7)
    parts = Parts(vae, unet, Vpim(32, 16, 1, 16), Mem(4, 8))
    parts.vae = vae.with_skip(8)
    torch.nn.init.normal_(parts.vae.skip.enter.weight, std=0.03)  # as if it had been trained
    return parts


def tiny_info(**changes: object) -> CheckpointInfo:
    grouping = Grouping(0.2, 0.9)
    fields = {
        "family": "nano",
        "name": "tiny",
        "summary": "A test.",
        "licence": "Apache-2.0",
        "sources": ("made by the test",),
        "levels": levels_of(grouping),
        "m_min": grouping.m_min,
        "m_max": grouping.m_max,
        "k": grouping.k,
        "training": {},
    }
    return CheckpointInfo(**{**fields, **changes})  # type: ignore[arg-type]
