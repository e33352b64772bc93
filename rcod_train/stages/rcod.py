"""The paper's method on nano's base or Stable Diffusion: LoRA, LDG, one step, VSD with DAS, VPIM.

nano has an adversarial loss beside VSD: its base is too small to teach fine texture. rcod-s has one
in the place of VSD, as S3Diff has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rcod_train.adapted import Adapted, GuidedModel, LoraModel
from rcod_train.adapters import SwitchedUnet
from rcod_train.conditions import Condition, HqTokens, TextEmbeddings
from rcod_train.config import RcodStageConfig
from rcod_train.consistent import match_consistently
from rcod_train.data import Batch, to_unit
from rcod_train.distances import gradient_loss, ssim_loss
from rcod_train.errors import CheckpointError, TrainError
from rcod_train.fingerprint import fingerprint
from rcod_train.grouping import (
    METRICS,
    Grouping,
    sample_levels,
    sample_official_t,
    sample_regulariser_t,
    sample_uniform_t,
)
from rcod_train.loop import Update
from rcod_train.models.discriminator import (
    BackboneDiscriminator,
    Discriminator,
    adversarial_loss,
    feature_loss,
    hinge_loss,
)
from rcod_train.network import Parts, denoise, predict_eps
from rcod_train.precision import Autocast
from rcod_train.schedule import (
    OFFICIAL_ALPHA_BAR,
    OFFICIAL_ALPHA_BAR_S,
    alpha_sigma_of,
    noise_like,
)
from rcod_train.stages.base import eps_loss
from rcod_train.vsd import guided, vsd_gradient, vsd_loss

Perceptual = Callable[[Tensor, Tensor], Tensor]  # of two images (B, 3, H, W): (B,)


def measure_metric_range(
    parts: Parts, batches: Iterator[Batch], config: RcodStageConfig, autocast: Autocast
) -> tuple[float, float]:
    """M_min and M_max of Eq. 5: the quantile and its mirror of M over the training data.

    Quantiles in the place of the extremes: one odd crop (a black one, say) must not decide how wide
    the groups are. M comes from the encoder as it is before this stage, here and in the training,
    so that the statistics hold to its end.
    """
    values: list[Tensor] = []
    with torch.no_grad(), autocast():
        while sum(map(len, values)) < config.metric_samples:
            batch = next(batches)
            z_lq, z_hq = (parts.vae.encode(to_unit(x)) for x in (batch.lq, batch.hq))
            values.append(METRICS[config.metric](z_lq, z_hq).cpu())
    m = torch.cat(values)
    quantile = config.metric_quantile
    low, high = torch.quantile(m, torch.tensor([quantile, 1.0 - quantile])).tolist()
    if not low < high:
        raise TrainError(
            f"the metric M is {low:.4f} for every training sample: is the autoencoder trained?"
        )
    if low < -1.0:  # of distances alone: 1 - |z_lq - z_hq| has no lower end
        raise TrainError(
            f"the metric M ({config.metric}): expected -1 to 1 in the training data, found "
            f"{low:.4f} to {high:.4f}. Train with --set rcod.metric=cosine."
        )
    return low, high


def base_weights(parts: Parts) -> Iterator[Tensor]:
    """Of the base model, and of the degradation estimator where there is one; not what is added to
    them here, which is drawn from the seed."""
    modules = [parts.vae, parts.unet, parts.vpim]
    if parts.guide is not None:
        modules.append(parts.guide.estimator)
    for module in modules:
        yield from (w for name, w in module.state_dict().items() if "lora_" not in name)


def frozen_weights(discriminator: Discriminator | BackboneDiscriminator | None) -> Iterator[Tensor]:
    """Of the vision model that a discriminator looks through, if it does."""
    if isinstance(discriminator, BackboneDiscriminator):
        yield from discriminator.backbone.state_dict().values()


@dataclass(frozen=True)
class Reconstruction:
    """One pass of the generator: t (B,), z_sr, sr and hq in [-1, 1], weighted losses, figures."""

    t: Tensor
    z_sr: Tensor
    sr: Tensor
    hq: Tensor
    terms: dict[str, Tensor]
    figures: dict[str, Tensor | float]

    def update(self) -> Update:
        """The generator's, of the sum of all terms; the log shows each."""
        shown = self.figures | {name: term.detach() for name, term in self.terms.items()}
        return Update("generator", torch.stack(list(self.terms.values())).sum(), shown)


class RcodStage:
    name = "rcod"

    def __init__(
        self,
        parts: Parts,
        config: RcodStageConfig,
        grouping: Grouping,
        autocast: Autocast,
        perceptual: Perceptual | None = None,
        condition: Condition | None = None,
        discriminator: Discriminator | BackboneDiscriminator | None = None,
    ) -> None:
        self.parts, self.config, self.autocast = parts, config, autocast
        self.grouping, self.perceptual = grouping, perceptual
        official = OFFICIAL_ALPHA_BAR if parts.guide is None else OFFICIAL_ALPHA_BAR_S
        self.fixed_alpha_bar = official if config.constants == "official" else None
        # None: not compared on a resume
        self.base_fingerprint: str | None = fingerprint(base_weights(parts))
        self.model: Adapted = (
            LoraModel(parts, config, autocast) if parts.guide is None else GuidedModel(parts)
        )
        if config.gradient_checkpointing:
            for network in (parts.unet, parts.vae):
                if network._supports_gradient_checkpointing:  # nano's small autoencoder has no need
                    network.enable_gradient_checkpointing()
        parts.vpim.requires_grad_(False)
        self.condition = HqTokens(parts.vpim) if condition is None else condition
        parts.vpim.align.requires_grad_(config.vpim and config.train_adapters)
        if not config.train_adapters:
            for parameter in self.model.parameters().values():
                parameter.requires_grad_(False)
        if not config.vpim:
            for parameter in parts.vpim.align.parameters():
                torch.nn.init.zeros_(parameter)
        self.discriminator = None
        if config.adversarial_weight:
            self.discriminator = (discriminator or Discriminator()).to(autocast.device)
        # Once: a checkpoint is written often, and a backbone may have a billion values.
        self.backbone_fingerprint = fingerprint(frozen_weights(self.discriminator))
        texts = condition.first_texts() if isinstance(condition, TextEmbeddings) else ()
        self.text_fingerprint = fingerprint(texts)
        members = self.generator_members(config.learning_rate, config.decoder_learning_rate)
        self.groups = {"generator": members}
        if config.vsd_weight:
            named = self.lora_unet().parameters_of("regulariser")
            self.groups["regulariser"] = [(named, config.regulariser_learning_rate)]
        if self.discriminator is not None:
            named = self.discriminator.trained_parameters()
            self.groups["discriminator"] = [(named, config.discriminator_learning_rate)]

    def generator_members(
        self, learning_rate: float, decoder_learning_rate: float
    ) -> list[tuple[dict[str, Parameter], float]]:
        """The generator's trained parameters by name, with their learning rates."""
        named = self.model.parameters()
        if self.config.vpim:
            align = self.parts.vpim.align
            named |= {f"vpim.align.{n}": p for n, p in align.named_parameters()}
        named = {n: p for n, p in named.items() if p.requires_grad}
        decoder = self.model.decoder_parameters()
        members = ((named, learning_rate), (decoder, decoder_learning_rate))
        return [member for member in members if member[0]]

    def trained(self) -> Iterator[Parameter]:
        """The generator's trained parameters."""
        for named, _ in self.groups["generator"]:
            yield from named.values()

    def lora_unet(self) -> SwitchedUnet:
        """The U-Net whose base and regulariser give the VSD gradient."""
        assert isinstance(self.model, LoraModel), "VSD needs LoRA adapters that can be switched"
        return self.model.unet

    def metric_and_latent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """M (B,) of Eq. 6 and z_hq (B, C, h, w), without gradients.

        Both latents come from the encoder without its LoRA, which M_min and M_max were measured
        with; for the published code's bins from the encoder as it is trained, as there.
        """
        official = self.config.grouping == "official"
        encoder = nullcontext() if official else self.model.base_encoder()
        with torch.no_grad(), encoder, self.autocast():
            if official:
                self.model.adapt(batch)
            z_hq = self.parts.vae.encode(to_unit(batch.hq)).float()
            z_lq = self.parts.vae.encode(to_unit(batch.lq)).float()
        return METRICS[self.config.metric](z_lq, z_hq), z_hq

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The constants of Eq. 3 for t (B,)."""
        if self.fixed_alpha_bar is None:
            return alpha_sigma_of(t)
        return self.fixed_alpha_bar**0.5, (1.0 - self.fixed_alpha_bar) ** 0.5

    def generate(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """lq -> z_sr (B, C, h, w) and sr (B, 3, H, W): encoder, one U-Net pass, Eq. 3, decoder, and
        the colour match where the losses look at its result."""
        self.model.adapt(batch)
        unet = self.parts.unet
        with self.autocast():
            z_lq = self.parts.vae.encode_with_skip(to_unit(batch.lq))
            tokens = self.parts.vpim(to_unit(batch.tokens_lq))
            z_sr = denoise(unet, z_lq, t, tokens, *self.alpha_sigma(t))
            sr = self.parts.vae.decode(z_sr).float()
        if self.config.consistent:
            assert batch.lq_native is not None, "a batch that was degraded"
            sr = match_consistently(sr, batch.lq_native)
        return z_sr[:, : unet.config.in_channels], sr

    def regulariser_t(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """DAS: the regulariser's timestep (B,) for the generator's t (B,)."""
        if self.config.das == "official":
            return sample_official_t(t, generator)
        if self.config.das == "uniform":
            return sample_uniform_t(t, generator)
        return sample_regulariser_t(t, self.grouping.k, generator)

    def regulariser_direction(
        self,
        z_sr: Tensor,
        t: Tensor,
        condition: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """The VSD gradient; the base is guided away from the negative condition."""
        t_r = self.regulariser_t(t, generator)
        eps = noise_like(z_sr, generator)
        tokens, negative = condition
        lora = self.lora_unet()

        def fake(z_t: Tensor, t_: Tensor) -> Tensor:
            with lora.use("regulariser") as unet, self.autocast():
                return predict_eps(unet, z_t, t_, tokens)

        def real(z_t: Tensor, t_: Tensor) -> Tensor:
            if self.config.guidance == 1.0:
                with lora.use("base") as unet, self.autocast():
                    return predict_eps(unet, z_t, t_, tokens)
            both = torch.cat([tokens, negative])
            with lora.use("base") as unet, self.autocast():
                eps_both = predict_eps(unet, z_t.repeat(2, 1, 1, 1), t_.repeat(2), both)
            return guided(*eps_both.float().chunk(2), self.config.guidance)

        return vsd_gradient(z_sr.detach(), t_r, eps, fake, real)

    def fidelity_terms(
        self, z_sr: Tensor, sr: Tensor, z_hq: Tensor | None, hq: Tensor
    ) -> dict[str, Tensor]:
        """The weighted distances to the photo that have a weight; that of latents needs z_hq."""
        c = self.config
        terms: dict[str, Tensor] = {}
        if c.l1_weight:
            terms["l1"] = c.l1_weight * (sr - hq).abs().mean()
        if c.mse_weight:
            terms["mse"] = c.mse_weight * (sr - hq).square().mean()
        if c.gradient_weight:
            terms["gradient"] = c.gradient_weight * gradient_loss(sr, hq)
        if c.ssim_weight:
            terms["ssim"] = c.ssim_weight * ssim_loss(sr, hq)
        if c.latent_weight and z_hq is not None:
            terms["latent"] = c.latent_weight * (z_sr - z_hq).square().mean()
        return terms

    def realism_terms(self, sr: Tensor, hq: Tensor, t: Tensor) -> dict[str, Tensor]:
        """-D(sr) and the distance of D's features, each sample by its level's share of the weight:
        more realism, less fidelity."""
        assert self.discriminator is not None
        c = self.config
        trained = self.discriminator.trained_parameters().values()
        for parameter in trained:
            parameter.requires_grad_(False)
        with self.autocast():
            fake = self.discriminator(sr)
            real = self.discriminator(hq) if c.feature_weight else []
        for parameter in trained:
            parameter.requires_grad_(True)
        share = self.share(t, c.realism_power)
        terms = {"adversarial": c.adversarial_weight * (adversarial_loss(fake) * share).mean()}
        if c.feature_weight:
            terms["feature"] = c.feature_weight * (feature_loss(real, fake) * share).mean()
        return terms

    def share(self, t: Tensor, power: float) -> Tensor:
        """What t (B,) has of a weight that belongs to the last level."""
        return (t / self.grouping.timesteps[-1]) ** power

    def perceptual_distance(
        self, sr: Tensor, hq: Tensor, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        """LPIPS of one window of the crops, each sample by its level's share."""
        assert self.perceptual is not None
        c, (height, width) = self.config, sr.shape[-2:]
        side = min(c.lpips_crop_px, height, width)
        if side:
            y, x = (
                int(torch.randint(size - side + 1, (), generator=generator))
                for size in (height, width)
            )
            sr, hq = (image[..., y : y + side, x : x + side] for image in (sr, hq))
        with self.autocast():
            distance = self.perceptual(sr, hq)
        return (distance * self.share(t, c.lpips_power)).mean()

    def reconstruct(self, batch: Batch, generator: torch.Generator) -> Reconstruction:
        """A level for each sample and what the model makes of it there."""
        c, levels = self.config, self.grouping.timesteps
        t = torch.full((len(batch.hq),), levels[0], device=batch.hq.device)
        z_hq, figures = None, {}
        if c.any_level < 1 or c.latent_weight:  # two passes of the encoder
            m, z_hq = self.metric_and_latent(batch)
            t, figures = self.grouping.timestep(m), {"m": m.mean()}
        t = sample_levels(t, levels, c.any_level, generator)
        hq = to_unit(batch.hq)
        z_sr, sr = self.generate(batch, t)
        terms = self.fidelity_terms(z_sr, sr, z_hq, hq)
        error = (sr.detach().clamp(-1, 1) - hq).square().mean((1, 2, 3))
        figures["psnr_db"] = (-10 * torch.log10(error / 4)).mean()
        for k, timestep in enumerate(levels):
            figures[f"share_{k}"] = (t == timestep).float().mean()
        return Reconstruction(t, z_sr, sr, hq, terms, figures)

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        c = self.config
        made = self.reconstruct(batch, generator)
        z_sr, sr, hq, terms = made.z_sr, made.sr, made.hq, made.terms
        if self.perceptual is not None:
            terms["lpips"] = c.lpips_weight * self.perceptual_distance(sr, hq, made.t, generator)
        if c.vsd_weight:
            with self.autocast():
                condition = self.condition(batch)
            direction = self.regulariser_direction(z_sr, made.t, condition, generator)
            terms["vsd"] = c.vsd_weight * vsd_loss(z_sr, direction)
        if self.discriminator is not None:
            terms |= self.realism_terms(sr, hq, made.t)
        yield made.update()

        if c.vsd_weight:
            with self.lora_unet().use("regulariser"):
                z = z_sr.detach()
                loss = eps_loss(self.parts, z, condition[0], generator, self.autocast)
                yield Update("regulariser", loss, {})

        if self.discriminator is not None:
            with self.autocast():
                scores = self.discriminator(hq), self.discriminator(sr.detach())
            yield Update("discriminator", hinge_loss(*scores), {})

    def extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "m_min": self.grouping.m_min,
            "m_max": self.grouping.m_max,
            "base_weights": self.base_fingerprint,
            "lpips": self.perceptual is not None,
            "backbone": self.backbone_fingerprint,
            "text": self.text_fingerprint,
        }
        if self.discriminator is not None:  # the vectors of the spectral norm
            state["discriminator_buffers"] = dict(self.discriminator.named_buffers())
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        theirs, ours = state.get("base_weights"), self.base_fingerprint
        if theirs is not None and ours is not None and theirs != ours:
            raise CheckpointError(
                "the run to resume was trained on another base model or another --estimator. "
                "Use those and its --precision, or another --out."
            )
        if state.get("backbone", self.backbone_fingerprint) != self.backbone_fingerprint:
            raise CheckpointError(
                "the run to resume was trained against a discriminator that looks through another "
                "--backbone. Give the same one, or another --out."
            )
        if state.get("text", self.text_fingerprint) != self.text_fingerprint:
            raise CheckpointError(
                "the run to resume was conditioned on other texts. Give the same --text, or "
                "another --out."
            )
        here = self.perceptual is not None
        if state.get("lpips", here) != here:
            there, now = ("without", "with") if here else ("with", "without")
            raise CheckpointError(
                f"the run to resume was trained {there} the LPIPS loss, this one would go on {now} "
                "it. Give the same --lpips or --no-lpips, or another --out."
            )
        if self.discriminator is not None:
            for name, buffer in self.discriminator.named_buffers():
                buffer.copy_(state["discriminator_buffers"][name])
        self.grouping = dataclasses.replace(
            self.grouping, m_min=state["m_min"], m_max=state["m_max"]
        )

    def merge(self) -> Parts:
        """The generator with its LoRA merged, if it has one: what ships."""
        self.model.merge()
        return self.parts


class RefineStage(RcodStage):
    """The same from merged weights: see ``RefineStageConfig``."""

    name = "refine"
