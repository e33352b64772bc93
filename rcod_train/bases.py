"""Base models of the Stable Diffusion families, from local folders or hub ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from transformers import CLIPVisionModel

from rcod_train.errors import DataError
from rcod_train.models.sd import ClipVpim, SdVae
from rcod_train.network import Parts

STABLE_DIFFUSION = "stabilityai/stable-diffusion-2-1-base"
SD_TURBO = "stabilityai/sd-turbo"
CLIP = "openai/clip-vit-large-patch14"


def load_base(base: str, clip: str) -> Parts:
    """Parts of a base model with a new alignment layer and no MEM, in fp32; see the two below."""
    vae, unet = load_diffusion(base)
    return Parts(vae, unet, load_vpim(clip, int(unet.config.cross_attention_dim)))


def load_diffusion(
    base: str, example: str = STABLE_DIFFUSION
) -> tuple[SdVae, UNet2DConditionModel]:
    """Autoencoder and U-Net, in fp32.

    Args:
        base: folder or hub id in diffusers' layout: vae/ and unet/, each with config.json and
            weights.
        example: a hub id to name where there is none.

    Raises:
        DataError: one of them is missing, gated, or not of this layout.
    """
    return (
        _loaded(SdVae, base, "vae", example),
        _loaded(UNet2DConditionModel, base, "unet", example),
    )


def load_vpim(clip: str, cross_attention_dim: int) -> ClipVpim:
    """VPIM with a new alignment layer, in fp32.

    Args:
        clip: folder or hub id of a CLIP model in transformers' layout.
        cross_attention_dim: width of the U-Net's cross-attention.

    Raises:
        DataError: it is missing, gated, or not of this layout.
    """
    encoder: CLIPVisionModel = _loaded(CLIPVisionModel, clip, None, CLIP)
    vpim = ClipVpim(encoder.config.to_dict(), cross_attention_dim)
    vpim.encoder.load_state_dict(encoder.state_dict())
    return vpim


def _loaded(kind: Any, source: str, part: str | None, example: str) -> Any:
    where = source if part is None else f"{source}/{part}"
    options = {} if part is None else {"subfolder": part}
    try:
        return kind.from_pretrained(source, **options).float()
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
