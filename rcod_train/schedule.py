"""The noise schedule of Stable Diffusion and the one-step formula (Eq. 3 of RCOD)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # "scaled_linear", as in Stable Diffusion
# What the published code has in Eq. 3 for every t: RCOD_O's, and RCOD_S's (that of t = 249).
OFFICIAL_ALPHA_BAR, OFFICIAL_ALPHA_BAR_S = 0.7537, 0.6754


@cache
def alpha_bar() -> Tensor:
    """alpha_bar_t for t = 0..999, float64: prod over s <= t of 1 - beta_s."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, 0)


def alpha_sigma(t: int, fixed: float | None = None) -> tuple[float, float]:
    """alpha_t = sqrt(alpha_bar_t) and sigma_t = sqrt(1 - alpha_t^2) of a timestep 0..999, or those
    of one ``fixed`` alpha_bar for every t."""
    value = alpha_bar()[t].item() if fixed is None else fixed
    return value**0.5, (1.0 - value) ** 0.5


def alpha_sigma_of(t: Tensor) -> tuple[Tensor, Tensor]:
    """The same for t (B,) int64 -> two (B, 1, 1, 1) float32, ready to scale latents."""
    value = alpha_bar().to(t.device)[t].view(-1, 1, 1, 1)
    return value.sqrt().float(), (1.0 - value).sqrt().float()


def noise_like(z: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal fp32 noise of z's shape, drawn on the CPU: the same on every device."""
    return torch.randn(z.shape, generator=generator).to(z.device)


def add_noise(z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Forward process: z_t = alpha_t z_0 + sigma_t eps, fp32. z_0, eps (B, C, h, w), t (B,)."""
    alpha, sigma = alpha_sigma_of(t)
    return alpha * z_0.float() + sigma * eps.float()


def one_step(z_t: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Eq. 3: z_sr = (z_lq - sigma_t eps) / alpha_t, in fp32 because sigma/alpha (4.1 at t = 750)
    amplifies every rounding error of eps."""
    return (z_t.float() - sigma * eps.float()) / alpha
