"""The RCOD stage on Stable Diffusion's classes: one base in three roles against three networks."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

import rcod_train.stages.rcod
from rcod_train.bases import load_base
from rcod_train.config import RCOD_O, RcodStageConfig
from rcod_train.data import Batch
from rcod_train.grouping import Grouping
from rcod_train.models.sd import ClipVpim, SdVae
from rcod_train.network import Parts, freeze, restore_frozen
from rcod_train.precision import DTYPES, Autocast
from rcod_train.stages.rcod import RcodStage
from tests.tiny_sd import save_base, tiny_clip, tiny_unet, tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = dataclasses.replace(RCOD_O, rank_unet=2, rank_vae=2, rank_regulariser=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


def stage(base: Path, config: RcodStageConfig = CONFIG, precision: str = "fp32") -> RcodStage:
    """With adapters that count, as after some training."""
    torch.manual_seed(0)
    parts = load_base(str(base / "sd"), str(base / "clip"), DTYPES[precision])
    freeze(parts, torch.device("cpu"))
    rcod = RcodStage(parts, config, Grouping(0.2, 0.9), Autocast(precision))
    with torch.no_grad():
        for members in rcod.groups.values():
            for named, _ in members:
                for name, parameter in named.items():
                    if "lora_B" in name:
                        parameter.add_(0.05 * torch.randn_like(parameter))
    return rcod


def batch() -> Batch:
    torch.manual_seed(5)

    def image(side: int) -> Tensor:
        return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)

    return Batch(image(64), image(64), image(28), image(28), torch.tensor([0, 1]))


def plain(rcod: RcodStage, role: str) -> UNet2DConditionModel:
    """A network of its own with the role's low-rank products added to its weights."""
    network = UNet2DConditionModel(**rcod.parts.unet.config)
    state = {
        name.replace(".base_layer", ""): value.clone()
        for name, value in rcod.parts.unet.state_dict().items()
        if "lora_" not in name
    }
    conv_in = (
        rcod.model.unet.conv_in_generator if role == "generator" else rcod.model.unet.conv_in_base
    )
    state |= {f"conv_in.{name}": value.clone() for name, value in conv_in.named_parameters()}
    lora = {n: p for n, p in rcod.parts.unet.named_parameters() if f".{role}." in n}
    for name, a in lora.items():
        if "lora_A" in name:
            b = lora[name.replace("lora_A", "lora_B")]
            weight = state[name.split(".lora_A")[0] + ".weight"]
            scale = CONFIG.lora_alpha / len(a)  # as the published adapters
            weight += scale * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    network.load_state_dict(state)
    return network.requires_grad_(False).eval()


def test_the_vsd_direction_is_the_formula_on_three_separate_networks(base: Path) -> None:
    """OSEDiff's formula with diffusers' scheduler: x0 of the regulariser without guidance, x0 of
    the base with guidance 7.5, their difference over mean |z - x0_real|."""
    rcod = stage(base)
    torch.manual_seed(1)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([250, 750])
    tokens, negative = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    with torch.no_grad():
        found = rcod.regulariser_direction(
            z, t, (tokens, negative), torch.Generator().manual_seed(9)
        )
    generator = torch.Generator().manual_seed(9)  # Eq. 7 draws first, then the noise
    u = torch.rand(2, generator=generator, dtype=torch.float64)
    low, high = torch.tensor([20, 500]), torch.tensor([500, 980])
    t_r = low + (u * (high - low + 1)).long()
    eps = torch.randn(z.shape, generator=generator)
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    z_t = scheduler.add_noise(z, eps, t_r)
    alpha_bar = scheduler.alphas_cumprod[t_r].view(-1, 1, 1, 1)

    def x0(eps_: Tensor) -> Tensor:
        return (z_t - (1 - alpha_bar).sqrt() * eps_) / alpha_bar.sqrt()

    real, fake = plain(rcod, "base"), plain(rcod, "regulariser")
    with torch.no_grad():
        x0_fake = x0(fake(z_t, t_r, tokens).sample)
        with_text, without = (real(z_t, t_r, c).sample for c in (tokens, negative))
        x0_real = x0(without + 7.5 * (with_text - without))
    expected = (x0_fake - x0_real) / (z - x0_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert expected.abs().max() > 0.1


def gradients(rcod: RcodStage) -> dict[str, Tensor]:
    """Of every group, as the loop asks for them."""
    found: dict[str, Tensor] = {}
    for update in rcod.updates(batch(), torch.Generator().manual_seed(3)):
        update.loss.backward()
        for named, _ in rcod.groups[update.group]:
            found |= {f"{update.group}.{n}": p.grad.clone() for n, p in named.items()}
    return found


def test_recomputed_blocks_give_the_same_gradients(base: Path) -> None:
    """Other roles run between the generator's forward and backward pass: they must not leak."""
    kept = gradients(stage(base, dataclasses.replace(CONFIG, gradient_checkpointing=False)))
    recomputing = stage(base)
    assert recomputing.parts.unet.is_gradient_checkpointing
    assert recomputing.parts.vae.is_gradient_checkpointing
    found = gradients(recomputing)
    assert found.keys() == kept.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    # At 1x1, in the middle, attention has one key and q and k count for nothing.
    reached = sum(gradient.abs().max() > 0 for gradient in kept.values())
    assert reached > 0.9 * len(kept)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_half_precision_base_trains_fp32_adapters_near_the_fp32_gradients(
    base: Path, precision: str
) -> None:
    expected, rcod = gradients(stage(base)), stage(base, precision=precision)
    trained = {id(p) for m in rcod.groups.values() for named, _ in m for p in named.values()}
    for part in (rcod.parts.unet, rcod.parts.vae, rcod.parts.vpim):
        for name, p in part.named_parameters():
            assert p.dtype == (torch.float32 if id(p) in trained else DTYPES[precision]), name
    found = gradients(rcod)
    whole = torch.cat([value.flatten() for value in found.values()])
    reference = torch.cat([expected[name].flatten() for name in found])
    assert torch.cosine_similarity(whole, reference, dim=0) > 0.95


def test_the_frozen_weights_are_there_once(base: Path) -> None:
    """Generator, regulariser and base together hold one base, two LoRAs and a second conv_in."""
    rcod = stage(base)
    switched = rcod.lora_unet()
    plain_unet = UNet2DConditionModel(**rcod.parts.unet.config)
    count = sum(p.numel() for p in plain_unet.parameters())
    own = sum(
        p.numel()
        for role in ("generator", "regulariser")
        for name, p in switched.parameters_of(role).items()
        if "lora_" in name
    )
    conv_in = sum(p.numel() for p in plain_unet.conv_in.parameters())
    storages = {
        p.data_ptr(): p.numel()
        for module in (
            rcod.parts.unet,
            rcod.model.unet.conv_in_base,
            rcod.model.unet.conv_in_generator,
        )
        for p in module.parameters()
    }
    assert sum(storages.values()) == count + own + conv_in


def test_the_generator_reaches_alignment_conv_in_and_every_lora(base: Path) -> None:
    """The published script leaves the alignment out of its optimiser."""
    rcod = stage(base)
    names = set(rcod.groups["generator"][0][0])
    assert {"vpim.align.weight", "unet.conv_in.weight"} < names
    assert not [n for n in names if "time_emb" in n or "decoder" in n.split(".")[:2]]
    assert {n.split(".")[0] for n in names} == {"unet", "vae", "vpim"}


def test_the_published_metric_follows_the_trained_encoder_and_the_papers_does_not(
    base: Path,
) -> None:
    """And without a gradient: the HQ latent is detached."""
    paper = stage(base)
    m, z_hq = paper.metric_and_latent(batch())
    official = dataclasses.replace(CONFIG, grouping="official")
    m_official, _ = stage(base, official).metric_and_latent(batch())
    assert not torch.equal(m, m_official)
    fresh = copy.deepcopy(paper)
    with torch.no_grad():
        for parameter in fresh.model.vae.encoder_parameters().values():
            parameter.mul_(3.0)
    assert torch.equal(fresh.metric_and_latent(batch())[0], m)
    assert not m.requires_grad and not z_hq.requires_grad


def test_frozen_weights_rounded_for_the_training_do_not_ship(base: Path) -> None:
    """What was trained stays; all else is the base's, bit for bit."""
    rcod = stage(base, precision="bf16")
    whole = load_base(str(base / "sd"), str(base / "clip"))
    with torch.no_grad():
        for parameter in rcod.trained():
            parameter.fill_(0.1)
    restore_frozen(rcod.parts, whole, rcod.trained())
    assert all((parameter == 0.1).all() for parameter in rcod.trained())
    for name in ("vae", "unet", "vpim"):
        found = {
            key.replace(".base_layer", ""): value
            for key, value in getattr(rcod.parts, name).state_dict().items()
        }
        for key, value in getattr(whole, name).state_dict().items():
            trained = key.startswith(("conv_in.", "align.")) and name != "vae"
            assert trained or torch.equal(found[key], value), f"{name}.{key}"
            assert found[key].dtype == torch.float32


def test_fixed_constants_of_eq_3_do_not_depend_on_t(base: Path) -> None:
    rcod = stage(base, dataclasses.replace(CONFIG, constants="official"))
    alpha, sigma = rcod.alpha_sigma(torch.tensor([249, 749]))
    assert alpha == pytest.approx(0.7537**0.5) and sigma == pytest.approx(0.2463**0.5)


@pytest.mark.parametrize("choice", ["paper", "official"])
def test_nothing_is_computed_on_another_device_than_the_networks(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has shapes and no values: an operation on two devices fails there
    as on a GPU. It says nothing of results, speed or memory."""
    monkeypatch.setattr(rcod_train.stages.rcod, "fingerprint", lambda weights: "")
    meta = torch.device("meta")
    vpim = ClipVpim(tiny_clip().config.to_dict(), 24)
    parts = Parts(SdVae.from_config(tiny_vae().config), tiny_unet(), vpim)
    freeze(parts, meta)
    config = dataclasses.replace(
        CONFIG, grouping=choice, das=choice, constants=choice, any_level=0.3, l1_weight=1.0,
        gradient_weight=1.0, latent_weight=1.0, adversarial_weight=1.0,
    )  # fmt: skip
    rcod = RcodStage(parts, config, Grouping(0.2, 0.9), Autocast("fp32"))
    # PEFT leaves adapters alone where one of the layer is on this device already.
    for module in (parts.unet, parts.vae, rcod.lora_unet().conv_in_generator, rcod.discriminator):
        module.to(meta)
    for update in rcod.updates(batch().to(meta), torch.Generator()):
        assert update.loss.device == meta
        assert all(v.device == meta for v in update.figures.values())
        update.loss.backward()
