"""Stage 3: the paper's method. LoRA on the base, LDG, one step, VSD with DAS, VPIM.

Beside VSD an adversarial loss, as S3Diff has it: nano's base is too small to teach fine texture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rcod_train.adapters import SwitchedUnet, SwitchedVae
from rcod_train.config import RcodStageConfig
from rcod_train.data import Batch, to_unit
from rcod_train.errors import TrainError
from rcod_train.grouping import Grouping, cosine_metric, sample_levels, sample_regulariser_t
from rcod_train.loop import Update
from rcod_train.models.discriminator import Discriminator, adversarial_loss, hinge_loss
from rcod_train.network import Parts, predict_eps
from rcod_train.precision import Autocast
from rcod_train.schedule import alpha_sigma_of, one_step
from rcod_train.stages.base import eps_loss
from rcod_train.stages.vae import gradient_loss
from rcod_train.vsd import guided, vsd_gradient, vsd_loss

Perceptual = Callable[[Tensor, Tensor], Tensor]


def measure_metric_range(
    parts: Parts, batches: Iterator[Batch], samples: int, quantile: float
) -> tuple[float, float]:
    """M_min and M_max of Eq. 5: the quantile and its mirror of M over the training data.

    Quantiles in the place of the extremes: one odd crop (a black one, say) must not decide how wide
    the groups are. M comes from the encoder as it is before this stage, here and in the training,
    so that the statistics hold to its end.
    """
    values: list[Tensor] = []
    with torch.no_grad():
        while sum(map(len, values)) < samples:
            batch = next(batches)
            z_lq, z_hq = (parts.vae.encode(to_unit(x)) for x in (batch.lq, batch.hq))
            values.append(cosine_metric(z_lq, z_hq))
    m = torch.cat(values)
    low, high = torch.quantile(m, torch.tensor([quantile, 1.0 - quantile])).tolist()
    if not low < high:
        raise TrainError(
            f"the metric M is {low:.4f} for every training sample: is the autoencoder trained?"
        )
    return low, high


class RcodStage:
    name = "rcod"

    def __init__(
        self,
        parts: Parts,
        config: RcodStageConfig,
        grouping: Grouping,
        autocast: Autocast,
        perceptual: Perceptual | None = None,
    ) -> None:
        self.parts, self.config, self.autocast = parts, config, autocast
        self.grouping, self.perceptual = grouping, perceptual
        self.unet = SwitchedUnet(parts.unet, config.rank_unet, config.rank_regulariser)
        self.vae = SwitchedVae(parts.vae, config.rank_vae, config.train_decoder)
        parts.vpim.requires_grad_(False)
        self.base_align = copy.deepcopy(parts.vpim.align)  # regulariser and base keep theirs
        align = parts.vpim.align.requires_grad_(True)
        generator = {f"unet.{n}": p for n, p in self.unet.parameters_of("generator").items()}
        generator |= {f"vae.{n}": p for n, p in self.vae.encoder_parameters().items()}
        generator |= {f"vpim.align.{n}": p for n, p in align.named_parameters()}
        members = [(generator, config.learning_rate)]
        if config.train_decoder:
            decoder = {f"decoder.{n}": p for n, p in self.vae.decoder_parameters().items()}
            members.append((decoder, config.decoder_learning_rate))
        self.discriminator = Discriminator() if config.adversarial_weight else None
        self.groups = {
            "generator": members,
            "regulariser": [
                (self.unet.parameters_of("regulariser"), config.regulariser_learning_rate)
            ],
        }
        if self.discriminator is not None:
            named = dict(self.discriminator.named_parameters())
            self.groups["discriminator"] = [(named, config.discriminator_learning_rate)]

    def metric_and_latent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """M (B,) of Eq. 6 and z_hq (B, C, h, w), both from the encoder without its LoRA."""
        with torch.no_grad(), self.vae.base() as vae, self.autocast():
            z_hq = vae.encode(to_unit(batch.hq)).float()
            z_lq = vae.encode(to_unit(batch.lq)).float()
        return cosine_metric(z_lq, z_hq), z_hq

    def generate(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """lq -> z_sr (B, C, h, w) and sr (B, 3, H, W): encoder, one U-Net pass, Eq. 3, decoder."""
        with self.autocast():
            z_lq = self.parts.vae.encode(to_unit(batch.lq))
            tokens = self.parts.vpim(to_unit(batch.tokens_lq))
            eps = predict_eps(self.parts.unet, z_lq, t, tokens)
        z_sr = one_step(z_lq, eps, *alpha_sigma_of(t))
        with self.autocast():
            sr = self.parts.vae.decode(z_sr)
        return z_sr, sr.float()

    def base_tokens(self, batch: Batch) -> Tensor:
        """Tokens of the HQ image through the base's alignment: the regulariser's condition."""
        with torch.no_grad(), self.autocast():
            return self.base_align(self.parts.vpim.encoder(to_unit(batch.tokens_hq)))

    def regulariser_direction(
        self, z_sr: Tensor, t: Tensor, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The VSD gradient at a timestep of Eq. 7."""
        t_r = sample_regulariser_t(t, self.grouping.k, generator)
        eps = torch.randn(z_sr.shape, generator=generator)

        def fake(z_t: Tensor, t_: Tensor) -> Tensor:
            with self.unet.use("regulariser") as unet, self.autocast():
                return predict_eps(unet, z_t, t_, tokens)

        def real(z_t: Tensor, t_: Tensor) -> Tensor:
            both = torch.cat([tokens, torch.zeros_like(tokens)])
            with self.unet.use("base") as unet, self.autocast():
                eps_both = predict_eps(unet, z_t.repeat(2, 1, 1, 1), t_.repeat(2), both)
            return guided(*eps_both.float().chunk(2), self.config.guidance)

        return vsd_gradient(z_sr.detach(), t_r, eps, fake, real)

    def realism_term(self, sr: Tensor, t: Tensor) -> Tensor:
        """-D(sr), each sample by its share t / nk of the weight: more realism, less fidelity."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        with self.autocast():
            scores = self.discriminator(sr)
        self.discriminator.requires_grad_(True)
        return (adversarial_loss(scores) * t / self.grouping.timesteps[-1]).mean()

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        c = self.config
        m, z_hq = self.metric_and_latent(batch)
        levels = self.grouping.timesteps
        t = sample_levels(self.grouping.timestep(m), levels, c.any_level, generator)
        tokens = self.base_tokens(batch)
        hq = to_unit(batch.hq)

        z_sr, sr = self.generate(batch, t)
        terms = {
            "l1": c.l1_weight * (sr - hq).abs().mean(),
            "gradient": c.gradient_weight * gradient_loss(sr, hq),
            "latent": c.latent_weight * (z_sr - z_hq).square().mean(),
        }
        if self.perceptual is not None:
            terms["lpips"] = c.lpips_weight * self.perceptual(sr, hq).mean()
        if c.vsd_weight:
            direction = self.regulariser_direction(z_sr, t, tokens, generator)
            terms["vsd"] = c.vsd_weight * vsd_loss(z_sr, direction)
        if self.discriminator is not None:
            terms["adversarial"] = c.adversarial_weight * self.realism_term(sr, t)
        figures = {name: term.detach() for name, term in terms.items()}
        error = (sr.detach().clamp(-1, 1) - hq).square().mean((1, 2, 3))
        figures["psnr_db"] = (-10 * torch.log10(error / 4)).mean()
        figures["m"] = m.mean()
        for k, timestep in enumerate(levels):
            figures[f"share_{k}"] = (t == timestep).float().mean()
        yield Update("generator", sum(terms.values(), torch.zeros(())), figures)

        if c.vsd_weight:
            with self.unet.use("regulariser"):
                loss = eps_loss(self.parts, z_sr.detach(), tokens, generator, self.autocast)
                yield Update("regulariser", loss, {})

        if self.discriminator is not None:
            with self.autocast():
                scores = self.discriminator(hq), self.discriminator(sr.detach())
            yield Update("discriminator", hinge_loss(*scores), {})

    def extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"m_min": self.grouping.m_min, "m_max": self.grouping.m_max}
        if self.discriminator is not None:  # the vectors of the spectral norm
            state["discriminator_buffers"] = dict(self.discriminator.named_buffers())
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.discriminator is not None:
            for name, buffer in self.discriminator.named_buffers():
                buffer.copy_(state["discriminator_buffers"][name])
        self.grouping = Grouping(state["m_min"], state["m_max"], self.grouping.n, self.grouping.k)

    def merge(self) -> Parts:
        """The generator with its LoRA merged: what ships."""
        self.unet.merge()
        self.vae.merge()
        return self.parts
