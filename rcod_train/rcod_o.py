"""``rcod-train rcod-o``: the paper's method on Stable Diffusion, to adapters and a merged
checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from rcod_train.adapted import LoraModel
from rcod_train.adapter_files import BASE, save_adapters
from rcod_train.bases import STABLE_DIFFUSION, base_fingerprint, load_base
from rcod_train.conditions import TextEmbeddings
from rcod_train.config import LoopConfig, RcodOConfig
from rcod_train.errors import ConfigError
from rcod_train.models.mem import Mem
from rcod_train.network import Parts, freeze, restore_frozen, seeded
from rcod_train.run import Run
from rcod_train.stages.mem import MemStage
from rcod_train.stages.rcod import RcodStage


def train_rcod_o(
    config: RcodOConfig, resume: bool, name: str, licence: str, sources: tuple[str, ...]
) -> Path:
    """Write ``<out>/adapters`` and ``<out>/checkpoint``; returns the latter.

    With ``resume`` the newest whole checkpoint is continued. The result depends on the
    configuration, the base models, the photos, the device and the number of threads.
    """
    run = Run(config, (config.rcod, config.mem), resume)
    with seeded(config.seed):  # the alignment
        parts = load_base(config.base_model, config.clip, run.autocast.dtype)
    check_crops(parts, config.rcod, config.mem, STABLE_DIFFUSION)
    rounded = run.autocast.dtype != torch.float32  # then these weights are not those of the files
    trained_on = "" if rounded else base_fingerprint(parts)
    tokens_px = parts.vpim.tokens_px
    condition = None
    if config.text:
        width = int(parts.unet.config.cross_attention_dim)
        condition = TextEmbeddings(Path(config.text), run.photos, width)
    run.start()
    freeze(parts, run.device)

    grouping = run.grouping(parts, config.rcod, tokens_px)
    with seeded(config.seed):  # the LoRA matrices and the MEM
        rcod = RcodStage(parts, config.rcod, grouping, run.autocast, run.perceptual, condition)
        parts.mem = Mem(parts.vae.config.latent_channels).to(run.device)
    run.train_generator(rcod, rcod)
    mem = MemStage(rcod, config.mem)
    run.train(mem, run.batches_of(config.mem, "mem", tokens_px, config.rcod.degradations))

    if rounded:
        base = load_base(config.base_model, config.clip)
        trained_on = base_fingerprint(base)
        restore_frozen(parts, base, rcod.trained())
    summary = "One-step diffusion upscaler with a realism control, x4, on Stable Diffusion."
    info = run.info(rcod, "rcod-o", name, summary, licence, sources)
    info.training[BASE] = trained_on
    if run.ranks.writes:
        assert isinstance(rcod.model, LoraModel)
        save_adapters(run.out / "adapters", rcod.model, info)
    return run.save(rcod.merge(), info)


def check_crops(parts: Parts, rcod: LoopConfig, mem: LoopConfig, example: str) -> None:
    """The U-Net halves the latent once for each of its blocks but the last."""
    step = parts.vae.factor * 2 ** (len(parts.unet.config.block_out_channels) - 1)
    for stage, settings in (("rcod", rcod), ("mem", mem)):
        if settings.crop_px % step:
            raise ConfigError(
                f"{stage}.crop_px: expected a multiple of {step} for this base model "
                f"(such as {example}), found {settings.crop_px}."
            )
