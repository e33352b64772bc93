"""Stage 1: the autoencoder on clean photos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rcod_train.config import VaeStageConfig
from rcod_train.data import Batch, to_unit
from rcod_train.distances import gradient_loss
from rcod_train.loop import Update
from rcod_train.network import Parts
from rcod_train.precision import Autocast


class VaeStage:
    name = "vae"

    def __init__(self, parts: Parts, config: VaeStageConfig, autocast: Autocast) -> None:
        self.vae, self.config, self.autocast = parts.vae, config, autocast
        coders = {"encoder": parts.vae.encoder, "decoder": parts.vae.decoder}
        named = {
            f"{coder}.{name}": parameter
            for coder, module in coders.items()
            for name, parameter in module.named_parameters()
        }
        self.groups = {"vae": [(named, config.learning_rate)]}

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        hq = to_unit(batch.hq)
        with self.autocast():
            z = self.vae.encode(hq)  # (B, C, H/8, W/8); with the skip z would hold little
            decoded = self.vae.decode(z)
        decoded, z = decoded.float(), z.float()
        l1 = (decoded - hq).abs().mean()
        gradient = gradient_loss(decoded, hq)
        moments = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        loss = l1 + self.config.gradient_weight * gradient + self.config.moment_weight * moments
        psnr = -10 * torch.log10((decoded.detach().clamp(-1, 1) - hq).square().mean() / 4)
        figures = {"l1": l1.detach(), "gradient": gradient.detach(), "moments": moments.detach()}
        yield Update("vae", loss, figures | {"psnr_db": psnr})

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass
