"""Photos, degradation and batches."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rcod_train.kernels
from benchmarks.picture import draw_picture
from rcod_train.config import NANO, RCOD_O, RCOD_S, SD_MEM, LoopConfig, degradation_shares
from rcod_train.data import PhotoBatches, batches, to_unit
from rcod_train.degradation import PRESETS, StageConfig, degrade, upsample_lq
from rcod_train.errors import ConfigError, DataError
from rcod_train.kernels import (
    BlurConfig,
    _around_one,
    gaussian_like,
    random_blur,
    random_sinc,
    sinc,
)
from rcod_train.photos import find_photos

CONFIG = LoopConfig(steps=4, photos_per_batch=2, crops_per_photo=2, crop_px=64, context_px=96)
SHARES = degradation_shares(0.5)


def dataset(
    photos: Path, seed: int = 0, degradations: dict[str, float] | None = SHARES
) -> PhotoBatches:
    return PhotoBatches(find_photos((str(photos),), 96), CONFIG, seed, 32, degradations)


# -- photos ----------------------------------------------------------------------------------------


def test_small_and_broken_files_are_skipped_counted_and_named(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (95, 200)).save(tmp_path / "small.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    (tmp_path / "notes.txt").write_text("not a photo")
    with caplog.at_level(logging.WARNING):
        found = find_photos((str(photos), str(tmp_path)), 96)
    assert [p.name for p in found] == ["0.png", "1.png", "2.png", "3.png"]
    assert "2 of 6 files skipped" in caplog.text
    assert "small.png" in caplog.text and "broken.jpg" in caplog.text


def test_a_folder_without_usable_photos_is_an_error(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 96 px, found 0 image files"):
        find_photos((str(tmp_path),), 96)
    with pytest.raises(DataError, match="at least 500 px, found 4 image files"):
        find_photos((str(photos),), 500)
    with pytest.raises(DataError, match="expected a folder of photos or a .tar shard, found none"):
        find_photos((str(tmp_path / "none"),), 96)


# -- batches ---------------------------------------------------------------------------------------


def test_a_batch_has_its_shapes_and_its_lq_matches_its_hq(photos: Path) -> None:
    batch = dataset(photos)[0]
    assert batch.hq.shape == batch.lq.shape == (4, 3, 64, 64)
    assert batch.tokens_hq.shape == batch.tokens_lq.shape == (4, 3, 32, 32)
    assert batch.hq.dtype == torch.uint8
    error = (batch.hq.float() - batch.lq.float()).abs().mean((1, 2, 3))
    shuffled = (batch.hq.flip(0).float() - batch.lq.float()).abs().mean((1, 2, 3))
    assert (error > 0.5).all() and error.mean() < shuffled.mean()


def test_without_degradation_lq_is_hq(photos: Path) -> None:
    batch = dataset(photos, degradations=None)[0]
    assert torch.equal(batch.hq, batch.lq) and torch.equal(batch.tokens_hq, batch.tokens_lq)


def test_a_batch_depends_on_seed_and_step_alone(photos: Path) -> None:
    first, again, other = dataset(photos)[3], dataset(photos)[3], dataset(photos, seed=1)[3]
    assert torch.equal(first.lq, again.lq) and torch.equal(first.hq, again.hq)
    assert not torch.equal(first.hq, other.hq)
    assert not torch.equal(first.hq, dataset(photos)[2].hq)


def test_samples_are_turned_by_their_share_and_those_of_rcod_o_and_s_are_not(
    tmp_path: Path,
) -> None:
    ramp = np.arange(128, dtype=np.uint8).reshape(128, 1, 1)  # every row has one value
    Image.fromarray(np.broadcast_to(ramp, (128, 128, 3)).copy()).save(tmp_path / "ramp.png")

    def on_its_side(share: float) -> float:
        config = dataclasses.replace(CONFIG, turned_share=share)
        data = PhotoBatches(find_photos((str(tmp_path),), 96), config, 0, 32, None)
        hq = torch.cat([data[i].hq[::2] for i in range(40)])  # a crop of each sample
        return (hq[..., 0] != hq[..., -1]).flatten(1).any(1).float().mean().item()

    assert on_its_side(0.0) == 0 and on_its_side(1.0) == pytest.approx(0.5, abs=0.15)
    assert {c.turned_share for c in (RCOD_O, RCOD_S, SD_MEM)} == {0.0}
    assert {c.turned_share for c in (NANO, LoopConfig())} == {0.3}


def test_workers_give_the_same_batches_in_order(photos: Path) -> None:
    here = [batch.lq for batch in batches(dataset(photos), range(1, 4), workers=0)]
    there = [batch.lq for batch in batches(dataset(photos), range(1, 4), workers=2)]
    assert len(here) == 3
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_workers_start_after_the_parent_has_degraded_a_photo(tmp_path: Path) -> None:
    """As a validation makes its pairs: OpenCV's threads, which a photo of this size starts in the
    parent, hung every worker."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    code = (
        "import sys\n"
        "from rcod_train.config import LoopConfig\n"
        "from rcod_train.data import PhotoBatches, batches\n"
        "from rcod_train.photos import find_photos\n"
        "config = LoopConfig(photos_per_batch=1, crop_px=512, context_px=512)\n"
        "data = PhotoBatches(find_photos((sys.argv[1],), 512), config, 0, 8, {'s3diff': 1.0})\n"
        "for i in range(4): data[i]\n"
        "print(len(list(batches(data, range(2), workers=1))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "2\n", done.stderr


def test_unit_range() -> None:
    unit = to_unit(torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1))
    assert unit.flatten().tolist() == [-1.0, 1.0]


# -- degradation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return draw_picture(128, 192)


def mean_error(picture: np.ndarray, preset: str) -> float:
    errors = []
    for seed in range(40):
        lq = degrade(picture, PRESETS[preset], np.random.default_rng(seed))
        sr = upsample_lq(lq, picture.shape[:2])
        errors.append(np.square(sr.astype(float) - picture).mean())
    return float(np.mean(errors))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_same_seed_gives_the_same_bytes(picture: np.ndarray, preset: str) -> None:
    first, again, other = (
        degrade(picture, PRESETS[preset], np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (32, 48, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_heavy_preset_is_heavier_and_both_are_more_than_downsampling(
    picture: np.ndarray,
) -> None:
    small = Image.fromarray(picture).resize((48, 32), Image.Resampling.BICUBIC)
    bicubic = upsample_lq(np.asarray(small), picture.shape[:2])
    plain = np.square(bicubic.astype(float) - picture).mean()
    assert plain < mean_error(picture, "s3diff") < mean_error(picture, "osediff")


def test_the_mild_preset_blurs_and_adds_next_to_no_noise(picture: np.ndarray) -> None:
    small = Image.fromarray(picture).resize((48, 32), Image.Resampling.BICUBIC)
    bicubic = upsample_lq(np.asarray(small), picture.shape[:2])
    plain = np.square(bicubic.astype(float) - picture).mean()
    assert plain < mean_error(picture, "mild") < mean_error(picture, "s3diff")
    flat = np.full((128, 128, 3), 120, np.uint8)

    def noise(preset: str) -> float:
        draws = [degrade(flat, PRESETS[preset], np.random.default_rng(s)) for s in range(20)]
        return float(np.mean([np.std(lq) for lq in draws]))

    assert 0 < 3 * noise("mild") < noise("s3diff")


def test_presets_are_drawn_by_their_shares(photos: Path) -> None:
    rng = np.random.default_rng(0)
    data = dataset(photos, degradations=degradation_shares(0.2, 0.5))
    drawn = [data._preset(rng) for _ in range(4000)]
    for preset, share in (("osediff", 0.2), ("mild", 0.5), ("s3diff", 0.3)):
        assert drawn.count(preset) / 4000 == pytest.approx(share, abs=0.03)
    for heavy, mild in ((-0.1, 0.5), (0.6, 0.5), (0.0, 1.1)):
        with pytest.raises(ConfigError, match="heavy_share and mild_share"):
            degradation_shares(heavy, mild)


def test_the_degraded_image_is_not_shifted(picture: np.ndarray) -> None:
    """The mean of many draws lines up best with the photo where it is."""
    draws = [degrade(picture, PRESETS["s3diff"], np.random.default_rng(s)) for s in range(30)]
    mean = np.mean([upsample_lq(lq, (128, 192)).astype(float) for lq in draws], axis=0)
    errors = {
        (dy, dx): np.square(np.roll(mean, (dy, dx), (0, 1)) - picture)[8:-8, 8:-8].mean()
        for dy in (-2, 0, 2)
        for dx in (-2, 0, 2)
    }
    assert min(errors, key=lambda shift: errors[shift]) == (0, 0)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((32, 32), np.uint8), "expected .H, W, 3. uint8"),
        (np.zeros((32, 32, 3), np.float32), "float32"),
        (np.zeros((30, 32, 3), np.uint8), "30 x 32 are not multiples of 4"),
    ],
)
def test_what_it_cannot_degrade_is_named(image: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        degrade(image, PRESETS["osediff"], np.random.default_rng(0))


def test_extreme_photos_pass(picture: np.ndarray) -> None:
    for value in (0, 255):
        flat = np.full((16, 16, 3), value, np.uint8)
        for seed in range(20):
            lq = degrade(flat, PRESETS["osediff"], np.random.default_rng(seed))
            assert lq.shape == (4, 4, 3)


def test_kernels_sum_to_one_and_have_odd_sizes_within_the_limit() -> None:
    rng = np.random.default_rng(0)
    kernels = [random_blur(BlurConfig(21, (0.2, 3.0)), rng) for _ in range(300)]
    kernels += [random_sinc(21, rng) for _ in range(100)]
    for kernel in kernels:
        assert kernel.sum() == pytest.approx(1.0, abs=1e-5)
        assert kernel.shape[0] == kernel.shape[1] <= 21 and kernel.shape[0] % 2
    assert {len(kernel) for kernel in kernels} == set(range(7, 22, 2))


def test_only_sinc_filters_of_a_stage_go_down_to_a_fifth_of_pi(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real-ESRGAN's final one begins at a third of it in all sizes."""
    drawn: list[tuple[int, float]] = []
    monkeypatch.setattr(
        rcod_train.kernels,
        "sinc",
        lambda size, cutoff: (drawn.append((size, cutoff)), sinc(size, cutoff))[1],
    )
    lowest = []
    for final in (False, True):
        drawn.clear()
        for seed in range(400):
            random_sinc(21, np.random.default_rng(seed), final)
        lowest.append(min(cutoff for _, cutoff in drawn) / np.pi)
        assert all(cutoff >= np.pi / 3 for size, cutoff in drawn if size < 13)
    assert lowest[0] == pytest.approx(1 / 5, abs=0.01)
    assert lowest[1] == pytest.approx(1 / 3, abs=0.01)


def test_the_gaussian_by_hand() -> None:
    """Sigma 1 beside the centre: exp(-1/2) of it; sigma 2 across: exp(-1/8)."""
    kernel = gaussian_like(7, 1.0, 2.0, 0.0)
    assert kernel[3, 4] / kernel[3, 3] == pytest.approx(np.exp(-0.5), rel=1e-5)
    assert kernel[4, 3] / kernel[3, 3] == pytest.approx(np.exp(-0.125), rel=1e-5)
    turned = gaussian_like(7, 1.0, 2.0, np.pi / 2)
    np.testing.assert_allclose(turned, kernel.T, atol=1e-7)
    plateau = gaussian_like(7, 1.0, 1.0, 0.0, beta=2.0, plateau=True)
    assert plateau[3, 5] / plateau[3, 3] == pytest.approx(1 / 17, rel=1e-5)


def test_shapes_of_blurs_are_drawn_as_in_real_esrgan() -> None:
    """Half of the draws below 1 and half above; a plateau's are 1 in the place of less."""
    rng = np.random.default_rng(0)
    heavy = np.array([_around_one((0.5, 4.0), rng) for _ in range(1000)])
    assert heavy.min() > 0.5 and heavy.max() < 4 and 450 < (heavy < 1).sum() < 550
    plateaus = np.array([_around_one((1.0, 2.0), rng) for _ in range(1000)])
    assert plateaus.max() < 2 and 450 < (plateaus == 1).sum() < 550


def test_the_sinc_passes_what_is_below_its_cutoff() -> None:
    kernel = sinc(21, np.pi / 3)
    response = np.abs(np.fft.fft2(kernel, (64, 64)))
    assert response[0, 3] == pytest.approx(1.0, abs=0.15) and response[0, 32] < 0.1


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="odd number"):
        BlurConfig(20, (0.2, 3.0))
    first = PRESETS["osediff"].first
    with pytest.raises(ValueError, match="sum to"):
        dataclasses.replace(first, resize_probabilities=(0.5, 0.5, 0.5))
    assert isinstance(first, StageConfig)
