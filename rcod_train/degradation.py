"""Two-stage degradation of Real-ESRGAN (Wang et al. 2021): a photo in, a realistic lq out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rcod_train.errors import DataError
from rcod_train.kernels import BlurConfig, random_blur, random_sinc

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Blur and noise of which the scores are one half; both presets spread around them.
TYPICAL_BLUR_PX, TYPICAL_NOISE = 1.5, 12 / 255

INTERPOLATIONS = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


@dataclass(frozen=True)
class StageConfig:
    """One stage: blur, resize, noise, JPEG. Noise sigma counts in 0..255."""

    blur: BlurConfig
    resize_probabilities: tuple[float, float, float]  # up, down, keep
    resize_range: tuple[float, float]
    gaussian_probability: float  # otherwise Poisson
    gaussian_sigma: tuple[float, float]
    poisson_scale: tuple[float, float]
    grey_probability: float
    jpeg_quality: tuple[int, int]

    def __post_init__(self) -> None:
        if abs(sum(self.resize_probabilities) - 1.0) > 1e-6:
            raise ValueError(f"resize_probabilities sum to {sum(self.resize_probabilities)}, not 1")


@dataclass(frozen=True)
class DegradationConfig:
    """Both stages and the final sinc filter."""

    first: StageConfig
    second: StageConfig
    final_sinc_probability: float = 0.8


PRESETS = {
    # OSEDiff's values: the heavy one.
    "osediff": DegradationConfig(
        first=StageConfig(
            BlurConfig(21, (0.2, 3.0)),
            (0.2, 0.7, 0.1), (0.15, 1.5), 0.5, (1, 30), (0.05, 3.0), 0.4, (30, 95),
        ),
        second=StageConfig(
            BlurConfig(21, (0.2, 1.5), probability=0.8),
            (0.3, 0.4, 0.3), (0.3, 1.2), 0.5, (1, 25), (0.05, 2.5), 0.4, (30, 95),
        ),
    ),
    # S3Diff's values: the light one.
    "s3diff": DegradationConfig(
        first=StageConfig(
            BlurConfig(21, (0.2, 1.5)),
            (0.2, 0.7, 0.1), (0.3, 1.5), 0.5, (1, 15), (0.05, 2.0), 0.4, (60, 95),
        ),
        second=StageConfig(
            BlurConfig(11, (0.2, 1.0), probability=0.5),
            (0.3, 0.4, 0.3), (0.6, 1.2), 0.5, (1, 12), (0.05, 1.0), 0.4, (60, 100),
        ),
    ),
    # A camera whose lens is too short for the subject, and little else: as RealSR's photos are. The
    # other two always add noise, and a small model that knows nothing else smooths what is clean.
    "mild": DegradationConfig(
        first=StageConfig(
            BlurConfig(21, (1.0, 3.2)),
            (0.0, 0.0, 1.0), (1.0, 1.0), 0.5, (0, 2), (0.0, 0.1), 0.4, (90, 100),
        ),
        second=StageConfig(
            BlurConfig(11, (0.2, 1.0), probability=0.0),
            (0.0, 0.0, 1.0), (1.0, 1.0), 0.5, (0, 3), (0.0, 0.1), 0.4, (90, 100),
        ),
        final_sinc_probability=0.2,
    ),
}  # fmt: skip


@dataclass
class Strength:
    """How much of each a photo got: squared, so that both stages add up.

    blur: of the Gaussian of the same energy as the kernels, in hq pixels squared. noise: its
    variance, pixels in 0..1. Resizing and JPEG are not counted.
    """

    blur_px2: float = 0.0
    noise_variance: float = 0.0

    def scores(self) -> tuple[float, float]:
        """Blur and noise in [0, 1): s / (s + typical), s being the standard deviation."""
        pairs = ((self.blur_px2, TYPICAL_BLUR_PX), (self.noise_variance, TYPICAL_NOISE))
        blur, noise = (value**0.5 / (value**0.5 + typical) for value, typical in pairs)
        return blur, noise

    def add_blur(self, kernel: Floats, hq_px: float) -> None:
        """A kernel on an image whose pixels are ``hq_px`` of hq's wide. A Gaussian's sum of squares
        is 1 / (4 pi sigma^2); a single pixel's is 1 and blurs nothing."""
        energy = float(np.square(kernel, dtype=np.float64).sum())
        self.blur_px2 += max(0.0, 1.0 / energy - 1.0) / (4 * math.pi) * hq_px**2


