"""``rcod-train nano``: from a folder of photos to a merged checkpoint, stage after stage."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from rcod_train.config import TrainConfig
from rcod_train.network import build_nano, seeded
from rcod_train.run import Run
from rcod_train.stages.base import BaseStage, measure_scaling_factor
from rcod_train.stages.mem import MemStage
from rcod_train.stages.rcod import RcodStage
from rcod_train.stages.regression import RegressionStage
from rcod_train.stages.vae import VaeStage

log = logging.getLogger(__name__)

SCALING_BATCHES = 8


def train_nano(
    config: TrainConfig, resume: bool, name: str, licence: str, sources: tuple[str, ...]
) -> Path:
    """Run all stages and write ``<out>/checkpoint``; returns that folder.

    With ``resume``, finished stages are loaded and the newest whole checkpoint is continued.
    The result depends on the configuration, the photos and the number of threads alone.
    """
    run = Run(config, (config.vae, config.base, config.regression, config.rcod, config.mem), resume)
    run.start()
    autocast = run.autocast
    parts = build_nano(config.seed)
    tokens_px = parts.vpim.tokens_px

    vae = VaeStage(parts, config.vae, autocast)
    run.train(vae, run.batches_of(config.vae, "vae", tokens_px, None))
    parts.vae.requires_grad_(False)
    # The factor is measured on the finished autoencoder, so a resumed run finds the same one.
    photos = run.batches_of(config.base, "measure", tokens_px, None)(0)
    scaling_factor = measure_scaling_factor(parts, list(itertools.islice(photos, SCALING_BATCHES)))
    parts.vae.register_to_config(scaling_factor=scaling_factor)
    log.info("latents: scaling factor %.4f", scaling_factor)

    base = BaseStage(parts, config.base, autocast)
    run.train(base, run.batches_of(config.base, "base", tokens_px, None))

    degradations = config.rcod.degradations
    grouping = run.grouping(parts, config.rcod, tokens_px)
    with seeded(config.seed):  # its LoRA matrices
        rcod = RcodStage(parts, config.rcod, grouping, autocast, run.perceptual)
    regression = RegressionStage(rcod, config.regression)
    for stage in (regression, rcod):
        source = run.batches_of(stage.config, stage.name, tokens_px, degradations)
        run.train(stage, source, run.validation(rcod, stage, tokens_px))
    mem = MemStage(rcod, config.mem)
    run.train(mem, run.batches_of(config.mem, "mem", tokens_px, degradations))

    summary = "Small one-step diffusion upscaler with a realism control, x4, for CPUs."
    info = run.info(rcod, "nano", name, summary, licence, sources)
    return run.save(rcod.merge(), info)
