"""``rcod-train estimator``, and the scores of synthetic degradations that it learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from rcod_train.config import EstimatorStageConfig, LoopConfig, RcodSConfig, degradation_shares
from rcod_train.data import PhotoBatches
from rcod_train.degradation import PRESETS, TYPICAL_BLUR_PX, TYPICAL_NOISE, Strength, degrade
from rcod_train.errors import CheckpointError
from rcod_train.kernels import gaussian_like, sinc
from rcod_train.loop import run_stage
from rcod_train.main import main
from rcod_train.models.guide import DegradationEstimator
from rcod_train.models.sd import ClipVpim, SdVae
from rcod_train.network import Parts
from rcod_train.official.guided import read_estimator
from rcod_train.official.reading import read_state
from rcod_train.photos import find_photos
from rcod_train.precision import Autocast
from rcod_train.rcod_s import add_guide, make_guide
from rcod_train.stages.estimator import EstimatorStage
from tests.tiny_sd import tiny_clip, tiny_unet, tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")


def argv(photos: Path, out: Path, steps: int, *extra: str) -> list[str]:
    settings = [
        f"estimator.steps={steps}", "estimator.crop_px=64", "estimator.context_px=64",
        "estimator.photos_per_batch=4", "estimator.warmup_steps=1", "estimator.learning_rate=0.002",
        "estimator.checkpoint_steps=150", "estimator.ema_decay=0.9",
        "width=8", "features=16", "hidden=16",
    ]  # fmt: skip
    command = ["estimator", "--data", str(photos), "--out", str(out), "--device", "cpu"]
    command += ["--precision", "fp32", "--threads", "1", "--workers", "0", *extra]
    return [*command, *(part for setting in settings for part in ("--set", setting))]


def test_the_blur_of_a_gaussian_is_its_sigma_in_pixels_of_hq() -> None:
    """A sampled Gaussian's sum of squares is 1 / (4 pi sigma^2), a single pixel's 1."""
    strength = Strength()
    strength.add_blur(gaussian_like(21, 2.0, 2.0, 0.0), hq_px=1.0)
    assert strength.blur_px2 == pytest.approx(4 - 1 / (4 * np.pi), rel=1e-3)
    strength.add_blur(gaussian_like(21, 1.0, 1.0, 0.0), hq_px=3.0)
    assert strength.blur_px2 == pytest.approx(4 + 9 - 10 / (4 * np.pi), rel=1e-3)
    strength = Strength()
    strength.add_blur(np.ones((1, 1), np.float32), hq_px=1.0)
    assert strength.blur_px2 == 0
    strength.add_blur(sinc(21, np.pi / 3), hq_px=1.0)  # a low-pass has less energy: it blurs
    assert strength.blur_px2 > 0.3


def test_scores_are_one_half_at_what_is_typical_and_grow() -> None:
    blur, noise = Strength(TYPICAL_BLUR_PX**2, TYPICAL_NOISE**2).scores()
    assert (blur, noise) == pytest.approx((0.5, 0.5))
    assert Strength().scores() == (0, 0)
    assert Strength(100.0, 0.0).scores()[0] > Strength(10.0, 0.0).scores()[0]


def test_the_noise_is_what_was_added(photos: Path) -> None:
    """One stage of Gaussian noise alone, of sigma 20."""
    quiet = dataclasses.replace(
        PRESETS["s3diff"].second, blur=dataclasses.replace(PRESETS["s3diff"].second.blur,
        probability=0.0), resize_probabilities=(0, 0, 1), gaussian_probability=1.0,
        gaussian_sigma=(0.0, 0.0), grey_probability=0.0, jpeg_quality=(100, 100),
    )  # fmt: skip
    loud = dataclasses.replace(quiet, gaussian_sigma=(20.0, 20.0))
    config = dataclasses.replace(PRESETS["s3diff"], first=loud, second=quiet)
    strength = Strength()
    grey = np.full((128, 128, 3), 128, np.uint8)
    degrade(grey, config, np.random.default_rng(0), strength=strength)
    assert strength.blur_px2 == 0
    assert strength.noise_variance**0.5 * 255 == pytest.approx(20, rel=0.02)


def test_taking_the_strength_changes_no_pixel(photos: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for preset in PRESETS.values():
        plain = degrade(picture, preset, np.random.default_rng(2))
        taken = degrade(picture, preset, np.random.default_rng(2), strength=Strength())
        assert np.array_equal(plain, taken)


def test_a_batch_has_the_scores_of_its_photos_and_the_lq_before_upsampling(photos: Path) -> None:
    config = LoopConfig(photos_per_batch=2, crops_per_photo=2, crop_px=64, context_px=96)
    batch = PhotoBatches(find_photos((str(photos),), 96), config, 0, 8, degradation_shares(0.5))[3]
    assert batch.lq_native is not None and batch.scores is not None
    assert batch.lq_native.shape == (4, 3, 16, 16) and batch.scores.shape == (4, 2)
    assert torch.equal(batch.scores[0], batch.scores[1])
    assert not torch.equal(batch.scores[1], batch.scores[2])
    assert ((batch.scores > 0) & (batch.scores < 1)).all()
    # The upsampled crop at the middle of every 4 x 4 block is near the pixel it was made of.
    middle = batch.lq[:, :, 1::4, 1::4].float()[..., 2:-2, 2:-2]
    native = batch.lq_native.float()[..., 2:-2, 2:-2]
    assert (middle - native).abs().mean() < 0.5 * native.std()
    clean = PhotoBatches(find_photos((str(photos),), 96), config, 0, 8, None)[3]
    assert clean.lq_native is None and clean.scores is None


def test_the_estimator_learns_the_scores_of_one_batch_by_heart(
    photos: Path, tmp_path: Path
) -> None:
    loop = LoopConfig(photos_per_batch=8, crops_per_photo=1, crop_px=64, context_px=64)
    batch = PhotoBatches(find_photos((str(photos),), 64), loop, 99, 8, degradation_shares(0.5))[0]
    config = EstimatorStageConfig(
        steps=200, learning_rate=0.003, warmup_steps=1, ema_decay=0.5, checkpoint_steps=200
    )
    torch.manual_seed(0)
    estimator = DegradationEstimator(8, 16, 16)
    stage = EstimatorStage(estimator, config, Autocast("fp32"))
    run_stage(stage, lambda first: [batch] * config.steps, tmp_path, 0, False)
    rows = [json.loads(x) for x in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert {"estimator_loss", "blur_error", "noise_error"} <= rows[0].keys()
    assert batch.lq_native is not None and batch.scores is not None
    with torch.no_grad():
        scores, _ = estimator(batch.lq_native / 255)
    found = [float(spearmanr(scores[:, i], batch.scores[:, i]).statistic) for i in range(2)]
    assert min(found) > 0.7, found


def test_the_file_is_what_rcod_s_takes(photos: Path, tmp_path: Path) -> None:
    assert main(argv(photos, tmp_path, 2)) == 0
    state = read_state(tmp_path / "estimator.safetensors", "")
    config = RcodSConfig((), "", estimator="estimator.safetensors")
    parts = Parts(
        SdVae.from_config(tiny_vae().config),
        tiny_unet(),
        ClipVpim(tiny_clip().config.to_dict(), 24),
    )
    add_guide(parts, make_guide(parts, config, state))
    assert parts.guide is not None and parts.guide.config.estimator_features == 16
    for name, value in parts.guide.estimator.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(CheckpointError, match="made by rcod-train estimator.*de_net.pth"):
        read_estimator(tmp_path / "estimator.safetensors")


def test_a_stopped_run_goes_on_to_the_same_file(photos: Path, tmp_path: Path) -> None:
    for name, steps in (("whole", (3,)), ("cut", (3, 3))):
        for i, count in enumerate(steps):
            extra = ("--set", "estimator.checkpoint_steps=2", *(("--resume",) if i else ()))
            assert main([*argv(photos, tmp_path / name, count), *extra]) == 0
            if name == "cut" and not i:
                (tmp_path / "cut/estimator/step-0000003.pt").unlink()
    whole, cut = (load_file(tmp_path / n / "estimator.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_its_file_is_read_by_every_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.load takes safetensors since 2.13 alone."""

    def older(*_: object, **__: object) -> None:
        raise UnpicklingError("invalid load key")

    monkeypatch.setattr(torch, "load", older)
    file = tmp_path / "estimator.safetensors"
    state = DegradationEstimator(4, 8, 10).state_dict()
    save_file(state, file)
    assert read_state(file, "an estimator").keys() == state.keys()
    file.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="not a whole file of tensors .* an estimator"):
        read_state(file, "an estimator")
