"""The merged checkpoint: a diffusers-style directory that rcod-export reads.

vae/ unet/ vpim/ mem/ guide/   config.json and safetensors each (mem is optional)
rcod.json    family, levels with their constants, statistics of M, training record
discriminator.safetensors    of nano, where it was trained with one: for ``rcod-train nano --from``

Parameters are stored in fp16, buffers as they are. guide/ belongs to rcod-s alone: the degradation
estimator and the guide, with the ranks in its config.json. The branches that it feeds can't be
merged; they stand in vae/ and unet/ as extra tensors, lora_A and lora_B beside each base weight,
which keeps diffusers' name.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from rcod_train.errors import CheckpointError, ConfigError
from rcod_train.files import reason_of, written_whole
from rcod_train.grouping import Grouping
from rcod_train.models.discriminator import Discriminator
from rcod_train.models.guide import Guide, GuidedMem
from rcod_train.models.mem import Mem
from rcod_train.models.sd import ClipVpim, FixedTokens, SdVae
from rcod_train.models.vae import NanoVae
from rcod_train.models.vpim import Vpim
from rcod_train.network import Parts
from rcod_train.schedule import alpha_sigma

VERSION = 2  # since nano's vae may have a skip, which version 1 would have read without it
READABLE = (1, VERSION)
INFO = "rcod.json"
DISCRIMINATOR = "discriminator.safetensors"
LEVEL_NAMES = {
    1: ("neutral",),
    2: ("fidelity", "realism"),
    3: ("fidelity", "neutral", "realism"),
    4: ("fidelity", "neutral", "realism", "extreme"),
}
PARTS = ("vae", "unet", "vpim", "mem", "guide")
OPTIONAL = {"mem"}
GUIDED = {"vae", "unet"}  # the parts that have branches where there is a guide
# The classes that a part of a family may be of; its config.json names one.
Kinds = dict[str, tuple[type[ModelMixin], ...]]
_STABLE_DIFFUSION: Kinds = {"vae": (SdVae,), "unet": (UNet2DConditionModel,)}
FAMILIES: dict[str, Kinds] = {
    "nano": {
        "vae": (NanoVae,), "unet": (UNet2DConditionModel,), "vpim": (Vpim,), "mem": (Mem,),
    },
    "rcod-o": {**_STABLE_DIFFUSION, "vpim": (ClipVpim, FixedTokens), "mem": (Mem,)},
    "rcod-s": {
        "guide": (Guide,), **_STABLE_DIFFUSION, "vpim": (ClipVpim,), "mem": (GuidedMem,),
    },
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointLevel:
    """A level of realism: its timestep and the constants of Eq. 3."""

    name: str
    timestep: int
    alpha: float
    sigma: float


@dataclass(frozen=True)
class CheckpointInfo:
    """rcod.json."""

    family: str
    name: str
    summary: str
    licence: str
    sources: tuple[str, ...]
    levels: tuple[CheckpointLevel, ...]
    m_min: float
    m_max: float
    k: int
    training: dict[str, Any]
    version: int = VERSION


def levels_of(grouping: Grouping, alpha_bar: float | None = None) -> tuple[CheckpointLevel, ...]:
    """The inference levels of a grouping, with the paper's alpha_t and sigma_t, or with those of
    one fixed ``alpha_bar``."""
    return tuple(
        CheckpointLevel(name, t, *alpha_sigma(t, alpha_bar))
        for name, t in zip(LEVEL_NAMES[grouping.n], grouping.timesteps, strict=True)
    )


def save_merged(
    folder: Path, parts: Parts, info: CheckpointInfo, discriminator: Discriminator | None = None
) -> None:
    """Write the checkpoint whole or not at all; an existing one at ``folder`` is replaced.

    What is loaded again is the rounded weights, in fp32, so that everything downstream compares
    with what really ships.
    """
    try:
        with written_whole(folder) as partial:
            for name in PARTS:
                module = getattr(parts, name)
                if module is not None:
                    rounded(module).save_pretrained(partial / name, safe_serialization=True)
                    _forget_origin(partial / name / CONFIG_NAME)
            if discriminator is not None:
                (partial / DISCRIMINATOR).write_bytes(save(discriminator.state_dict()))
            (partial / INFO).write_text(info_text(info), encoding="utf-8")
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written ({reason_of(exc)}). "
            "Free space or choose another --out."
        ) from exc


def _forget_origin(path: Path) -> None:
    """Where a part was loaded from is of the machine alone."""

    def without_origin(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        return {k: without_origin(v) for k, v in entry.items() if k != "_name_or_path"}

    config = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(without_origin(config), indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def info_text(info: CheckpointInfo) -> str:
    """rcod.json."""
    return json.dumps(dataclasses.asdict(info), indent=1) + "\n"


def rounded(module: ModelMixin) -> ModelMixin:
    """With its parameters in fp16, as they are stored."""
    for name, parameter in module.named_parameters():
        half = parameter.data.half()
        if not torch.isfinite(half).all():
            raise CheckpointError(f"weight {name}: beyond fp16's range; the training has diverged.")
        parameter.data = half
    return module


def load_merged(folder: str | Path) -> tuple[Parts, CheckpointInfo]:
    """Read a merged checkpoint; modules come in fp32, in eval mode, without gradients.

    Raises:
        CheckpointError: a part is missing, of another geometry, or rcod.json is not understood.
    """
    folder = Path(folder)
    info = read_info(folder / INFO)
    modules: dict[str, Any] = {}
    if info.family not in FAMILIES:
        raise CheckpointError(
            f'{folder}: "family": expected one of {", ".join(FAMILIES)}, found {info.family!r}.'
        )
    for name, kinds in FAMILIES[info.family].items():
        if not (folder / name).is_dir():
            if name in OPTIONAL:
                continue
            raise CheckpointError(
                f"{folder / name}: expected a part of the checkpoint, found none."
            )
        guide = modules.get("guide") if name in GUIDED else None
        try:
            module = _load_part(folder / name, kinds, guide)
        except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
            raise CheckpointError(f"{folder / name}: could not be loaded: {exc}") from exc
        modules[name] = module.float().eval().requires_grad_(False)
    return Parts(**modules), info


def check_replaceable(folder: Path) -> None:
    """What else lies in the folder would be deleted with the checkpoint that is replaced.

    Raises:
        ConfigError: it exists, and is neither empty nor a merged checkpoint and nothing else.
    """
    if not folder.exists():
        return
    content = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    foreign = sorted(content - {*PARTS, INFO, DISCRIMINATOR})
    if foreign or (content and INFO not in content):
        found = ", ".join(foreign[:3] or sorted(content))
        raise ConfigError(
            f"{folder}: expected a new folder, or a merged checkpoint to replace, found {found}. "
            "Choose another --out."
        )


def load_discriminator(folder: str | Path) -> Discriminator | None:
    """The one that a merged checkpoint was trained against, ready to be trained on; None: it holds
    none.

    Raises:
        CheckpointError: its file is broken or of another geometry.
    """
    path = Path(folder) / DISCRIMINATOR
    if not path.exists():
        return None
    discriminator = Discriminator()
    try:
        discriminator.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as exc:
        raise CheckpointError(
            f"{path}: could not be loaded: {exc}. Delete it to begin with a new one."
        ) from exc
    return discriminator


def _load_part(path: Path, kinds: tuple[type[ModelMixin], ...], guide: Guide | None) -> Any:
    config = kinds[0].load_config(path, local_files_only=True)
    named = {kind.__name__: kind for kind in kinds}
    kind = named.get(config.get("_class_name"))
    if kind is None:
        found = config.get("_class_name")
        raise ValueError(f'"_class_name": expected one of {", ".join(named)}, found {found!r}.')
    if guide is None:
        return kind.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):  # every weight is assigned below, or the load is refused
        module = kind.from_config(config)
        guide.add_branches(module)
    module.load_state_dict(load_file(path / SAFETENSORS_WEIGHTS_NAME), assign=True)
    return module


def read_info(path: Path) -> CheckpointInfo:
    """rcod.json.

    Raises:
        CheckpointError: not there, or not understood.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{path}: not found. Expected a merged checkpoint as rcod-train writes it."
        ) from exc
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path}: not readable as JSON ({exc}).") from exc
    version = raw.get("version") if isinstance(raw, dict) else None
    if version not in READABLE:
        expected = " or ".join(map(str, READABLE))
        raise CheckpointError(f'{path}: "version": expected {expected}, found {version!r}.')
    fields = {f.name for f in dataclasses.fields(CheckpointInfo)}
    if raw.keys() != fields:
        raise CheckpointError(
            f"{path}: missing fields {sorted(fields - raw.keys())}, "
            f"unknown fields {sorted(raw.keys() - fields)}."
        )
    try:
        levels = tuple(CheckpointLevel(**level) for level in raw["levels"])
    except TypeError as exc:
        raise CheckpointError(f'{path}: "levels": {exc}') from exc
    return CheckpointInfo(**{**raw, "levels": levels, "sources": tuple(raw["sources"])})
