"""``rcod-train rcod-s``: degradation-guided branches on SD-Turbo, an adversary in the place of VSD.

The checkpoint holds the branches beside the base's weights and the guide that feeds them; nothing
of it can be merged.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rcod_train.bases import SD_TURBO, load_backbone, load_base
from rcod_train.config import RcodSConfig
from rcod_train.errors import ConfigError
from rcod_train.grouping import Grouping
from rcod_train.models.discriminator import BackboneDiscriminator
from rcod_train.models.guide import Guide, GuidedMem
from rcod_train.models.guided import unet_branches, vae_branches
from rcod_train.network import Parts, freeze, restore_frozen, seeded
from rcod_train.official.reading import load_exactly, read_state
from rcod_train.rcod_o import check_crops
from rcod_train.run import Run
from rcod_train.stages.mem import MemStage
from rcod_train.stages.rcod import RcodStage

ESTIMATOR = "a degradation estimator: of rcod-train estimator, or S3Diff's de_net.pth"
# Layers of the estimator whose outputs are its three sizes.
SIZES = {
    "estimator_width": "conv_first.0.weight",
    "estimator_features": "body.0.6.weight",
    "estimator_hidden": "fc_degree.0.0.weight",
}


def train_rcod_s(
    config: RcodSConfig, resume: bool, name: str, licence: str, sources: tuple[str, ...]
) -> Path:
    """Write ``<out>/checkpoint``; returns that folder.

    With ``resume`` the newest whole checkpoint is continued. The result depends on the
    configuration, the base models, the estimator, the photos, the device and the threads.
    """
    if config.rcod.vsd_weight or config.rcod.train_decoder:
        raise ConfigError(
            "rcod-s has no VSD and a frozen decoder: expected rcod.vsd_weight=0 and "
            f"rcod.train_decoder=false, found {config.rcod.vsd_weight} and "
            f"{config.rcod.train_decoder}. rcod-o has both."
        )
    if not config.rcod.lora_alpha:
        raise ConfigError(
            "rcod.lora_alpha: expected at least 1 with rcod-s, whose branches have two ranks and "
            "count lora_alpha / rank, found 0."
        )
    run = Run(config, (config.rcod, config.mem), resume)
    with seeded(config.seed):  # the alignment
        parts = load_base(config.base_model, config.clip, run.autocast.dtype, SD_TURBO)
    check_crops(parts, config.rcod, config.mem, SD_TURBO)
    tokens_px = parts.vpim.tokens_px
    estimator = read_state(Path(config.estimator), ESTIMATOR)
    backbone = load_backbone(config.backbone) if config.backbone else None
    with seeded(config.seed):
        guide = make_guide(parts, config, estimator)
    run.start()
    freeze(parts, run.device)

    grouping = run.grouping(parts, config.rcod, tokens_px)
    with seeded(config.seed):  # branches, discriminator, MEM
        add_guide(parts, guide)
        parts.mem = started_mem(parts, grouping).to(run.device)
        discriminator = BackboneDiscriminator(*backbone) if backbone else None
        rcod = RcodStage(
            parts, config.rcod, grouping, run.autocast, run.perceptual, discriminator=discriminator
        )
    run.train_generator(rcod, rcod)
    mem = MemStage(rcod, config.mem)
    run.train(mem, run.batches_of(config.mem, "mem", tokens_px, config.rcod.degradations))

    if run.autocast.dtype != torch.float32:
        base = load_base(config.base_model, config.clip, example=SD_TURBO)
        restore_frozen(parts, base, rcod.trained())
    summary = (
        "One-step diffusion upscaler with a realism control, x4, guided by the photo's degradation."
    )
    info = run.info(rcod, "rcod-s", name, summary, licence, sources)
    return run.save(rcod.merge(), info)


def make_guide(parts: Parts, config: RcodSConfig, estimator: dict[str, Tensor]) -> Guide:
    """A new guide around this estimator, for the branches that encoder and U-Net will have.

    Raises:
        CheckpointError: the file is not that of an estimator.
    """
    hint = f"Expected {ESTIMATOR}."
    sizes = {
        name: int(estimator[key].shape[0]) for name, key in SIZES.items() if key in estimator
    }  # what is missing is named below
    guide = Guide(
        rank_vae=config.rcod.rank_vae,
        rank_unet=config.rcod.rank_unet,
        blocks_vae=max(vae_branches(parts.vae).values()) + 1,
        blocks_unet=max(unet_branches(parts.unet).values()) + 1,
        lora_alpha=config.rcod.lora_alpha,
        **sizes,
    )
    with torch.no_grad():
        load_exactly(guide.estimator, estimator, config.estimator, hint)
    return guide


def add_guide(parts: Parts, guide: Guide) -> None:
    """Branches on encoder and U-Net, and what feeds them."""
    guide.to(parts.unet.device)
    for network in (parts.vae, parts.unet):
        guide.add_branches(network)
    parts.guide = guide


def started_mem(parts: Parts, grouping: Grouping) -> GuidedMem:
    """Its last operation is a ReLU: it begins in the middle of the range of M, alive."""
    assert parts.guide is not None
    mem = GuidedMem(2 * parts.guide.config.estimator_features)
    with torch.no_grad():
        mem.mlp[0].weight.zero_()
        mem.mlp[0].bias.fill_((grouping.m_min + grouping.m_max) / 2)
    return mem
