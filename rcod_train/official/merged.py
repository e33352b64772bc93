"""rcod_o.pkl and osediff.pkl: LoRA for Stable Diffusion 2.1-base and the whole conv_in."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from rcod_train.errors import CheckpointError
from rcod_train.models.sd import SdVae
from rcod_train.official.layouts import LORA_ALPHA, MERGED_ADAPTERS, Adapter
from rcod_train.official.reading import check_keys, low_rank, replace_conv_in


@torch.no_grad()
def merge_official(
    raw: dict[str, Any], vae: SdVae, unet: UNet2DConditionModel, source: str
) -> None:
    """Add every low-rank product to its weight: W + (alpha / r) B A; conv_in is replaced first.

    Raises:
        CheckpointError: keys are missing or unexpected, or ranks or shapes don't fit the base.
    """
    for state in ("state_dict_unet", "state_dict_vae"):
        _check_keys(raw, state, source)
    replace_conv_in(unet, raw["state_dict_unet"], source)
    for adapter in MERGED_ADAPTERS:
        for module in dict.fromkeys(raw[adapter.modules]):  # the VAE's are named several times
            _merge(unet if adapter.part == "unet" else vae, module, adapter, raw, source)


def _check_keys(raw: dict[str, Any], state: str, source: str) -> None:
    adapters = [adapter for adapter in MERGED_ADAPTERS if adapter.state == state]
    expected = {
        adapter.key(module, side)
        for adapter in adapters
        for module in raw[adapter.modules]
        for side in "AB"
    }
    if state == "state_dict_unet":
        wrapped = any("conv_in" in raw[adapter.modules] for adapter in adapters)
        inner = "conv_in.base_layer" if wrapped else "conv_in"
        expected |= {f"{inner}.weight", f"{inner}.bias"}
    check_keys(raw[state], expected, f'{source}: "{state}"')


def _merge(
    network: nn.Module, name: str, adapter: Adapter, raw: dict[str, Any], source: str
) -> None:
    try:
        weight = getattr(network.get_submodule(name), "weight", None)
    except AttributeError as exc:
        raise CheckpointError(
            f"{source}: the base model has no module {name}. Is it Stable Diffusion 2.1-base?"
        ) from exc
    a, b = low_rank(raw, adapter, name, source)
    if weight is None or (b.shape[0], *a.shape[1:]) != tuple(weight.shape):
        found = None if weight is None else tuple(weight.shape)
        raise CheckpointError(
            f"{source}: {name}: the matrices make {(b.shape[0], *a.shape[1:])}, the base model "
            f"has {found}. Is it Stable Diffusion 2.1-base?"
        )
    product = (b.flatten(1) @ a.flatten(1)).view_as(weight)
    weight.add_(product.to(weight.dtype), alpha=LORA_ALPHA / raw[adapter.rank])
