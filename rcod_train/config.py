"""The configuration of a run: one frozen dataclass tree from the command line to the files.

nano's losses and degradations are what the runs behind the embedded model came to; its steps and
crops are those of one run from the start, of two and a half hours (docs/training.md).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rcod_train.errors import ConfigError

Limits = dict[str, tuple[float, float]]  # field -> lowest and highest value
AT_LEAST_1, SHARE, UNUSED = (1, math.inf), (0, 1), (0, 0)


def check_numbers(config: Any, limits: Limits) -> None:
    """Every number of a configuration is at least 0, or within its ``limits``.

    Raises:
        ConfigError: one is not; NaN never is.
    """
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        if not isinstance(value, (int, float)):
            continue
        lowest, highest = limits.get(name, (0, math.inf))
        if not lowest <= value <= highest:
            expected = f"at least {lowest}" if highest == math.inf else f"{lowest} to {highest}"
            if (lowest, highest) == UNUSED:
                expected = "0, as nothing here uses it"
            raise ConfigError(f"{name}: expected {expected}, found {value}.")


@dataclass(frozen=True)
class LoopConfig:
    """What every stage has. Steps count optimiser updates of the generator or model."""

    _CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"optimizer": ("adamw", "adamw8bit")}
    _LIMITS: ClassVar[Limits] = {
        "steps": AT_LEAST_1,
        "beta2": (0, 0.99999),
        "final_rate": SHARE,
        "ema_decay": SHARE,
        "turned_share": SHARE,
        "accumulate": AT_LEAST_1,
        "photos_per_batch": AT_LEAST_1,
        "crops_per_photo": AT_LEAST_1,
        "crop_px": AT_LEAST_1,
        "context_px": AT_LEAST_1,
        "checkpoint_steps": AT_LEAST_1,
    }

    steps: int = 1000
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    beta2: float = 0.99
    final_rate: float = 0.05  # share of the learning rate left at the last step; 1: constant
    clip_norm: float = 1.0  # 0: gradients are not clipped
    ema_decay: float = 0.995
    accumulate: int = 1  # batches to one update
    photos_per_batch: int = 4
    crops_per_photo: int = 2
    crop_px: int = 256
    context_px: int = 384  # degraded as a whole; the tokens see it, the crops are cut from it
    turned_share: float = 0.3  # of samples, by 0 to 3 right angles; mirrored are half of all
    checkpoint_steps: int = 250
    validation_steps: int = 0  # 0: no validation; nor is there one without photos held out

    def __post_init__(self) -> None:
        check_numbers(self, self._LIMITS)
        for name, choices in self._CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}: expected {' or '.join(choices)}, found {getattr(self, name)!r}."
                )


def degradation_shares(heavy: float, mild: float = 0.0) -> dict[str, float]:
    """The share of each preset of rcod_train.degradation.

    Raises:
        ConfigError: a share is negative, or they are more than 1 together.
    """
    if min(heavy, mild) < 0 or heavy + mild > 1:
        raise ConfigError(
            f"heavy_share and mild_share: expected 0 to 1, also together, found {heavy} and {mild}."
        )
    return {"osediff": heavy, "mild": mild, "s3diff": 1.0 - heavy - mild}


@dataclass(frozen=True)
class VaeStageConfig(LoopConfig):
    """Autoencoder: L1, gradient loss, and latents held near zero mean and unit variance."""

    _LIMITS = LoopConfig._LIMITS | {"validation_steps": UNUSED}
    steps: int = 4000
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    crop_px: int = 128
    context_px: int = 256
    gradient_weight: float = 1.0
    moment_weight: float = 0.01


@dataclass(frozen=True)
class BaseStageConfig(LoopConfig):
    """Base denoiser: eps-prediction on latents of HQ photos, visual tokens dropped at random."""

    _LIMITS = LoopConfig._LIMITS | {"validation_steps": UNUSED, "drop_tokens": SHARE}
    steps: int = 800
    learning_rate: float = 5e-4
    ema_decay: float = 0.998
    photos_per_batch: int = 8
    crops_per_photo: int = 1
    crop_px: int = 192
    drop_tokens: float = 0.1


@dataclass(frozen=True)
class RcodStageConfig(LoopConfig):
    """The paper's method on a base. Loss weights follow OSEDiff.

    grouping: "paper" is Eq. 5 with M_min and M_max measured, "official" the published code's bins
    and timesteps. metric: M of Eq. 6, or a plain distance in its place. das: Eq. 7, the published
    intervals, or none. constants: alpha_t and sigma_t of Eq. 3, or one fixed pair for every t.
    vpim: without, the tokens are zeros.
    """

    _CHOICES = LoopConfig._CHOICES | {
        "grouping": ("paper", "official"),
        "metric": ("cosine", "l1"),
        "das": ("paper", "official", "uniform"),
        "constants": ("paper", "official"),
    }
    _LIMITS = LoopConfig._LIMITS | {
        "rank_unet": AT_LEAST_1,
        "rank_vae": AT_LEAST_1,
        "rank_regulariser": AT_LEAST_1,
        "n": AT_LEAST_1,
        "k": AT_LEAST_1,
        "metric_samples": (2, math.inf),  # M_min is less than M_max
        "metric_quantile": (0, 0.49),
        "any_level": SHARE,
        "heavy_share": SHARE,
        "mild_share": SHARE,
    }
    steps: int = 1300
    learning_rate: float = 3e-4
    regulariser_learning_rate: float = 5e-4
    ema_decay: float = 0.995
    rank_unet: int = 32
    rank_vae: int = 16
    rank_regulariser: int = 16
    lora_alpha: int = 0  # PEFT's: what the adapters add counts lora_alpha / rank; 0: the rank, so 1
    grouping: str = "paper"
    metric: str = "cosine"
    das: str = "paper"
    constants: str = "paper"
    vpim: bool = True
    n: int = 3
    k: int = 250
    metric_samples: int = 512
    metric_quantile: float = 0.02  # M_min and M_max are this quantile and its mirror
    any_level: float = 0.5  # share of samples whose level is drawn from all, and not by Eq. 5
    heavy_share: float = 0.35  # of "osediff" degradations
    mild_share: float = 0.0  # of "mild" ones; the rest is "s3diff"
    l1_weight: float = 1.0
    mse_weight: float = 0.0
    lpips_weight: float = 2.0
    lpips_power: float = 0.0  # the share of a level in it is (t / nk) to this power; 0: all alike
    lpips_crop_px: int = 0  # side of the window of a crop that it sees, drawn each time; 0: all
    gradient_weight: float = 1.0
    ssim_weight: float = 0.0
    consistent: bool = False  # losses look at the result behind the colour match of that name
    latent_weight: float = 0.05
    vsd_weight: float = 0.5
    guidance: float = 2.0
    adversarial_weight: float = 0.09  # of the last level; an earlier one has its share
    feature_weight: float = 0.5  # distance of the discriminator's features; shared the same way
    realism_power: float = 1.5  # the share of a level in both is (t / nk) to this power
    discriminator_learning_rate: float = 1e-3
    train_adapters: bool = True  # without, decoder and skip alone: latents stay as they are
    train_decoder: bool = True
    decoder_learning_rate: float = 2e-4
    gradient_checkpointing: bool = False  # blocks are computed again in the backward pass

    @property
    def degradations(self) -> dict[str, float]:
        return degradation_shares(self.heavy_share, self.mild_share)


@dataclass(frozen=True)
class RegressionStageConfig(LoopConfig):
    """nano's RCOD model on the distances to the photo alone, before its realism terms: a step costs
    half of theirs, and a small base leaves most to learn here. Weights are those of ``rcod``."""

    steps: int = 1600
    learning_rate: float = 5e-4
    decoder_learning_rate: float = 5e-4
    crops_per_photo: int = 1
    crop_px: int = 192
    validation_steps: int = 500


@dataclass(frozen=True)
class RefineStageConfig(RcodStageConfig):
    """The RCOD stage once more, from merged weights. Their U-Net no longer denoises photos: without
    VSD. 0 steps: left out."""

    _LIMITS = RcodStageConfig._LIMITS | {"steps": (0, math.inf)}


@dataclass(frozen=True)
class MemStageConfig(LoopConfig):
    """Metric estimation module, trained after the rest, on the same data."""

    _LIMITS = LoopConfig._LIMITS | {"validation_steps": UNUSED}
    steps: int = 300
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class EstimatorStageConfig(LoopConfig):
    """Degradation estimator: it sees crop_px / 4 of what was degraded."""

    _LIMITS = LoopConfig._LIMITS | {
        "validation_steps": UNUSED,
        "heavy_share": SHARE,
        "crop_px": (4, math.inf),
    }
    steps: int = 20_000
    learning_rate: float = 2e-4
    photos_per_batch: int = 16
    crops_per_photo: int = 1  # the crop is the whole context
    crop_px: int = 256
    context_px: int = 256
    heavy_share: float = 0.5  # of "osediff" degradations, the rest "s3diff"

    @property
    def degradations(self) -> dict[str, float]:
        return degradation_shares(self.heavy_share)


# RCOD_O as the paper's supplement has it (30,000 iterations, batch 4, learning rate 2e-5, rank 4),
# the rest as OSEDiff. No adversary, no decoder: what ships differs from the base by 5.5 M values.
RCOD_O = RcodStageConfig(
    steps=30_000,
    learning_rate=2e-5,
    regulariser_learning_rate=2e-5,
    warmup_steps=500,
    weight_decay=1e-2,
    beta2=0.999,
    final_rate=1.0,
    ema_decay=0.999,
    accumulate=4,
    photos_per_batch=1,
    crops_per_photo=1,
    crop_px=512,
    context_px=512,
    turned_share=0.0,  # Real-ESRGAN's recipe mirrors alone
    checkpoint_steps=500,
    validation_steps=1000,
    rank_unet=4,
    rank_vae=4,
    rank_regulariser=4,
    lora_alpha=8,  # PEFT's default, which the published training leaves alone
    any_level=0.0,
    heavy_share=1.0,
    l1_weight=0.0,
    mse_weight=1.0,
    gradient_weight=0.0,
    latent_weight=0.0,
    vsd_weight=1.0,
    guidance=7.5,
    adversarial_weight=0.0,
    train_decoder=False,
    gradient_checkpointing=True,
)
# RCOD_S: S3Diff's losses and light degradation, the paper's supplement for the rest. Its adversary
# looks through DINO; ours is small where no backbone is given. Its share is the same at all levels.
RCOD_S = dataclasses.replace(
    RCOD_O,
    rank_unet=32,
    rank_vae=16,
    heavy_share=0.0,
    mse_weight=2.0,
    lpips_weight=5.0,
    vsd_weight=0.0,
    adversarial_weight=0.5,
    feature_weight=0.0,
    realism_power=0.0,
    discriminator_learning_rate=2e-5,
)
# nano: realism terms grow with the square of the level, and SSIM holds smooth areas, which an
# adversary likes to fill.
NANO = RcodStageConfig(
    steps=1400,
    decoder_learning_rate=4e-4,
    crops_per_photo=1,
    crop_px=192,
    validation_steps=500,
    metric_quantile=0.0,
    heavy_share=0.25,
    mild_share=0.5,
    ssim_weight=1.0,
    lpips_power=2.0,
    lpips_crop_px=96,
    adversarial_weight=0.12,
    realism_power=2.0,
)
# From its merged weights, or those of a checkpoint. The decoder is trained in full and has a low
# rate: with that of the stages before it loses in its first steps what they had won.
NANO_REFINE = RefineStageConfig(
    **dataclasses.asdict(NANO)
    | {
        "steps": 2250,
        "crops_per_photo": 2,
        "learning_rate": 1e-4,
        "decoder_learning_rate": 4e-5,
        "warmup_steps": 50,
        "ema_decay": 0.998,
        "validation_steps": 500,
        "adversarial_weight": 0.15,
        "any_level": 1.0,
        "latent_weight": 0.0,
        "vsd_weight": 0.0,
    }
)
SD_MEM = MemStageConfig(
    steps=1000,
    photos_per_batch=4,
    crops_per_photo=1,
    crop_px=512,
    context_px=512,
    turned_share=0.0,
)


@dataclass(frozen=True)
class RunConfig:
    """What every run has.

    data: folders of photos and tar shards. pairs: folders with LR and HR; they are ``pairs_share``
    of the samples where there are both. precision: of the matrix products and of frozen base
    weights; what is trained, the losses and Eq. 3 are fp32. validation: a folder of photos, or else
    ``validation_share`` of the data, taken from the training; at most ``validation_photos`` of
    them, evenly spread, are looked at. tensorboard: events too, in ``out``/tensorboard.
    """

    _LIMITS: ClassVar[Limits] = {
        "pairs_share": SHARE,
        "validation_share": SHARE,
        "validation_photos": AT_LEAST_1,
    }

    data: tuple[str, ...]
    out: str
    pairs: tuple[str, ...] = ()
    pairs_share: float = 0.5
    seed: int = 0
    device: str = "cpu"
    precision: str = "auto"  # auto | fp32 | bf16 | fp16 (fp16 with loss scaling)
    workers: int = 1
    threads: int = 0  # 0: torch's choice
    use_lpips: bool = False
    validation: str = ""
    validation_share: float = 0.0
    validation_photos: int = 8
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, self._LIMITS)

    @property
    def stages(self) -> dict[str, LoopConfig]:
        """By the names of their fields, in the order that they are trained in."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, LoopConfig)}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def write(self, path: Path) -> None:
        path.write_text(self.to_json(), encoding="utf-8")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One run of ``rcod-train nano``. start: a merged checkpoint that takes the place of the stages
    before ``refine``."""

    start: str = ""
    vae: VaeStageConfig = field(default_factory=VaeStageConfig)
    base: BaseStageConfig = field(default_factory=BaseStageConfig)
    regression: RegressionStageConfig = field(default_factory=RegressionStageConfig)
    rcod: RcodStageConfig = NANO
    refine: RefineStageConfig = NANO_REFINE
    mem: MemStageConfig = field(default_factory=MemStageConfig)


@dataclass(frozen=True)
class RcodOConfig(RunConfig):
    """One run of ``rcod-train rcod-o``. base_model, clip: folders or hub ids; text: a file of text
    embeddings that condition regulariser and teacher, "" for the visual tokens of the HQ image."""

    base_model: str = ""
    clip: str = ""
    text: str = ""
    rcod: RcodStageConfig = RCOD_O
    mem: MemStageConfig = SD_MEM


@dataclass(frozen=True)
class RcodSConfig(RunConfig):
    """One run of ``rcod-train rcod-s``. base_model, clip, backbone: folders or hub ids; backbone: a
    vision model that the discriminator looks through, "" for a small one of our own; estimator: a
    file of weights."""

    base_model: str = ""
    clip: str = ""
    estimator: str = ""
    backbone: str = ""
    rcod: RcodStageConfig = RCOD_S
    mem: MemStageConfig = SD_MEM


@dataclass(frozen=True)
class EstimatorConfig(RunConfig):
    """One run of ``rcod-train estimator``; the sizes are S3Diff's."""

    _LIMITS = RunConfig._LIMITS | {
        "validation_share": UNUSED,
        **dict.fromkeys(("width", "features", "hidden"), AT_LEAST_1),
    }

    width: int = 64
    features: int = 128
    hidden: int = 512
    estimator: EstimatorStageConfig = field(default_factory=EstimatorStageConfig)
