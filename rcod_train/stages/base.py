"""Stage 2: the base denoiser, a plain latent diffusion model with visual tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rcod_train.config import BaseStageConfig
from rcod_train.data import Batch, to_unit
from rcod_train.loop import Update
from rcod_train.network import Parts, predict_eps
from rcod_train.precision import Autocast
from rcod_train.schedule import TIMESTEPS, add_noise, noise_like


@torch.no_grad()
def measure_scaling_factor(parts: Parts, batches: list[Batch]) -> float:
    """1 / standard deviation of the unscaled latents, Stable Diffusion's scaling factor."""
    z = torch.cat([parts.vae.encoder(to_unit(batch.hq)) for batch in batches])
    return 1.0 / float(z.std())


def eps_loss(
    parts: Parts, z_0: Tensor, tokens: Tensor, generator: torch.Generator, autocast: Autocast
) -> Tensor:
    """The denoising loss E |eps - eps_theta(alpha_t z_0 + sigma_t eps; t, c)|^2, t ~ U[0, 1000)."""
    t = torch.randint(0, TIMESTEPS, (z_0.shape[0],), generator=generator).to(z_0.device)
    eps = noise_like(z_0, generator)
    z_t = add_noise(z_0, eps, t)
    with autocast():
        predicted = predict_eps(parts.unet, z_t, t, tokens)
    return (predicted.float() - eps).square().mean()


class BaseStage:
    name = "base"

    def __init__(self, parts: Parts, config: BaseStageConfig, autocast: Autocast) -> None:
        self.parts, self.config, self.autocast = parts, config, autocast
        named = {f"unet.{k}": p for k, p in parts.unet.named_parameters()}
        named |= {f"vpim.{k}": p for k, p in parts.vpim.named_parameters()}
        self.groups = {"base": [(named, config.learning_rate)]}

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        with torch.no_grad(), self.autocast():
            z_hq = self.parts.vae.encode(to_unit(batch.hq)).float()  # (B, C, h, w)
        with self.autocast():
            tokens = self.parts.vpim(to_unit(batch.tokens_hq))  # (B, N, D)
        keep = torch.rand(len(z_hq), 1, 1, generator=generator) >= self.config.drop_tokens
        tokens = tokens * keep.to(tokens.device)
        loss = eps_loss(self.parts, z_hq, tokens, generator, self.autocast)
        yield Update("base", loss, {})

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass
