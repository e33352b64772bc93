"""``rcod-train nano``: from a folder of photos to a merged checkpoint, stage after stage."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from rcod_train.checkpoint import CheckpointInfo, levels_of, save_merged
from rcod_train.config import LoopConfig, TrainConfig
from rcod_train.data import Batch, PhotoBatches, batches, find_photos
from rcod_train.grouping import Grouping
from rcod_train.loop import run_stage
from rcod_train.network import build_nano, seeded
from rcod_train.perceptual import load_lpips
from rcod_train.precision import Autocast, resolve_precision
from rcod_train.stages.base import BaseStage, measure_scaling_factor
from rcod_train.stages.mem import MemStage
from rcod_train.stages.rcod import RcodStage, measure_metric_range
from rcod_train.stages.vae import VaeStage

log = logging.getLogger(__name__)

# Streams of random numbers: one seed for each use, so that stages don't repeat each other's data.
SEED_STEP = {"vae": 0, "base": 1, "rcod": 2, "mem": 3, "measure": 4}
SCALING_BATCHES = 8


def train_nano(
    config: TrainConfig, resume: bool, name: str, licence: str, sources: tuple[str, ...]
) -> Path:
    """Run all stages and write ``<out>/checkpoint``; returns that folder.

    With ``resume``, finished stages are loaded and the newest whole checkpoint is continued.
    The result depends on the configuration, the photos and the number of threads alone.
    """
    out = Path(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    autocast = Autocast(resolve_precision(config.precision))
    stages: tuple[LoopConfig, ...] = (config.vae, config.base, config.rcod, config.mem)
    photos = find_photos(config.data, max(stage.context_px for stage in stages))
    perceptual = load_lpips() if config.use_lpips else None
    out.mkdir(parents=True, exist_ok=True)
    config.write(out / "config.json")
    parts = build_nano(config.seed)
    tokens_px = parts.vpim.tokens_px

    def batches_of(
        stage_config: LoopConfig, stream: str, heavy_share: float | None
    ) -> Callable[[int], Iterator[Batch]]:
        seed = config.seed * len(SEED_STEP) + SEED_STEP[stream]
        dataset = PhotoBatches(photos, stage_config, seed, tokens_px, heavy_share)
        return lambda first: batches(dataset, first, stage_config.steps, config.workers)

    def run(stage: Any, make: Callable[[int], Iterator[Batch]]) -> None:
        run_stage(stage, make, out / stage.name, config.seed, resume)

    run(VaeStage(parts, config.vae, autocast), batches_of(config.vae, "vae", None))
    parts.vae.requires_grad_(False)
    # The factor is measured on the finished autoencoder, so a resumed run finds the same one.
    sample = list(
        itertools.islice(batches_of(_measuring(config.base), "measure", None)(0), SCALING_BATCHES)
    )
    scaling_factor = measure_scaling_factor(parts, sample)
    parts.vae.register_to_config(scaling_factor=scaling_factor)
    log.info("latents: scaling factor %.4f", scaling_factor)

    run(BaseStage(parts, config.base, autocast), batches_of(config.base, "base", None))

    heavy = config.rcod.heavy_share
    m_min, m_max = measure_metric_range(
        parts,
        batches_of(_measuring(config.rcod), "measure", heavy)(0),
        config.rcod.metric_samples,
        config.rcod.metric_quantile,
    )
    log.info("metric M: M_min %.4f, M_max %.4f", m_min, m_max)
    grouping = Grouping(m_min, m_max, config.rcod.n, config.rcod.k)
    with seeded(config.seed):  # its LoRA matrices
        rcod = RcodStage(parts, config.rcod, grouping, autocast, perceptual)
    run(rcod, batches_of(config.rcod, "rcod", heavy))
    run(MemStage(rcod, config.mem), batches_of(config.mem, "mem", heavy))

    info = CheckpointInfo(
        family="nano",
        name=name,
        summary="Small one-step diffusion upscaler with a realism control, x4, for CPUs.",
        licence=licence,
        sources=sources,
        levels=levels_of(rcod.grouping),
        m_min=rcod.grouping.m_min,
        m_max=rcod.grouping.m_max,
        k=rcod.grouping.k,
        training=_training_record(config, len(photos)),
    )
    checkpoint = out / "checkpoint"
    save_merged(checkpoint, rcod.merge(), info)
    return checkpoint


def _measuring(stage: LoopConfig) -> LoopConfig:
    """The same crops, for as many batches as a measurement takes."""
    return dataclasses.replace(stage, steps=10_000)


def _training_record(config: TrainConfig, photos: int) -> dict[str, Any]:
    record = dataclasses.asdict(config)
    for path in ("data", "out", "workers", "threads"):  # facts of a machine, not of the model
        del record[path]
    return record | {"photos": photos}
