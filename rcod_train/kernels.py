"""Blur kernels of the Real-ESRGAN degradation (Wang et al. 2021, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import j1

Kernel = NDArray[np.float32]

KINDS = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso")


@dataclass(frozen=True)
class BlurConfig:
    """How the blur of one stage is drawn. Sizes are odd, from 7 to ``size`` px."""

    size: int
    sigma: tuple[float, float]
    probability: float = 1.0  # that the stage blurs at all
    sinc_probability: float = 0.1
    kind_probabilities: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    beta_generalised: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self) -> None:
        if self.size < 7 or self.size % 2 == 0:
            raise ValueError(
                f"kernel size: expected an odd number of at least 7, found {self.size}"
            )
        if len(self.kind_probabilities) != len(KINDS):
            raise ValueError(f"kind_probabilities: expected {len(KINDS)}")


def _radius(size: int) -> tuple[Kernel, Kernel]:
    axis = np.arange(size, dtype=np.float32) - size // 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def gaussian_like(
    size: int,
    sigma_x: float,
    sigma_y: float,
    angle: float,
    beta: float = 1.0,
    plateau: bool = False,
) -> Kernel:
    """exp(-q^beta / 2), or 1 / (1 + q^beta) for a plateau, q the squared distance in sigmas.

    Sums to one; (size, size) float32. beta = 1 without plateau is the Gaussian.
    """
    x, y = _radius(size)
    cos, sin = math.cos(angle), math.sin(angle)
    q = ((cos * x + sin * y) / sigma_x) ** 2 + ((cos * y - sin * x) / sigma_y) ** 2
    shaped = q**beta
    kernel = 1.0 / (1.0 + shaped) if plateau else np.exp(-0.5 * shaped)
    return (kernel / kernel.sum()).astype(np.float32)


def sinc(size: int, cutoff: float) -> Kernel:
    """Circular low-pass filter with its ringing; cutoff in radians per pixel. Sums to one."""
    x, y = _radius(size)
    r = np.sqrt(x * x + y * y)
    r[size // 2, size // 2] = 1.0
    kernel = cutoff * j1(cutoff * r) / (2 * math.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).astype(np.float32)


def random_size(limit: int, rng: np.random.Generator) -> int:
    """An odd size from 7 to ``limit``."""
    return 7 + 2 * int(rng.integers(0, (limit - 7) // 2 + 1))


def random_sinc(size_limit: int, rng: np.random.Generator, final: bool = False) -> Kernel:
    """A sinc filter; small kernels don't get cut-offs they can't represent, and the ``final`` one
    of a degradation, after both stages, cuts less in all sizes."""
    size = random_size(size_limit, rng)
    low = math.pi / 3 if size < 13 or final else math.pi / 5
    return sinc(size, rng.uniform(low, math.pi))


def random_blur(config: BlurConfig, rng: np.random.Generator) -> Kernel:
    """The kernel of one stage."""
    if rng.random() < config.sinc_probability:
        return random_sinc(config.size, rng)
    size = random_size(config.size, rng)
    kind = KINDS[rng.choice(len(KINDS), p=config.kind_probabilities)]
    sigma_x, sigma_y = rng.uniform(*config.sigma, 2)
    angle = rng.uniform(-math.pi, math.pi)
    if kind.endswith("iso") and not kind.endswith("aniso"):
        sigma_y, angle = sigma_x, 0.0
    beta = 1.0
    if kind.startswith("generalised"):
        beta = _around_one(config.beta_generalised, rng)
    elif kind.startswith("plateau"):
        beta = _around_one(config.beta_plateau, rng)
    return gaussian_like(size, sigma_x, sigma_y, angle, beta, kind.startswith("plateau"))


def _around_one(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    """Half of the draws up to 1 (heavier tails), half from there on: where the range begins at 1,
    half of them are 1, as in Real-ESRGAN."""
    low, high = bounds
    return float(rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high))
