"""Base models of the Stable Diffusion families, from local folders or hub ids."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionModel

from rcod_train.checkpoint import INFO
from rcod_train.errors import DataError
from rcod_train.fingerprint import fingerprint
from rcod_train.models.sd import ClipVpim, SdVae
from rcod_train.network import Parts
from rcod_train.schedule import BETA_END, BETA_START, TIMESTEPS

log = logging.getLogger(__name__)

STABLE_DIFFUSION = "stabilityai/stable-diffusion-2-1-base"
SD_TURBO = "stabilityai/sd-turbo"
CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dinov2-small"
UNSEEN = ("pooler.",)  # of a backbone, behind the hidden states; some are published without it
CLIP_KINDS = ("clip", "clip_vision_model")  # whole, and its image encoder alone
# Mean and standard deviation of the RGB that vision models were trained on, in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_base(
    base: str, clip: str, dtype: torch.dtype = torch.float32, example: str = STABLE_DIFFUSION
) -> Parts:
    """Parts of a base model with a new alignment layer and no MEM; see the two below.

    ``dtype`` is that of the frozen weights; the alignment is fp32.
    """
    vae, unet = load_diffusion(base, example, dtype)
    check_base(base, vae, unet)
    return Parts(vae, unet, load_vpim(clip, int(unet.config.cross_attention_dim), dtype))


def base_fingerprint(parts: Parts) -> str:
    """Of what ``load_base`` reads from files, in fp32; the alignment is new. Rounded to fp16, as
    what ships is: the same model is published in both."""
    modules = (parts.vae, parts.unet, parts.vpim.encoder)
    return fingerprint(w.half() for module in modules for w in module.state_dict().values())


def check_base(base: str, vae: SdVae, unet: UNet2DConditionModel) -> None:
    """Whether the parts fit each other and the method: eps-prediction on Stable Diffusion's noise.

    Raises:
        DataError: they don't.
    """
    channels = int(vae.config.latent_channels)
    if not channels == unet.config.in_channels == unet.config.out_channels:
        raise DataError(
            f"{base}: expected a U-Net of {channels} channels in and out, as the autoencoder's "
            f"latents, found {unet.config.in_channels} and {unet.config.out_channels}. "
            f"Use a text-to-image base such as {STABLE_DIFFUSION}."
        )
    if not isinstance(unet.config.cross_attention_dim, int):
        raise DataError(
            f"{base}: expected one width of cross-attention, found "
            f"{unet.config.cross_attention_dim}. Use a base such as {STABLE_DIFFUSION}."
        )
    if 2 ** (len(vae.config.block_out_channels) - 1) != SdVae.factor:
        raise DataError(
            f"{base}/vae: expected an autoencoder of factor {SdVae.factor}, found "
            f"{len(vae.config.block_out_channels)} blocks. Use a base such as {STABLE_DIFFUSION}."
        )
    expected = {
        "prediction_type": "epsilon",
        "beta_schedule": "scaled_linear",
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "num_train_timesteps": TIMESTEPS,
    }
    scheduler = _scheduler(base)
    if scheduler is None:
        log.warning("%s: no scheduler/; eps-prediction and %s's noise are taken for granted",
                    base, STABLE_DIFFUSION)  # fmt: skip
        return
    for key, value in expected.items():
        found = scheduler.get(key, value)
        if found != value:
            raise DataError(
                f"{base}/scheduler: {key}: expected {value}, found {found}. "
                f"Use an eps-prediction base such as {STABLE_DIFFUSION}."
            )


def is_turbo(base: str) -> bool | None:
    """Whether a base is SD-Turbo and not Stable Diffusion, of the same geometry, by the steps that
    its scheduler takes; None: it has no scheduler."""
    scheduler = _scheduler(base)
    return None if scheduler is None else scheduler.get("timestep_spacing") == "trailing"


def _scheduler(base: str) -> dict[str, Any] | None:
    try:
        return dict(DDPMScheduler.load_config(base, subfolder="scheduler"))
    except (OSError, ValueError):
        return None


def load_diffusion(
    base: str, example: str = STABLE_DIFFUSION, dtype: torch.dtype = torch.float32
) -> tuple[SdVae, UNet2DConditionModel]:
    """Autoencoder and U-Net.

    Args:
        base: folder or hub id in diffusers' layout: vae/ and unet/, each with config.json and
            weights.
        example: a hub id to name where there is none.

    Raises:
        DataError: one of them is missing, gated, not whole or not of this layout, or was made by
            rcod-train.
    """
    if (Path(base) / INFO).exists():
        raise DataError(
            f"{base}: expected a base model, found {INFO}: what rcod-train made of one. Its U-Net "
            "upscales in one step, and the base that a training starts from and VSD compares with "
            f"is no longer in it. Give the model that it was made from, such as {example}."
        )
    return (
        load_vae(base, example, dtype),
        _model(UNet2DConditionModel, base, "unet", example, torch_dtype=dtype),
    )


def load_vae(
    base: str, example: str = STABLE_DIFFUSION, dtype: torch.dtype = torch.float32
) -> SdVae:
    """The autoencoder alone, as ``load_diffusion`` does."""
    vae: SdVae = _model(SdVae, base, "vae", example, torch_dtype=dtype)
    return vae


def load_vpim(clip: str, cross_attention_dim: int, dtype: torch.dtype = torch.float32) -> ClipVpim:
    """VPIM with a new alignment layer, which is fp32; ``dtype`` is that of CLIP.

    Args:
        clip: folder or hub id of a CLIP model in transformers' layout.
        cross_attention_dim: width of the U-Net's cross-attention.

    Raises:
        DataError: it is missing, gated, not whole, or another kind of model.
    """
    kind = _loaded(AutoConfig, clip, None, CLIP).model_type
    if kind not in CLIP_KINDS:
        raise DataError(
            f'{clip}: "model_type": expected {" or ".join(CLIP_KINDS)}, found {kind}. Give a CLIP '
            f"model such as {CLIP}."
        )
    encoder: CLIPVisionModel = _model(CLIPVisionModel, clip, None, CLIP, dtype=dtype)
    vision = {k: v for k, v in encoder.config.to_dict().items() if k != "dtype"}
    vpim = ClipVpim(vision, cross_attention_dim)
    vpim.encoder.to(dtype)
    vpim.encoder.load_state_dict(encoder.state_dict())
    return vpim


def load_backbone(source: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """A vision transformer for the discriminator to look through, and its mean and std of RGB.

    Args:
        source: folder or hub id in transformers' layout, such as DINOv2's; of a CLIP model its
            image encoder is taken.

    Raises:
        DataError: it is missing, gated, not whole, of another layout, or no transformer of square
            images.
    """
    config: Any = _loaded(AutoConfig, source, None, DINO)
    clip = hasattr(config, "vision_config") or config.model_type == "clip_vision_model"
    model: Any = _model(CLIPVisionModel if clip else AutoModel, source, None, DINO, UNSEEN)
    if hasattr(model, "pooler"):
        model.pooler = None
    for field in ("image_size", "hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(model.config, field, None), int):
            raise DataError(
                f"{source}: expected a vision transformer, whose configuration has one "
                f'"{field}", found {type(model).__name__}. Use one such as {DINO}.'
            )
    statistics = (CLIP_MEAN, CLIP_STD) if clip else (IMAGENET_MEAN, IMAGENET_STD)
    return model, *statistics


def _model(
    kind: Any,
    source: str,
    part: str | None,
    example: str,
    unseen: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """With every weight from the files, but for those that begin with ``unseen``: the libraries
    draw what is not in them at random."""
    model, found = _loaded(kind, source, part, example, output_loading_info=True, **options)
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(unseen))
    if missing:
        raise DataError(
            f"{source if part is None else f'{source}/{part}'}: expected all weights of a "
            f"{type(model).__name__}, found none for {len(missing)}, such as {missing[0]}. Is it "
            f"cut off, or another kind of model? Use one such as {example}."
        )
    return model


def _loaded(kind: Any, source: str, part: str | None, example: str, **options: Any) -> Any:
    where = source if part is None else f"{source}/{part}"
    if part is not None:
        options["subfolder"] = part
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError) as exc:
        layout = "config.json and model.safetensors"
        if part is not None:
            layout = f"{part}/config.json and {part}/diffusion_pytorch_model.safetensors"
        kind_of = "folder" if Path(source).exists() else "folder or hub id"
        raise DataError(
            f"{where}: no {kind.__name__} in this {kind_of} ({_first_line(exc)}). Give a local "
            f"folder with {layout}, or a hub id such as {example} (log in first where it is gated)."
        ) from exc


def _first_line(exc: Exception) -> str:
    return str(exc).strip().splitlines()[0][:200] if str(exc).strip() else type(exc).__name__
