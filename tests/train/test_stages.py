"""The RCOD stage at a tiny geometry: which update moves what."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import rcod_train.run
from rcod_train.config import RcodOConfig, RcodStageConfig, RegressionStageConfig
from rcod_train.data import Batch, to_unit
from rcod_train.distances import ssim_loss
from rcod_train.errors import CheckpointError, TrainError
from rcod_train.grouping import Grouping, l1_metric
from rcod_train.models.discriminator import adversarial_loss, feature_loss, hinge_loss
from rcod_train.network import Parts
from rcod_train.precision import Autocast
from rcod_train.run import Run
from rcod_train.stages.base import measure_scaling_factor
from rcod_train.stages.rcod import RcodStage, Reconstruction, measure_metric_range
from rcod_train.stages.regression import RegressionStage
from tests.faults import full_disk
from tests.tiny import tiny_parts

CONFIG = RcodStageConfig(rank_unet=2, rank_vae=2, rank_regulariser=2)
FP32 = Autocast("fp32")


def stage(config: RcodStageConfig = CONFIG) -> RcodStage:
    return RcodStage(tiny_parts(), config, Grouping(0.2, 0.9), FP32)


@pytest.mark.parametrize("network", ["vae", "unet", "vpim"])
def test_a_base_that_differs_in_one_weight_is_another_one(network: str) -> None:
    state, same, other = stage().extra_state(), tiny_parts(), tiny_parts()
    RcodStage(same, CONFIG, Grouping(0.2, 0.9), FP32).load_extra_state(state)
    with torch.no_grad():
        list(getattr(other, network).parameters())[-1][-1] += 1e-3
    rcod = RcodStage(other, CONFIG, Grouping(0.2, 0.9), FP32)
    with pytest.raises(CheckpointError, match="trained on another base model"):
        rcod.load_extra_state(state)


def test_lpips_counts_by_the_level_and_sees_one_window_of_both_images() -> None:
    seen = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((a, b))
        return torch.ones(len(a))

    config = dataclasses.replace(CONFIG, lpips_power=2.0, lpips_crop_px=16)
    rcod = RcodStage(tiny_parts(), config, Grouping(0.2, 0.9), FP32, distance)
    image = torch.arange(3 * 64 * 64.0).view(1, 3, 64, 64).repeat(2, 1, 1, 1)
    t = torch.tensor([250, 750])
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        found = rcod.perceptual_distance(image, image, t, generator)
        assert float(found) == pytest.approx((1 / 9 + 1) / 2)
    assert all(a.shape == (2, 3, 16, 16) and torch.equal(a, b) for a, b in seen)
    assert not torch.equal(seen[0][0], seen[1][0])  # another window each time
    rcod = RcodStage(tiny_parts(), CONFIG, Grouping(0.2, 0.9), FP32, distance)  # the paper's
    assert float(rcod.perceptual_distance(image, image, t, generator)) == 1.0
    assert torch.equal(seen[-1][0], image)


def test_a_run_with_lpips_is_not_continued_without_it() -> None:
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3))

    without = stage()
    with_lpips = RcodStage(tiny_parts(), CONFIG, Grouping(0.2, 0.9), FP32, distance)
    with_lpips.load_extra_state(with_lpips.extra_state())
    words = "trained with the LPIPS loss, this one would go on without it.*--no-lpips"
    with pytest.raises(CheckpointError, match=words):
        without.load_extra_state(with_lpips.extra_state())
    state = without.extra_state()
    with pytest.raises(CheckpointError, match="trained without the LPIPS loss, .* with it"):
        with_lpips.load_extra_state(state)
    del state["lpips"]  # an older checkpoint doesn't say
    with_lpips.load_extra_state(state)


def batch(seed: int = 0) -> Batch:
    torch.manual_seed(seed)

    def image(side: int) -> torch.Tensor:
        return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)

    return Batch(image(64), image(64), image(32), image(32), torch.tensor([0, 1]))


def test_each_update_reaches_the_parameters_of_its_own_group() -> None:
    rcod = stage()
    seen = []
    for update in rcod.updates(batch(), torch.Generator().manual_seed(0)):
        for members in rcod.groups.values():
            for named, _ in members:
                for parameter in named.values():
                    parameter.grad = None
        update.loss.backward()
        touched = {
            group
            for group, members in rcod.groups.items()
            for named, _ in members
            if any(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())
        }
        assert touched == {update.group}
        seen.append(update.group)
    assert seen == ["generator", "regulariser", "discriminator"]


def test_no_parameter_is_in_two_groups_and_the_base_is_in_none() -> None:
    rcod = stage()
    ids = [id(p) for m in rcod.groups.values() for named, _ in m for p in named.values()]
    assert len(ids) == len(set(ids))
    frozen = [
        p for n, p in rcod.parts.unet.named_parameters() if "lora" not in n and "conv_in" not in n
    ]
    assert frozen and not {id(p) for p in frozen} & set(ids)
    assert not {id(p) for p in rcod.parts.vpim.encoder.parameters()} & set(ids)


def test_without_vsd_and_adversary_only_the_generator_is_trained() -> None:
    rcod = stage(dataclasses.replace(CONFIG, vsd_weight=0.0, adversarial_weight=0.0))
    updates = list(rcod.updates(batch(), torch.Generator()))
    assert [u.group for u in updates] == ["generator"]
    assert not {"vsd", "adversarial"} & updates[0].figures.keys()


def test_a_distance_is_a_term_where_it_has_a_weight() -> None:
    weights = {"l1_weight": 0.0, "gradient_weight": 2.0, "ssim_weight": 0.5, "latent_weight": 0.0}
    rcod = stage(dataclasses.replace(CONFIG, **weights))
    sr, hq = torch.rand(2, 1, 3, 64, 64)
    terms = rcod.fidelity_terms(torch.zeros(1), sr, torch.zeros(1), hq)
    assert terms.keys() == {"gradient", "ssim"}
    assert terms["ssim"] == 0.5 * ssim_loss(sr, hq) > 0.1


def test_m_is_not_measured_where_no_level_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, any_level=1.0, latent_weight=0.0)

    def made(**changes: float) -> Reconstruction:
        rcod = stage(dataclasses.replace(config, **changes))
        return rcod.reconstruct(batch(), torch.Generator().manual_seed(3))

    measured = made(latent_weight=1.0)
    assert "m" in measured.figures and "m" in made(any_level=0.5).figures
    monkeypatch.delattr(RcodStage, "metric_and_latent")
    found = made()
    assert "m" not in found.figures and "latent" not in found.terms
    assert found.t.tolist() == measured.t.tolist()
    assert torch.equal(found.sr, measured.sr)


def test_the_realism_terms_grow_with_the_level() -> None:
    rcod = stage()
    assert rcod.discriminator is not None
    sr, hq = torch.rand(2, 1, 3, 64, 64)
    rcod.discriminator.eval()  # holds the spectral norm still
    terms = [rcod.realism_terms(sr, hq, torch.tensor([t])) for t in (250, 500, 750)]
    for name in ("adversarial", "feature"):
        low, middle, last = (term[name].item() for term in terms)
        assert last != 0
        power = CONFIG.realism_power
        assert [low, middle] == pytest.approx([last * (i / 3) ** power for i in (1, 2)])
    assert not rcod.realism_terms(hq, hq, torch.tensor([750]))["feature"]
    assert all(p.requires_grad for p in rcod.discriminator.parameters())


def test_without_vpim_the_tokens_are_zeros_and_stay_so() -> None:
    rcod = stage(dataclasses.replace(CONFIG, vpim=False))
    assert not rcod.parts.vpim(torch.rand(2, 3, 32, 32)).any()
    assert not [name for name in rcod.groups["generator"][0][0] if "vpim" in name]
    assert stage().parts.vpim(torch.rand(2, 3, 32, 32)).any()


def test_l1_in_the_place_of_the_cosine_is_larger_for_what_is_nearer() -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.tensor([0.25, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert l1_metric(a, b).tolist() == [0.75, 0.0]
    rcod = stage(dataclasses.replace(CONFIG, metric="l1"))
    m, z_hq = rcod.metric_and_latent(batch())
    with torch.no_grad(), rcod.model.base_encoder():
        z_lq = rcod.parts.vae.encode(to_unit(batch().lq))
    torch.testing.assert_close(m, l1_metric(z_lq, z_hq))


def test_hinge_and_adversarial_loss_by_hand() -> None:
    """Real 0.5 and 2: (0.5 + 0) / 2; fake -0.5 and 1: (0.5 + 2) / 2; a second scale at 0: 2."""
    features = torch.ones(2, 3, 2, 2)
    real = [[features, torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)], [torch.zeros(2, 1, 1, 1)]]
    fake = [[features, torch.tensor([-0.5, 1.0]).view(2, 1, 1, 1)], [torch.zeros(2, 1, 1, 1)]]
    assert hinge_loss(real, fake).item() == pytest.approx((0.25 + 1.25 + 2.0) / 2)
    assert adversarial_loss(fake).tolist() == pytest.approx([0.25, -0.5])


def test_the_feature_loss_by_hand() -> None:
    """Distances 1 and 3 for the first sample, 0 and 2 for the second; the scores don't count."""
    score = torch.rand(2, 1, 1, 1)
    real = [[torch.zeros(2, 3, 2, 2), score], [torch.zeros(2, 1, 4, 4), score]]
    first = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    second = torch.tensor([-3.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    fake = [[first, score + 1], [second, score - 1]]
    assert feature_loss(real, fake).tolist() == pytest.approx([2.0, 1.0])


def test_the_metric_range_is_a_quantile_and_its_mirror() -> None:
    batches = [batch(seed) for seed in range(8)]
    narrow, wide = (
        dataclasses.replace(CONFIG, metric_samples=16, metric_quantile=q) for q in (0.25, 0.0)
    )
    low, high = measure_metric_range(tiny_parts(), iter(batches), narrow, FP32)
    all_low, all_high = measure_metric_range(tiny_parts(), iter(batches), wide, FP32)
    assert -1 <= all_low < low < high < all_high <= 1
    l1 = dataclasses.replace(wide, metric="l1")
    assert measure_metric_range(tiny_parts(), iter(batches), l1, FP32) != (all_low, all_high)


def test_the_metric_is_measured_again_where_what_it_depends_on_has_changed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = iter((i / 10, 0.9) for i in range(9))
    monkeypatch.setattr(rcod_train.run, "measure_metric_range", lambda *_: next(ranges))
    rcod = dataclasses.replace(CONFIG, crop_px=64, context_px=64)
    moved = shutil.copytree(photos, tmp_path / "moved")
    config = RcodOConfig((str(photos),), str(tmp_path), rcod=rcod)
    parts, other = tiny_parts(), tiny_parts()
    with torch.no_grad():
        next(other.vae.encoder.parameters())[0] += 1e-3

    def m_min(parts: Parts, resume: bool = True, **changes: Any) -> float:
        here = dataclasses.replace(config, **changes)
        return Run(here, (here.rcod,), resume).grouping(parts, here.rcod, 32).m_min

    assert m_min(parts, resume=False) == 0.0
    assert m_min(parts) == m_min(parts, data=(str(moved),)) == 0.0
    assert m_min(other) == 0.1
    assert m_min(parts) == 0.2
    assert m_min(parts, seed=1) == 0.3
    assert m_min(parts, rcod=dataclasses.replace(rcod, mild_share=0.1)) == 0.4
    shutil.copy(moved / "0.png", moved / "1.png")
    assert m_min(parts, data=(str(moved),)) == 0.5


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_is_refused_leaves_the_settings_of_the_one_before(
    resume: bool, photos: Path, tmp_path: Path
) -> None:
    settings = dataclasses.replace(CONFIG, crop_px=64, context_px=64)
    config = RcodOConfig((str(photos),), str(tmp_path / "run"), rcod=settings)
    Run(config, (settings,), False).start()
    before = (tmp_path / "run" / "config.json").read_bytes()
    (tmp_path / "run" / "rcod").mkdir()
    (tmp_path / "run" / "rcod" / "step-0000001.pt").write_bytes(b"of other settings")
    again = Run(dataclasses.replace(config, seed=1), (settings,), resume)
    again.start()
    assert (tmp_path / "run" / "config.json").read_bytes() != before
    with pytest.raises(CheckpointError):
        again.train(stage(settings), lambda first: iter(()))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_the_regression_goes_on_with_the_range_that_it_was_trained_with() -> None:
    there, here = (RegressionStage(stage(), RegressionStageConfig()) for _ in range(2))
    there.rcod.grouping = Grouping(0.3, 0.8)
    here.load_extra_state(there.extra_state())
    assert here.rcod.grouping == there.rcod.grouping


def test_the_regression_is_not_continued_with_other_losses_of_rcod() -> None:
    def regression(**changes: Any) -> RegressionStage:
        return RegressionStage(
            stage(dataclasses.replace(CONFIG, **changes)), RegressionStageConfig()
        )

    state = regression().extra_state()
    with pytest.raises(CheckpointError, match=r"rcod\.l1_weight: 1\.0 there, 2\.0 here"):
        regression(l1_weight=2.0).load_extra_state(state)
    regression(learning_rate=1e-5, adversarial_weight=0.0).load_extra_state(state)  # rcod's alone
    del state["rcod"]  # an older checkpoint doesn't say
    regression(l1_weight=2.0).load_extra_state(state)


def test_the_metric_is_measured_on_as_many_batches_as_its_samples_need(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def measured(parts: Parts, batches: Any, *_: Any) -> tuple[float, float]:
        counted.append(len(list(batches)))
        return 0.1, 0.9

    monkeypatch.setattr(rcod_train.run, "measure_metric_range", measured)
    settings = dataclasses.replace(
        CONFIG, crop_px=64, context_px=64, photos_per_batch=2, crops_per_photo=1, metric_samples=5
    )
    config = RcodOConfig((str(photos),), str(tmp_path), workers=0, rcod=settings)
    Run(config, (settings,), resume=False).grouping(tiny_parts(), settings, 32)
    assert counted == [3]


def test_a_full_disk_is_named_where_the_metric_is_kept(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rcod_train.run, "measure_metric_range", lambda *_: (0.1, 0.9))
    settings = dataclasses.replace(CONFIG, crop_px=64, context_px=64)
    run = Run(RcodOConfig((str(photos),), str(tmp_path), rcod=settings), (settings,), False)
    with (
        pytest.raises(TrainError, match=r"metric\.json: could not be written \(.*--resume"),
        full_disk(tmp_path, 1),
    ):
        run.grouping(tiny_parts(), settings, 32)
    assert not list(tmp_path.iterdir())


def test_distances_beyond_the_range_of_m_are_named_where_they_are_measured() -> None:
    parts = tiny_parts()
    parts.vae.register_to_config(scaling_factor=1e4)
    config = dataclasses.replace(CONFIG, metric="l1", metric_samples=8, metric_quantile=0.0)
    words = r"metric M \(l1\): expected -1 to 1 .* --set rcod\.metric=cosine"
    with pytest.raises(TrainError, match=words):
        measure_metric_range(parts, iter([batch(seed) for seed in range(4)]), config, FP32)


def test_a_metric_that_never_varies_is_an_error() -> None:
    image = torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)
    flat = Batch(image, image, image, image, torch.tensor([0, 1]))
    with pytest.raises(TrainError, match="is the autoencoder trained"):
        few = dataclasses.replace(CONFIG, metric_samples=2)
        measure_metric_range(tiny_parts(), iter([flat]), few, FP32)


def test_the_scaling_factor_makes_unit_variance() -> None:
    parts = tiny_parts()
    batches = [batch(seed) for seed in range(2)]
    factor = measure_scaling_factor(parts, batches)
    parts.vae.register_to_config(scaling_factor=factor)
    with torch.no_grad():
        z = torch.cat([parts.vae.encode(b.hq.float() / 127.5 - 1) for b in batches])
    assert z.std().item() == pytest.approx(1.0, abs=1e-4)
