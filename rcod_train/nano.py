"""``rcod-train nano``: from a folder of photos to a merged checkpoint, stage after stage."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import torch

from rcod_train.checkpoint import (
    INFO,
    CheckpointInfo,
    load_discriminator,
    load_merged,
    read_info,
)
from rcod_train.config import TrainConfig
from rcod_train.errors import CheckpointError, ConfigError
from rcod_train.models.discriminator import BackboneDiscriminator, Discriminator
from rcod_train.models.mem import Mem
from rcod_train.models.vae import NanoVae
from rcod_train.network import (
    NANO_LATENT_CHANNELS,
    NANO_SKIP_CHANNELS,
    Parts,
    build_nano,
    freeze,
    seeded,
)
from rcod_train.run import Run
from rcod_train.schedule import OFFICIAL_ALPHA_BAR, alpha_sigma
from rcod_train.stages.base import BaseStage, measure_scaling_factor
from rcod_train.stages.mem import MemStage
from rcod_train.stages.rcod import RcodStage, RefineStage
from rcod_train.stages.regression import RegressionStage
from rcod_train.stages.vae import VaeStage

log = logging.getLogger(__name__)

SCALING_BATCHES = 8
TAKEN_OVER = "its discriminator is taken over"
NEW = "no discriminator in it: a new one is trained, and a short run with it loses realism"
OF_THE_MODEL = ("grouping", "metric", "constants", "vpim", "n", "k")  # alike in rcod and refine
SMALLEST_CROP_PX = 3 * NanoVae.factor  # the MEM takes second differences of the latent


def train_nano(
    config: TrainConfig, resume: bool, name: str, licence: str, sources: tuple[str, ...]
) -> Path:
    """Run all stages and write ``<out>/checkpoint``; returns that folder.

    With ``config.start`` the stages refine and mem alone go on from that checkpoint, against the
    discriminator that it holds, or a new one. A checkpoint without a skip gets one where the
    decoder, which it belongs to, is trained. Where the decoder alone is trained, so that latents
    stay as they are, the checkpoint's MEM stays too.

    With ``resume``, finished stages are loaded and the newest whole checkpoint is continued.
    The result depends on the configuration, the photos and the number of threads alone.

    Raises:
        ConfigError, DataError: see ``check_fit``, ``Run``. CheckpointError: see ``load_start``.
    """
    check_fit(config)
    first = () if config.start else (config.vae, config.base, config.regression, config.rcod)
    run = Run(config, (*first, config.refine, config.mem), resume)
    parts, start, taught = (
        load_start(config)
        if config.start
        else (build_nano(config.seed, skip=config.rcod.train_decoder), None, None)
    )
    keeps_mem = start is not None and parts.mem is not None and not config.refine.train_adapters
    if parts.mem is None:
        with seeded(config.seed):
            parts.mem = Mem(NANO_LATENT_CHANNELS)
    parts.mem.requires_grad_(not keeps_mem)
    for module in (parts.vae, parts.unet, parts.vpim, parts.mem):
        module.to(run.device)
    run.start()
    if start is None:
        train_base(run, parts, config)
        rcod = train_rcod(run, parts, config)
        if config.refine.steps:
            freeze(rcod.merge(), run.device)
            taught = own_discriminator(rcod)
    if start is not None or config.refine.steps:
        rcod = train_refine(run, parts, config, taught)
    if not keeps_mem:
        mem, degradations = MemStage(rcod, config.mem), rcod.config.degradations
        run.train(mem, run.batches_of(config.mem, "mem", parts.vpim.tokens_px, degradations))

    summary = "Small one-step diffusion upscaler with a realism control, x4, for CPUs."
    info = run.info(rcod, "nano", name, summary, licence, sources)
    if start is not None:
        info.training["from"] = {"name": start.name, "training": start.training}
        # It has learned from those photos too, and their licences ask to be named.
        info = dataclasses.replace(info, sources=tuple(dict.fromkeys(start.sources + sources)))
        if keeps_mem:  # what it estimates is M as it was measured then
            info = dataclasses.replace(info, m_min=start.m_min, m_max=start.m_max)
    return run.save(rcod.merge(), info, own_discriminator(rcod) or taught)


def check_fit(config: TrainConfig) -> None:
    """Before a run begins: a latent is whole, and the stages fit each other.

    Raises:
        ConfigError: a stage's crops can't be, refine has VSD, or other levels or inputs than rcod.
    """
    for name, stage in config.stages.items():
        if stage.crop_px % NanoVae.factor or stage.crop_px < SMALLEST_CROP_PX:
            raise ConfigError(
                f"{name}.crop_px: expected a multiple of {NanoVae.factor} from {SMALLEST_CROP_PX} "
                f"on, found {stage.crop_px}."
            )
    refine, rcod = config.refine, config.rcod
    if refine.vsd_weight:
        raise ConfigError(
            f"refine.vsd_weight: expected 0, found {refine.vsd_weight}. The U-Net of merged "
            "weights upscales; the base that would teach VSD is not in them."
        )
    for name in OF_THE_MODEL if refine.steps and not config.start else ():
        theirs, ours = getattr(rcod, name), getattr(refine, name)
        if theirs != ours:
            raise ConfigError(
                f"refine.{name}: expected that of rcod ({theirs}), found {ours}. Set both, or "
                "leave the stage out: --set refine.steps=0."
            )


def with_levels_of_start(config: TrainConfig) -> TrainConfig:
    """A run that goes on from a checkpoint has its levels and its constants of Eq. 3, unless
    settings say others.

    Raises:
        CheckpointError: it is missing or not understood.
    """
    info = read_info(Path(config.start) / INFO)
    fixed = all(
        math.isclose(level.alpha, alpha_sigma(level.timestep, OFFICIAL_ALPHA_BAR)[0], rel_tol=1e-6)
        for level in info.levels
    )
    refine = dataclasses.replace(
        config.refine,
        n=len(info.levels),
        k=info.k,
        constants="official" if fixed else "paper",
    )
    return dataclasses.replace(config, refine=refine)


def load_start(config: TrainConfig) -> tuple[Parts, CheckpointInfo, Discriminator | None]:
    """The merged checkpoint that ``--from`` names, ready to be trained on, and the discriminator
    that it holds.

    Raises:
        CheckpointError: not a checkpoint, of another family, or a discriminator that is broken.
    """
    parts, info = load_merged(config.start)
    if info.family != "nano":
        raise CheckpointError(f"{config.start}: expected a nano checkpoint, found {info.family}.")
    assert isinstance(parts.vae, NanoVae)
    if parts.vae.skip is None and config.refine.train_decoder:
        log.info("%s: no skip past the denoiser in it: a new one is trained", config.start)
        with seeded(config.seed):
            parts.vae = parts.vae.with_skip(NANO_SKIP_CHANNELS)
    freeze(parts, torch.device("cpu"))
    discriminator = load_discriminator(config.start)
    if config.refine.adversarial_weight:
        log.info("%s: %s", config.start, NEW if discriminator is None else TAKEN_OVER)
    return parts, info, discriminator


def train_base(run: Run, parts: Parts, config: TrainConfig) -> None:
    """What RCOD starts from: the autoencoder, then the denoiser of its latents."""
    tokens_px = parts.vpim.tokens_px
    vae = VaeStage(parts, config.vae, run.autocast)
    run.train(vae, run.batches_of(config.vae, "vae", tokens_px, None))
    parts.vae.requires_grad_(False)
    # The factor is measured on the finished autoencoder, so a resumed run finds the same one.
    photos = run.batches_of(config.base, "measure", tokens_px, None, SCALING_BATCHES)(0)
    scaling_factor = run.ranks.first(measure_scaling_factor(parts, list(photos)))
    parts.vae.register_to_config(scaling_factor=scaling_factor)
    log.info("latents: scaling factor %.4f", scaling_factor)

    base = BaseStage(parts, config.base, run.autocast)
    run.train(base, run.batches_of(config.base, "base", tokens_px, None))


def train_rcod(run: Run, parts: Parts, config: TrainConfig) -> RcodStage:
    """The paper's method on the base, after the distances to the photo alone."""
    grouping = run.grouping(parts, config.rcod, parts.vpim.tokens_px)
    with seeded(config.seed):  # its LoRA matrices
        rcod = RcodStage(parts, config.rcod, grouping, run.autocast, run.perceptual)
    for stage in (RegressionStage(rcod, config.regression), rcod):
        run.train_generator(rcod, stage)
    return rcod


def train_refine(
    run: Run, parts: Parts, config: TrainConfig, taught: Discriminator | None
) -> RcodStage:
    """From merged weights, at all levels alike, against the discriminator ``taught`` so far."""
    stage = config.refine
    grouping = run.grouping(parts, stage, parts.vpim.tokens_px, "metric_refine.json")
    with seeded(config.seed):
        refine = RefineStage(
            parts, stage, grouping, run.autocast, run.perceptual, discriminator=taught
        )
    if not config.start:  # merged anew, in bits that another device has not; the stages before say
        refine.base_fingerprint = None  # which weights they are (check_inherited)
    if stage.steps:
        run.train_generator(refine, refine)
    return refine


def own_discriminator(rcod: RcodStage) -> Discriminator | None:
    """nano's, on the pixels, if the stage has one."""
    assert not isinstance(rcod.discriminator, BackboneDiscriminator)
    return rcod.discriminator
