"""Variational score distillation on predicted latents (OSEDiff; Eq. 7 of RCOD for the timestep)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rcod_train.schedule import add_noise, alpha_sigma_of, one_step

PredictEps = Callable[[Tensor, Tensor], Tensor]
"""(z_t (B, C, h, w), t (B,)) -> eps of the same shape."""


@torch.no_grad()
def vsd_gradient(
    z_sr: Tensor, t: Tensor, eps: Tensor, predict_fake: PredictEps, predict_real: PredictEps
) -> Tensor:
    """(x0_fake - x0_real) / w with w = mean |z_sr - x0_real| of each sample.

    Both estimates start from z_t = alpha_t z_sr + sigma_t eps; fake is the regulariser (the
    distribution the generator makes), real the frozen base (the distribution of photos).
    """
    alpha, sigma = alpha_sigma_of(t)
    z_t = add_noise(z_sr, eps, t)
    x0_fake = one_step(z_t, predict_fake(z_t, t), alpha, sigma)
    x0_real = one_step(z_t, predict_real(z_t, t), alpha, sigma)
    w = (z_sr.float() - x0_real).abs().mean((1, 2, 3), keepdim=True)
    return (x0_fake - x0_real) / w


def vsd_loss(z_sr: Tensor, gradient: Tensor) -> Tensor:
    """A mean squared error, as OSEDiff has it: its gradient with respect to z_sr is twice
    ``gradient`` / number of elements."""
    target = (z_sr - gradient).detach()
    return (z_sr.float() - target.float()).square().mean()


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: eps_u + g (eps_c - eps_u)."""
    return unconditional + guidance * (conditional - unconditional)
