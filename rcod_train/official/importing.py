"""From published files to Parts and rcod.json. What a file is, its fields say."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from rcod_train.bases import SD_TURBO, check_base, is_turbo, load_diffusion, load_vpim
from rcod_train.checkpoint import CheckpointInfo
from rcod_train.errors import ConfigError
from rcod_train.models.sd import ClipVpim, FixedTokens
from rcod_train.network import Parts
from rcod_train.official.guided import load_guided, load_mem, read_estimator, read_mem
from rcod_train.official.layouts import Layout, official_info
from rcod_train.official.merged import merge_official
from rcod_train.official.reading import (
    TOKENS,
    fixed_tokens,
    load_exactly,
    read_official,
    read_tokens,
)

log = logging.getLogger(__name__)

CLIP_PX = 224  # of the ViT-L/14 that the published weights were trained with
OPTIONS = {
    "clip": "CLIP ViT-L/14, folder or hub id",
    "tokens": "a safetensors file with `tokens` (N, 1024). This model was trained on text prompts "
    "and the graphs have no text encoder, so one prompt is fixed now: "
    f"{TOKENS}, computed once by you",
    "estimator": "de_net.pth of S3Diff, the degradation estimator that guides the model",
    "mem": "rcod_s_mem.pkl, for the adaptive level",
}


@dataclass(frozen=True)
class OfficialImport:
    """What to import, and the files that go with it; which of them, the layout of ``file`` says."""

    file: Path
    base: str
    clip: str | None = None
    tokens: Path | None = None
    estimator: Path | None = None
    mem: Path | None = None
    name: str | None = None


def import_official(request: OfficialImport) -> tuple[Parts, CheckpointInfo]:
    """Read, check and combine; small files are read before the base model is loaded.

    Raises:
        CheckpointError: a file can't be read, or doesn't fit the base or another one.
        ConfigError: the layout needs a file that isn't given, or has no use for one that is.
        DataError: the base model or CLIP is missing.
    """
    raw, layout = read_official(request.file)
    _check_options(request, layout)
    source = str(request.file)
    estimator = None if request.estimator is None else read_estimator(request.estimator)
    mem = None if request.mem is None else read_mem(request.mem)
    tokens = None if request.tokens is None else read_tokens(request.tokens)
    vae, unet = load_diffusion(request.base, layout.base_id)
    check_base(request.base, vae, unet)
    if is_turbo(request.base) not in (None, layout.base_id == SD_TURBO):
        log.warning("%s: by its scheduler this is not %s, which %s belongs to: on another base its "
                    "weights give other images. Check --base.",
                    request.base, layout.base, layout.file)  # fmt: skip
    dim = int(unet.config.cross_attention_dim)
    vpim: ClipVpim | FixedTokens
    if tokens is not None:
        vpim = fixed_tokens(tokens, dim, str(request.tokens))
    else:
        vpim = load_vpim(str(request.clip), dim)
        if vpim.tokens_px != CLIP_PX:
            log.warning("%s: expected CLIP ViT-L/14 for images of %d px, found one for %d px: with "
                        "another one the weights give other images. Check --clip.",
                        request.clip, CLIP_PX, vpim.tokens_px)  # fmt: skip
        hint = "Does the image encoder match? Expected CLIP ViT-L/14."
        load_exactly(vpim.align, raw[layout.align], f'{source}: "{layout.align}"', hint)
    parts = Parts(vae, unet, vpim)
    if estimator is None:
        merge_official(raw, vae, unet, source)
    else:
        parts.guide = load_guided(raw, vae, unet, (estimator, str(request.estimator)), source)
        if mem is not None:
            parts.mem = load_mem(parts.guide, mem, str(request.mem))
    return parts, official_info(request.name or layout.name, layout)


def _check_options(request: OfficialImport, layout: Layout) -> None:
    for option, what in OPTIONS.items():
        given = getattr(request, option) is not None
        if option in layout.options and not given:
            raise ConfigError(
                f"{request.file} has the layout of {layout.file}, which needs --{option}: {what}."
            )
        if given and option not in layout.options | layout.may:
            needs = ", ".join(f"--{name}" for name in sorted(layout.options | layout.may))
            raise ConfigError(
                f"--{option}: {request.file} has the layout of {layout.file}, which has no use for "
                f"it. It takes --base, {needs}."
            )
