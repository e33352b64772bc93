"""The published weights of RCOD_O to a merged checkpoint.

rcod_o.pkl holds LoRA matrices for Stable Diffusion 2.1-base, the whole conv_in, and the alignment
of VPIM. The facts of its inference go into rcod.json: one fixed a in the place of alpha_bar_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from rcod_train.checkpoint import CheckpointInfo, CheckpointLevel
from rcod_train.errors import CheckpointError
from rcod_train.network import Parts

LORA_ALPHA = 8  # PEFT's default, which the published training scripts leave alone
FIXED_A = 0.7537  # of RCOD_O's inference
TIMESTEPS = {"fidelity": 249, "neutral": 499, "realism": 749}
# The published bins, M < .5 -> 749, M < .7 -> 499, else 249, are Eq. 5 with this range.
M_MIN, M_MAX, K = 0.3, 0.9, 250


@dataclass(frozen=True)
class _Adapter:
    """A list of modules in the file, the adapter's name in the keys, and the network it adapts."""

    modules: str
    name: str
    part: str  # of Parts; "rank_" and "state_dict_" before it are fields of the file

    @property
    def rank(self) -> str:
        return f"rank_{self.part}"

    @property
    def state(self) -> str:
        return f"state_dict_{self.part}"


ADAPTERS = (
    _Adapter("unet_lora_encoder_modules", "default_encoder", "unet"),
    _Adapter("unet_lora_decoder_modules", "default_decoder", "unet"),
    _Adapter("unet_lora_others_modules", "default_others", "unet"),
    _Adapter("vae_lora_encoder_modules", "default_encoder", "vae"),
)
FIELDS = {a.modules for a in ADAPTERS} | {"rank_unet", "rank_vae"}
STATES = {"state_dict_unet", "state_dict_vae", "state_dict_proj"}


def read_official(path: Path) -> dict[str, Any]:
    """The dict in a published file; nothing but tensors and plain values is unpickled.

    Raises:
        CheckpointError: not readable, not such a dict, or fields are missing or unexpected.
    """
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: not found. Expected rcod_o.pkl.") from exc
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as exc:
        raise CheckpointError(
            f"{path}: not a whole file of tensors and plain values ({exc})."
        ) from exc
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a dict, found {type(raw).__name__}.")
    missing = sorted((FIELDS | STATES) - raw.keys())
    unexpected = sorted(raw.keys() - FIELDS - STATES)
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: missing fields {missing}, unexpected fields {unexpected}. Expected the "
            "layout of rcod_o.pkl."
        )
    for name in sorted(STATES):
        if not isinstance(raw[name], dict) or not all(
            isinstance(v, Tensor) for v in raw[name].values()
        ):
            raise CheckpointError(f'{path}: "{name}": expected a dict of tensors.')
    return raw


@torch.no_grad()
def merge_official(raw: dict[str, Any], parts: Parts, source: str) -> None:
    """Add every low-rank product to its weight: W + (alpha / r) B A; conv_in is replaced first.

    Raises:
        CheckpointError: keys are missing or unexpected, or ranks or shapes don't fit the base.
    """
    for state in ("state_dict_unet", "state_dict_vae"):
        _check_keys(raw, state, source)
    _replace(parts.unet, "conv_in", raw["state_dict_unet"], source)
    for adapter in ADAPTERS:
        network = getattr(parts, adapter.part)
        for module in raw[adapter.modules]:
            _merge(network, module, adapter, raw, source)
    _load_alignment(parts.vpim.align, raw["state_dict_proj"], source)


def _check_keys(raw: dict[str, Any], state: str, source: str) -> None:
    expected = {
        f"{module}.lora_{side}.{adapter.name}.weight"
        for adapter in ADAPTERS
        if adapter.state == state
        for module in raw[adapter.modules]
        for side in "AB"
    }
    if state == "state_dict_unet":
        wrapped = any("conv_in" in raw[a.modules] for a in ADAPTERS if a.state == state)
        inner = "conv_in.base_layer" if wrapped else "conv_in"
        expected |= {f"{inner}.weight", f"{inner}.bias"}
    missing = sorted(expected - raw[state].keys())
    unexpected = sorted(raw[state].keys() - expected)
    if missing or unexpected:
        raise CheckpointError(
            f'{source}: "{state}": {len(missing)} keys missing {missing[:5]}, {len(unexpected)} '
            f"unexpected {unexpected[:5]}."
        )


def _module(network: nn.Module, name: str, source: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as exc:
        raise CheckpointError(
            f"{source}: the base model has no module {name}. Is it Stable Diffusion 2.1-base?"
        ) from exc


def _replace(network: nn.Module, name: str, state: dict[str, Tensor], source: str) -> None:
    module = _module(network, name, source)
    for field in ("weight", "bias"):
        key = f"{name}.{field}"
        value = state.get(key, state.get(f"{name}.base_layer.{field}"))
        parameter = getattr(module, field)
        if value is None or value.shape != parameter.shape:
            found = None if value is None else tuple(value.shape)
            raise CheckpointError(
                f"{source}: {key}: expected {tuple(parameter.shape)} as in the base model, "
                f"found {found}."
            )
        parameter.copy_(value)


def _merge(
    network: nn.Module, name: str, adapter: _Adapter, raw: dict[str, Any], source: str
) -> None:
    weight = getattr(_module(network, name, source), "weight", None)
    state, rank = raw[adapter.state], raw[adapter.rank]
    a, b = (state[f"{name}.lora_{side}.{adapter.name}.weight"].float() for side in "AB")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f'{source}: {name}: expected "{adapter.rank}" {rank}, found matrices of rank '
            f"{a.shape[0]} and {b.shape[1]}."
        )
    if weight is None or (b.shape[0], *a.shape[1:]) != tuple(weight.shape):
        found = None if weight is None else tuple(weight.shape)
        raise CheckpointError(
            f"{source}: {name}: the matrices make {(b.shape[0], *a.shape[1:])}, the base model "
            f"has {found}. Is it Stable Diffusion 2.1-base?"
        )
    product = (b.flatten(1) @ a.flatten(1)).view_as(weight)
    weight.add_(product.to(weight.dtype), alpha=LORA_ALPHA / rank)


def _load_alignment(align: nn.Linear, state: dict[str, Tensor], source: str) -> None:
    found = {name: tuple(value.shape) for name, value in state.items()}
    expected = {name: tuple(p.shape) for name, p in align.named_parameters()}
    if found != expected:
        raise CheckpointError(
            f'{source}: "state_dict_proj": expected {expected}, found {found}. Does the image '
            "encoder match? Expected CLIP ViT-L/14."
        )
    align.load_state_dict(state)


def official_info(name: str) -> CheckpointInfo:
    """rcod.json of an imported checkpoint, with the constants of the published inference."""
    alpha, sigma = math.sqrt(FIXED_A), math.sqrt(1.0 - FIXED_A)
    return CheckpointInfo(
        family="rcod-o",
        name=name,
        summary="Published RCOD_O weights: Stable Diffusion 2.1-base, one step, x4.",
        licence="CreativeML-OpenRAIL-M",
        sources=("LSDIR and FFHQ, as published by the authors of RCOD",),
        levels=tuple(CheckpointLevel(n, t, alpha, sigma) for n, t in TIMESTEPS.items()),
        m_min=M_MIN,
        m_max=M_MAX,
        k=K,
        training={},
    )
