"""``rcod-train rcod-s`` at a tiny Stable Diffusion geometry, from photos to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from rcod_train.bases import load_backbone, load_base
from rcod_train.checkpoint import load_merged
from rcod_train.config import RCOD_S, SD_MEM, RcodSConfig, RcodStageConfig
from rcod_train.data import Batch, to_unit
from rcod_train.errors import CheckpointError, DataError
from rcod_train.grouping import Grouping
from rcod_train.main import main
from rcod_train.models.discriminator import BackboneDiscriminator
from rcod_train.models.guide import DegradationEstimator, GuidedMem
from rcod_train.network import Parts, predict_eps
from rcod_train.precision import Autocast
from rcod_train.rcod_s import add_guide, make_guide, started_mem
from rcod_train.schedule import alpha_sigma
from rcod_train.stages.mem import MemStage
from rcod_train.stages.rcod import RcodStage
from tests.tiny_sd import save_base, tiny_guided_parts

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 16
SETTINGS = [
    f"rcod.steps={STEPS}", "rcod.metric_samples=4", "rcod.accumulate=2", "rcod.warmup_steps=1",
    "rcod.learning_rate=0.001", "rcod.adversarial_weight=0.01", "rcod.checkpoint_steps=8",
    "rcod.ema_decay=0.5", "rcod.rank_unet=4", "rcod.rank_vae=2",
    "rcod.validation_steps=8", "validation_share=0.25",
    "mem.steps=12", "mem.photos_per_batch=1", "mem.warmup_steps=1",
    *(f"{stage}.{field}" for stage in ("rcod", "mem") for field in ("crop_px=64", "context_px=64")),
]  # fmt: skip
CONFIG = dataclasses.replace(RCOD_S, gradient_checkpointing=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an estimator beside Stable Diffusion and CLIP."""
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    torch.manual_seed(1)
    save_file(DegradationEstimator(4, 8, 10).state_dict(), folder / "estimator.safetensors")
    return folder


def arguments(base: Path, photos: Path, out: Path, *extra: str) -> list[str]:
    argv = ["rcod-s", "--base", str(base / "sd"), "--clip", str(base / "clip")]
    argv += ["--estimator", str(base / "estimator.safetensors")]
    argv += ["--data", str(photos), "--out", str(out), "--threads", "1", "--workers", "0"]
    argv += ["--no-lpips", "--device", "cpu", "--precision", "fp32"]
    for setting in SETTINGS:
        argv += ["--set", setting]
    return [*argv, *extra]


@pytest.fixture(scope="module")
def run(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert main(arguments(base, photos, out)) == 0
    return out


def batch(count: int = 2) -> Batch:
    torch.manual_seed(5)

    def image(side: int) -> Tensor:
        return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)

    photo = torch.arange(count)
    return Batch(image(64), image(64), image(28), image(28), photo, image(16))


def stage(config: RcodStageConfig = CONFIG, parts: Parts | None = None) -> RcodStage:
    parts = tiny_guided_parts() if parts is None else parts
    return RcodStage(parts, config, Grouping(0.2, 0.9), Autocast("fp32"))


