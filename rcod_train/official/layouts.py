"""What each published file holds, and the constants of the inference it was made for.

The fields are those that the published code writes: cswry/OSEDiff, Zongliang-Wu/RCOD. The facts of
an inference go into rcod.json; RCOD's has one fixed a in the place of alpha_bar_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rcod_train.bases import SD_TURBO, STABLE_DIFFUSION
from rcod_train.checkpoint import CheckpointInfo, CheckpointLevel
from rcod_train.grouping import official_grouping
from rcod_train.schedule import OFFICIAL_ALPHA_BAR, OFFICIAL_ALPHA_BAR_S, alpha_sigma

LORA_ALPHA = 8  # PEFT's default, which the published training scripts leave alone
TIMESTEPS = {"fidelity": 249, "neutral": 499, "realism": 749}  # of RCOD_O and RCOD_S
# The published bins, M < .5 -> 749, M < .7 -> 499, else 249, are Eq. 5 with this range.
_BINS = official_grouping(3)
M_MIN, M_MAX, K = _BINS.m_min, _BINS.m_max, _BINS.k
OSEDIFF_TIMESTEP = 999

FieldKind = Literal["names", "targets", "rank", "state", "tensor"]
EXPECTED: dict[FieldKind, str] = {
    "names": "a list of module names",
    "targets": "a pattern or a list of names",
    "rank": "a positive integer",
    "state": "a dict of tensors",
    "tensor": "a tensor",
}


def is_kind(value: Any, kind: FieldKind) -> bool:
    """Whether a value in a file is what its field must hold."""
    if kind == "rank":
        return isinstance(value, int) and value > 0
    if kind == "state":
        return isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values())
    if kind == "tensor":
        return isinstance(value, Tensor)
    if kind == "targets" and isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


@dataclass(frozen=True)
class Adapter:
    """A list of modules in the file, the adapter's name in the keys, and the network it adapts."""

    name: str
    part: Literal["unet", "vae"]  # of Parts; "rank_" and "state_dict_" before it are fields
    modules: str | None = None  # None: the modules are those of the method, the file has no list

    @property
    def rank(self) -> str:
        return f"rank_{self.part}"

    @property
    def state(self) -> str:
        return f"state_dict_{self.part}"

    def key(self, module: str, side: Literal["A", "B"]) -> str:
        return f"{module}.lora_{side}.{self.name}.weight"


MERGED_ADAPTERS = (
    Adapter("default_encoder", "unet", "unet_lora_encoder_modules"),
    Adapter("default_decoder", "unet", "unet_lora_decoder_modules"),
    Adapter("default_others", "unet", "unet_lora_others_modules"),
    Adapter("default_encoder", "vae", "vae_lora_encoder_modules"),
)
GUIDED_ADAPTERS = (Adapter("default", "unet"), Adapter("vae_skip", "vae"))
# Fields of rcod_s.pkl -> modules of DegradationGuide.
GUIDE_STATES = {
    "state_dict_vae_de_mlp": "vae.degradation",
    "state_dict_vae_block_mlp": "vae.block",
    "state_dict_vae_fuse_mlp": "vae.fuse",
    "state_embeddings.state_dict_vae_block": "vae.embeddings",
    "state_dict_unet_de_mlp": "unet.degradation",
    "state_dict_unet_block_mlp": "unet.block",
    "state_dict_unet_fuse_mlp": "unet.fuse",
    "state_embeddings.state_dict_unet_block": "unet.embeddings",
}


@dataclass(frozen=True)
class Layout:
    """A published file: its fields, the base it belongs to, and its inference.

    Attributes:
        file: its published name, for messages; never looked for.
        options: what beside the base the import needs, by the names of the command's options.
        may: what it can do without.
        align: the field of VPIM's alignment.
    """

    file: str
    name: str
    family: str
    base: str
    base_id: str
    fields: dict[str, FieldKind]
    options: frozenset[str]
    levels: tuple[CheckpointLevel, ...]
    summary: str
    licence: str
    sources: tuple[str, ...]
    may: frozenset[str] = frozenset()
    align: str | None = None


def _levels(a: float) -> tuple[CheckpointLevel, ...]:
    alpha, sigma = math.sqrt(a), math.sqrt(1.0 - a)
    return tuple(CheckpointLevel(name, t, alpha, sigma) for name, t in TIMESTEPS.items())


_RANKED: dict[str, FieldKind] = {
    "rank_unet": "rank", "rank_vae": "rank", "state_dict_unet": "state", "state_dict_vae": "state",
}  # fmt: skip
_MERGED = _RANKED | {str(adapter.modules): "names" for adapter in MERGED_ADAPTERS}

RCOD_O = Layout(
    file="rcod_o.pkl",
    name="rcod-o",
    family="rcod-o",
    base="Stable Diffusion 2.1-base",
    base_id=STABLE_DIFFUSION,
    fields={**_MERGED, "state_dict_proj": "state"},
    options=frozenset({"clip"}),
    levels=_levels(OFFICIAL_ALPHA_BAR),
    summary="Published RCOD_O weights: Stable Diffusion 2.1-base, one step, x4.",
    licence="LicenseRef-CreativeML-OpenRAIL-PlusPlus-M",
    sources=("LSDIR and FFHQ, as published by the authors of RCOD",),
    align="state_dict_proj",
)
OSEDIFF = Layout(
    file="osediff.pkl",
    name="osediff",
    family="rcod-o",  # the same networks with one level; the tokens are a prompt's
    base="Stable Diffusion 2.1-base",
    base_id=STABLE_DIFFUSION,
    fields=_MERGED,
    options=frozenset({"tokens"}),
    levels=(CheckpointLevel("neutral", OSEDIFF_TIMESTEP, *alpha_sigma(OSEDIFF_TIMESTEP)),),
    summary="Published OSEDiff weights with one fixed prompt: one step, x4, no realism control.",
    licence="LicenseRef-CreativeML-OpenRAIL-PlusPlus-M",
    sources=("LSDIR and FFHQ, as published by the authors of OSEDiff",),
)
RCOD_S = Layout(
    file="rcod_s.pkl",
    name="rcod-s",
    family="rcod-s",
    base="SD-Turbo",
    base_id=SD_TURBO,
    fields={
        **_RANKED,
        "unet_lora_target_modules": "targets",
        "vae_lora_target_modules": "targets",
        **dict.fromkeys(GUIDE_STATES, "state"),
        "state_dict_clip_proj": "state",
        "w": "tensor",
    },
    options=frozenset({"clip", "estimator"}),
    may=frozenset({"mem"}),
    levels=_levels(OFFICIAL_ALPHA_BAR_S),
    summary="Published RCOD_S weights: SD-Turbo, degradation-guided LoRA, one step, x4.",
    licence="LicenseRef-Stability-AI-SD-Turbo",
    sources=("LSDIR and FFHQ, as published by the authors of RCOD",),
    align="state_dict_clip_proj",
)
LAYOUTS = (RCOD_O, OSEDIFF, RCOD_S)


def official_info(name: str, layout: Layout = RCOD_O) -> CheckpointInfo:
    """rcod.json of an imported checkpoint, with the constants of the published inference."""
    return CheckpointInfo(
        family=layout.family,
        name=name,
        summary=layout.summary,
        licence=layout.licence,
        sources=layout.sources,
        levels=layout.levels,
        m_min=M_MIN,
        m_max=M_MAX,
        k=K,
        training={},
    )
