"""The configuration of a run: one frozen dataclass tree from the command line to the files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcod_train.errors import ConfigError


@dataclass(frozen=True)
class LoopConfig:
    """What every stage has. Steps count optimiser updates of the generator or model."""

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    photos_per_batch: int = 4
    crops_per_photo: int = 2
    crop_px: int = 256
    context_px: int = 384  # degraded as a whole; the tokens see it, the crops are cut from it
    checkpoint_steps: int = 250


@dataclass(frozen=True)
class VaeStageConfig(LoopConfig):
    """Autoencoder: L1, gradient loss, and latents held near zero mean and unit variance."""

    steps: int = 6000
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    crops_per_photo: int = 4
    crop_px: int = 128
    context_px: int = 256
    gradient_weight: float = 1.0
    moment_weight: float = 0.01


@dataclass(frozen=True)
class BaseStageConfig(LoopConfig):
    """Base denoiser: eps-prediction on latents of HQ photos, visual tokens dropped at random."""

    steps: int = 4000
    learning_rate: float = 5e-4
    ema_decay: float = 0.998
    photos_per_batch: int = 8
    drop_tokens: float = 0.1


@dataclass(frozen=True)
class RcodStageConfig(LoopConfig):
    """The paper's method on the base. Loss weights follow OSEDiff; LPIPS counts where installed."""

    steps: int = 3000
    learning_rate: float = 5e-4
    regulariser_learning_rate: float = 5e-4
    ema_decay: float = 0.995
    rank_unet: int = 32
    rank_vae: int = 16
    rank_regulariser: int = 16
    n: int = 3
    k: int = 250
    metric_samples: int = 512
    metric_quantile: float = 0.02  # M_min and M_max are this quantile and its mirror
    any_level: float = 0.3  # share of samples whose level is drawn from all, and not by Eq. 5
    heavy_share: float = 0.5  # of "osediff" degradations, the rest "s3diff"
    l1_weight: float = 1.0
    lpips_weight: float = 2.0
    gradient_weight: float = 1.0
    latent_weight: float = 0.05
    vsd_weight: float = 1.0
    guidance: float = 2.0
    adversarial_weight: float = 0.1  # of the last level; an earlier one has its share t / nk
    discriminator_learning_rate: float = 1e-3
    train_decoder: bool = True
    decoder_learning_rate: float = 2e-4


@dataclass(frozen=True)
class MemStageConfig(LoopConfig):
    """Metric estimation module, trained after the rest, on the same data."""

    steps: int = 400
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class TrainConfig:
    """One run of ``rcod-train nano``."""

    data: tuple[str, ...]
    out: str
    seed: int = 0
    precision: str = "auto"  # auto | fp32 | bf16: of the matrix products; losses and Eq. 3 are fp32
    workers: int = 1
    threads: int = 0  # 0: torch's choice
    use_lpips: bool = False
    vae: VaeStageConfig = field(default_factory=VaeStageConfig)
    base: BaseStageConfig = field(default_factory=BaseStageConfig)
    rcod: RcodStageConfig = field(default_factory=RcodStageConfig)
    mem: MemStageConfig = field(default_factory=MemStageConfig)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def write(self, path: Path) -> None:
        path.write_text(self.to_json(), encoding="utf-8")


def with_overrides(config: TrainConfig, assignments: list[str]) -> TrainConfig:
    """Apply ``stage.field=value`` assignments; the field's type decides how a value is read.

    Raises:
        ConfigError: unknown field, or a value that is not of the field's type.
    """
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f'--set {assignment!r}: expected FIELD=VALUE, e.g. "rcod.steps=500".')
        config = _replaced(config, path.split("."), text, assignment)
    return config


def _replaced(node: Any, path: list[str], text: str, assignment: str) -> Any:
    names = {f.name for f in dataclasses.fields(node)}
    if path[0] not in names:
        raise ConfigError(
            f"--set {assignment!r}: unknown field {path[0]!r}; expected one of {sorted(names)}."
        )
    current = getattr(node, path[0])
    if dataclasses.is_dataclass(current):
        if len(path) < 2:
            raise ConfigError(f"--set {assignment!r}: {path[0]!r} is a group; name a field in it.")
        return dataclasses.replace(
            node, **{path[0]: _replaced(current, path[1:], text, assignment)}
        )
    if len(path) > 1:
        raise ConfigError(f"--set {assignment!r}: {path[0]!r} has no field {path[1]!r}.")
    return dataclasses.replace(node, **{path[0]: _parsed(current, text, assignment)})


def _parsed(current: Any, text: str, assignment: str) -> Any:
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, (int, float)):
            return type(current)(text)
    except (KeyError, ValueError) as exc:
        kind = type(current).__name__
        raise ConfigError(f"--set {assignment!r}: expected a value of type {kind}.") from exc
    return text