def gradients(rcod: RcodStage) -> dict[str, Tensor]:
    update = next(rcod.updates(batch(), torch.Generator().manual_seed(2)))
    update.loss.backward()
    named = rcod.groups["generator"][0][0]
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def test_the_loss_falls_and_no_regulariser_is_trained(run: Path) -> None:
    lines = (run / "rcod" / "losses.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [row["step"] for row in log] == list(range(STEPS))
    assert {"mse", "adversarial", "discriminator_loss", "m"} <= log[0].keys()
    assert not {"vsd", "regulariser_loss", "l1", "feature"} & log[0].keys()
    first, last = (np.mean([row["mse"] for row in part]) for part in (log[:4], log[-4:]))
    assert last < 0.9 * first


def test_the_checkpoint_holds_branches_guide_and_the_estimator_as_it_was(
    run: Path, base: Path
) -> None:
    parts, info = load_merged(run / "checkpoint")
    assert info.family == "rcod-s" and isinstance(parts.mem, GuidedMem) and parts.guide is not None
    assert info.training["rcod"]["rank_unet"] == 4 == parts.guide.config.rank_unet
    assert parts.guide.config.rank_vae == 2
    for network in (parts.unet, parts.vae):
        branches = {n: p for n, p in network.named_parameters() if "lora_B" in n}
        # 64 px leave one token in the middle of the U-Net, which attends to itself whatever to_q
        # and to_k are.
        still = [n for n, p in branches.items() if not p.any() and "mid_block" not in n]
        assert branches and not still
    estimator = load_file(base / "estimator.safetensors")
    for name, value in parts.guide.estimator.state_dict().items():
        assert torch.equal(value, estimator[name].half().float()), name
    text = (run / "checkpoint" / "rcod.json").read_text()
    assert str(base) not in text and str(run) not in text


def test_a_stopped_and_resumed_run_ends_bit_for_bit_equal(
    run: Path, base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(base, photos, tmp_path)
    short = [a.replace(f"rcod.steps={STEPS}", "rcod.steps=8") for a in argv]
    assert main(short) == 0
    for leftover in (tmp_path / "mem").iterdir():
        leftover.unlink()
    other = tmp_path / "other.safetensors"
    save_file(DegradationEstimator(4, 8, 10).state_dict(), other)
    assert main([*argv, "--resume", "--estimator", str(other)]) == 9
    assert "another base model or another --estimator" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    for path in sorted((run / "checkpoint").rglob("*.safetensors")):
        resumed = load_file(tmp_path / path.relative_to(run))
        assert all(torch.equal(value, resumed[name]) for name, value in load_file(path).items())


def test_one_pass_is_that_of_plain_networks_with_the_photos_matrices_merged() -> None:
    """W + B M^T A, M being what the guide makes of the photo before it was upsampled."""
    rcod, one = stage(), batch(1)
    parts = rcod.parts
    assert parts.guide is not None and one.lq_native is not None
    with torch.no_grad():
        _, sr = rcod.generate(one, torch.tensor([500]))
        _, of_vae, of_unet = parts.guide(one.lq_native / 255)
        unet = UNet2DConditionModel(**parts.unet.config)
        unet.load_state_dict(merged(parts.unet, of_unet[0]))
        vae = type(parts.vae)(**parts.vae.config)
        vae.load_state_dict(merged(parts.vae, of_vae[0]))
        z_lq = vae.eval().encode(to_unit(one.lq))
        tokens = parts.vpim(to_unit(one.tokens_lq))
        alpha, sigma = alpha_sigma(500)
        eps = predict_eps(unet.eval(), z_lq, torch.tensor([500]), tokens)
        expected = vae.decode((z_lq - sigma * eps) / alpha)
    torch.testing.assert_close(sr, expected, atol=2e-5, rtol=1e-4)


def merged(network: nn.Module, matrices: Tensor) -> dict[str, Tensor]:
    state = {n: p.detach().clone() for n, p in network.state_dict().items() if "lora_" not in n}
    for name, layer in network.named_modules():
        if hasattr(layer, "branch"):
            a, b = layer.lora_A.weight, layer.lora_B.weight
            m = matrices[layer.branch.block]
            product = b.flatten(1) @ m.T @ a.flatten(1)
            state[f"{name}.weight"] += product.view_as(layer.weight)
    return state


def test_every_branch_the_guide_conv_in_and_the_alignment_get_a_gradient() -> None:
    rcod = stage()
    assert list(rcod.groups) == ["generator", "discriminator"]

    def unasked(batch: Batch) -> tuple[Tensor, Tensor]:
        raise AssertionError("a condition is for VSD alone; with CLIP it is not cheap")

    rcod.condition = unasked
    found = gradients(rcod)
    assert found.keys() == rcod.groups["generator"][0][0].keys()
    assert not [name for name in found if "estimator" in name]
    for name in ("unet.conv_in.weight", "vpim.align.weight", "guide.network.unet.fuse.weight"):
        assert found[name].abs().max() > 0
    parts = rcod.parts
    layers = [n for n, _ in [*parts.unet.named_modules(), *parts.vae.named_modules()]]
    branches = [name for name in layers if name.endswith("lora_A")]
    assert len([n for n in found if n.endswith("lora_A.weight")]) == len(branches)


def test_blocks_that_are_computed_again_give_the_same_gradients() -> None:
    """In the backward pass the call that filled the matrices is over."""
    plain = gradients(stage())
    again = gradients(stage(dataclasses.replace(CONFIG, gradient_checkpointing=True)))
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_the_metric_is_that_of_the_base_encoder_and_the_published_one_is_not() -> None:
    rcod = stage()
    m, z_hq = rcod.metric_and_latent(batch())
    with torch.no_grad():
        plain = type(rcod.parts.vae)(**rcod.parts.vae.config)
        state = rcod.parts.vae.state_dict()
        plain.load_state_dict({n: v for n, v in state.items() if "lora_" not in n})
        z_lq = plain.encode(to_unit(batch().lq))
    torch.testing.assert_close(z_hq, plain.encode(to_unit(batch().hq)).detach())
    torch.testing.assert_close(m, torch.cosine_similarity(z_lq.flatten(1), z_hq.flatten(1)))
    official = stage(dataclasses.replace(CONFIG, grouping="official"))
    assert not torch.allclose(official.metric_and_latent(batch())[0], m)


def test_the_published_constants_are_those_of_rcod_s() -> None:
    rcod = stage(dataclasses.replace(CONFIG, constants="official"))
    alpha, sigma = rcod.alpha_sigma(torch.tensor([249, 749]))
    assert alpha == pytest.approx(0.6754**0.5) and sigma == pytest.approx(0.3246**0.5)


def test_the_mem_starts_alive_and_learns_from_the_estimators_features() -> None:
    rcod = stage()
    rcod.parts.mem = started_mem(rcod.parts, Grouping(0.2, 0.9))
    mem = MemStage(rcod, SD_MEM)
    update = next(mem.updates(batch(), torch.Generator()))
    update.loss.backward()
    assert rcod.parts.mem.mlp[0].weight.grad.abs().max() > 0
    assert rcod.parts.mem(torch.rand(2, 16)).tolist() == pytest.approx([0.55, 0.55])


def test_a_discriminator_looks_through_a_frozen_vision_model(base: Path) -> None:
    discriminator = BackboneDiscriminator(*load_backbone(str(base / "clip")), heads=2)
    config = dataclasses.replace(CONFIG, feature_weight=0.1)
    autocast = Autocast("fp32")
    rcod = RcodStage(
        tiny_guided_parts(), config, Grouping(0.2, 0.9), autocast, discriminator=discriminator
    )
    names = rcod.groups["discriminator"][0][0]
    assert names and all(name.startswith("heads.") for name in names)
    before = {n: p.clone() for n, p in discriminator.backbone.named_parameters()}
    updates = rcod.updates(batch(), torch.Generator().manual_seed(1))
    generator = next(updates)
    assert {"adversarial", "feature"} <= generator.figures.keys()
    generator.loss.backward()
    assert all(p.grad is None for p in discriminator.parameters())
    next(updates).loss.backward()
    assert all(p.grad is not None for p in names.values())
    for name, parameter in discriminator.backbone.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_a_run_goes_on_with_the_backbone_that_it_began_with(base: Path) -> None:
    def rcod(change: float) -> RcodStage:
        backbone, *statistics = load_backbone(str(base / "clip"))
        with torch.no_grad():
            next(backbone.parameters()).add_(change)
        seeing = BackboneDiscriminator(backbone, *statistics, heads=2)
        return RcodStage(
            tiny_guided_parts(), CONFIG, Grouping(0.2, 0.9), Autocast("fp32"), discriminator=seeing
        )

    state = rcod(0.0).extra_state()
    rcod(0.0).load_extra_state(state)
    with pytest.raises(CheckpointError, match="through another --backbone"):
        rcod(1e-3).load_extra_state(state)
    state.pop("backbone")  # of a run before it was kept
    rcod(1e-3).load_extra_state(state)


def test_a_backbone_without_hidden_states_is_refused(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match='one "image_size"'):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("setting", ["rcod.vsd_weight=1", "rcod.train_decoder=true"])
def test_what_rcod_s_does_not_have_is_refused(
    setting: str, base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, photos, tmp_path / "out", "--set", setting)) == 2
    assert "ConfigError: rcod-s has no VSD and a frozen decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_branches_count_lora_alpha_over_their_rank(
    base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = load_base(str(base / "sd"), str(base / "clip"))
    rcod = dataclasses.replace(RCOD_S, rank_unet=4, rank_vae=2, lora_alpha=6)
    estimator = load_file(base / "estimator.safetensors")
    add_guide(parts, make_guide(parts, RcodSConfig((), "", rcod=rcod), estimator))
    assert parts.guide is not None and parts.guide.config.lora_alpha == 6
    assert (parts.guide.network.unet.scaling, parts.guide.network.vae.scaling) == (1.5, 3.0)
    argv = arguments(base, photos, tmp_path / "out", "--set", "rcod.lora_alpha=0")
    assert main(argv) == 2
    assert "rcod.lora_alpha: expected at least 1 with rcod-s" in capsys.readouterr().err


def test_a_file_that_is_no_estimator_is_named(
    base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    argv = arguments(base, photos, tmp_path / "out", "--estimator", str(other))
    assert main(argv) == 9
    error = capsys.readouterr().err
    assert "CheckpointError" in error and str(other) in error and "body.0.0.conv1" in error
    assert not (tmp_path / "out").exists(), "settings of a run that never began"
    assert main(arguments(base, photos, tmp_path / "out", "--estimator", "none.pth")) == 9
    assert "none.pth: not found. Expected a degradation estimator" in capsys.readouterr().err
