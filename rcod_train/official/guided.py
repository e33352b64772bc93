"""rcod_s.pkl, rcod_s_mem.pkl and de_net.pth: RCOD_S on SD-Turbo.

The file names its targets by a pattern and a list of endings; which layers those are, the method
says (rcod_train/models/guided.py), and the keys must be exactly theirs.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rcod_train.errors import CheckpointError
from rcod_train.models.guide import TRAINED_HERE, Guide, GuidedMem
from rcod_train.models.guided import unet_branches, vae_branches
from rcod_train.models.sd import SdVae
from rcod_train.official.layouts import GUIDE_STATES, GUIDED_ADAPTERS, LORA_ALPHA, Adapter
from rcod_train.official.reading import (
    check_keys,
    load_exactly,
    low_rank,
    read_state,
    replace_conv_in,
)

ESTIMATOR = "S3Diff's degradation estimator, de_net.pth"
MEM = "the MEM of RCOD_S, rcod_s_mem.pkl"
BASE_HINT = "Is the base SD-Turbo?"


def read_estimator(path: Path) -> dict[str, Tensor]:
    state = read_state(path, ESTIMATOR)
    with suppress(SafetensorError), safe_open(path, "pt") as file:  # or a pickle
        if (file.metadata() or {}).items() >= TRAINED_HERE.items():
            raise CheckpointError(
                f"{path}: was made by rcod-train estimator, whose scores are other ones than those "
                f"that published weights were trained with. Expected {ESTIMATOR}."
            )
    return state


def read_mem(path: Path) -> dict[str, Tensor]:
    return read_state(path, MEM, "state_dict_clip_proj")


def load_mem(guide: Guide, state: dict[str, Tensor], source: str) -> GuidedMem:
    """A MEM on the features of this guide's estimator."""
    mem = GuidedMem(2 * guide.config.estimator_features)
    load_exactly(mem.mlp, state, f'{source}: "state_dict_clip_proj"', f"Expected {MEM}.")
    return mem


@torch.no_grad()
def load_guided(
    raw: dict[str, Any],
    vae: SdVae,
    unet: UNet2DConditionModel,
    estimator: tuple[dict[str, Tensor], str],
    source: str,
) -> Guide:
    """Put the branches on both networks, in place, fill them, and make the guide that feeds them.

    Args:
        estimator: the state dict of the degradation estimator, and the file it comes from.

    Raises:
        CheckpointError: keys are missing or unexpected, or ranks or shapes don't fit the base.
    """
    networks = {"unet": unet, "vae": vae}
    blocks = {"unet": unet_branches(unet), "vae": vae_branches(vae)}
    factors = {
        adapter.part: _factors(raw, adapter, list(blocks[adapter.part]), source)
        for adapter in GUIDED_ADAPTERS
    }
    replace_conv_in(unet, raw["state_dict_unet"], source)
    guide = Guide(
        rank_vae=raw["rank_vae"],
        rank_unet=raw["rank_unet"],
        blocks_vae=max(blocks["vae"].values()) + 1,
        blocks_unet=max(blocks["unet"].values()) + 1,
        lora_alpha=LORA_ALPHA,
    )
    for part, network in networks.items():
        guide.add_branches(network)
        for module, pair in factors[part].items():
            _fill(network.get_submodule(module), pair, f"{source}: {module}")
    for field, name in GUIDE_STATES.items():
        load_exactly(
            guide.network.get_submodule(name), raw[field], f'{source}: "{field}"', BASE_HINT
        )
    _load_frequencies(guide, raw["w"], source)
    state, estimator_source = estimator
    load_exactly(guide.estimator, state, estimator_source, f"Expected {ESTIMATOR}.")
    return guide


def _factors(
    raw: dict[str, Any], adapter: Adapter, modules: list[str], source: str
) -> dict[str, tuple[Tensor, Tensor]]:
    expected = {adapter.key(module, side) for module in modules for side in "AB"}
    if adapter.part == "unet":
        expected |= {"conv_in.weight", "conv_in.bias"}
    check_keys(raw[adapter.state], expected, f'{source}: "{adapter.state}"')
    return {module: low_rank(raw, adapter, module, source) for module in modules}


def _fill(layer: nn.Module, pair: tuple[Tensor, Tensor], where: str) -> None:
    for value, factor in zip(pair, (layer.lora_A, layer.lora_B), strict=True):
        if value.shape != factor.weight.shape:
            raise CheckpointError(
                f"{where}: expected a factor {tuple(factor.weight.shape)} for the base model's "
                f"layer, found {tuple(value.shape)}. {BASE_HINT}"
            )
        factor.weight.copy_(value)


def _load_frequencies(guide: Guide, w: Tensor, source: str) -> None:
    frequencies = guide.network.frequencies
    if w.shape != frequencies.shape:
        raise CheckpointError(
            f'{source}: "w": expected {tuple(frequencies.shape)}, found {tuple(w.shape)}.'
        )
    frequencies.copy_(w)