def degrade(
    hq_hwc_u8: Pixels,
    config: DegradationConfig,
    rng: np.random.Generator,
    scale: int = 4,
    strength: Strength | None = None,
) -> Pixels:
    """hq (H, W, 3) uint8 RGB -> lq (H/scale, W/scale, 3) uint8; the same rng state, the same bytes.

    Args:
        strength: takes up how much blur and noise there was.

    Raises:
        DataError: not a uint8 RGB image, or sides that are not multiples of ``scale``.
    """
    if hq_hwc_u8.ndim != 3 or hq_hwc_u8.shape[2] != 3 or hq_hwc_u8.dtype != np.uint8:
        raise DataError(
            f"degrade: expected (H, W, 3) uint8, found {hq_hwc_u8.shape} {hq_hwc_u8.dtype}."
        )
    height, width = hq_hwc_u8.shape[:2]
    if height % scale or width % scale:
        raise DataError(f"degrade: sides {height} x {width} are not multiples of {scale}.")
    image = hq_hwc_u8.astype(np.float32) / 255.0
    strength = Strength() if strength is None else strength

    image = _blur(image, config.first, rng, strength, 1.0)
    image = _resize(image, _random_size(image.shape, config.first, rng, 1.0), rng)
    image = _noise(image, config.first, rng, strength)
    image = _jpeg(image, config.first, rng)

    image = _blur(image, config.second, rng, strength, height / image.shape[0])
    size = _random_size(hq_hwc_u8.shape, config.second, rng, 1.0 / scale)
    image = _resize(image, size, rng)
    image = _noise(image, config.second, rng, strength)

    # The last resize and sinc filter come before or after the last JPEG, at random.
    jpeg_last = rng.random() < 0.5
    if not jpeg_last:
        image = _jpeg(image, config.second, rng)
    image = _resize(image, (height // scale, width // scale), rng)
    if rng.random() < config.final_sinc_probability:
        image = _filtered(image, random_sinc(21, rng, final=True))
    if jpeg_last:
        image = _jpeg(image, config.second, rng)
    return np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def upsample_lq(lq_hwc_u8: Pixels, size_hw: tuple[int, int]) -> Pixels:
    """Bicubic, quantised: what the encoder sees in training. The runtime's filter is the same."""
    height, width = size_hw
    image = Image.fromarray(lq_hwc_u8).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _filtered(image: Floats, kernel: Floats) -> Floats:
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def _blur(
    image: Floats, stage: StageConfig, rng: np.random.Generator, strength: Strength, hq_px: float
) -> Floats:
    if rng.random() >= stage.blur.probability:
        return image
    kernel = random_blur(stage.blur, rng)
    strength.add_blur(kernel, hq_px)
    return _filtered(image, kernel)


def _random_size(
    shape: tuple[int, ...], stage: StageConfig, rng: np.random.Generator, factor: float
) -> tuple[int, int]:
    low, high = stage.resize_range
    direction = rng.choice(3, p=stage.resize_probabilities)
    if direction == 0:
        factor *= rng.uniform(1.0, high)
    elif direction == 1:
        factor *= rng.uniform(low, 1.0)
    return max(4, round(shape[0] * factor)), max(4, round(shape[1] * factor))


def _resize(image: Floats, size_hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    interpolation = INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]
    return cv2.resize(image, size_hw[::-1], interpolation=interpolation)


def _noise(
    image: Floats, stage: StageConfig, rng: np.random.Generator, strength: Strength
) -> Floats:
    grey = rng.random() < stage.grey_probability
    if rng.random() < stage.gaussian_probability:
        sigma = rng.uniform(*stage.gaussian_sigma) / 255.0
        shape = (*image.shape[:2], 1) if grey else image.shape
        noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma)
    else:
        noise = _poisson_noise(image, grey, rng) * np.float32(rng.uniform(*stage.poisson_scale))
    strength.noise_variance += float(np.square(noise, dtype=np.float64).mean())
    return np.clip(image + noise, 0.0, 1.0)


def _poisson_noise(image: Floats, grey: bool, rng: np.random.Generator) -> Floats:
    """Shot noise; the number of distinct values in the image stands for the photon count."""
    source = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if grey else image
    source = np.clip(source, 0.0, 1.0)
    levels = np.count_nonzero(np.bincount((source * 255.0).astype(np.uint8).ravel(), minlength=256))
    photons = np.float32(2.0 ** np.ceil(np.log2(max(2, levels))))
    return rng.poisson(source * photons).astype(np.float32) / photons - source


def _jpeg(image: Floats, stage: StageConfig, rng: np.random.Generator) -> Floats:
    low, high = stage.jpeg_quality
    pixels = np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    quality = int(rng.integers(low, high + 1))
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / np.float32(255.0)
