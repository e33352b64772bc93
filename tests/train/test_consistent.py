"""The colour match inside a training is the runtime's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rcod_runtime.colour import match_colour
from rcod_train.config import RcodStageConfig
from rcod_train.consistent import match_consistently
from rcod_train.data import Batch
from tests.train.test_stages import CONFIG, stage


def images(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """sr (192, 192, 3) and lq (48, 48, 3): coloured waves with noise, the sr smoother than the lq;
    dark: almost all of it is clipped."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:192, :192] / 9
    wave = np.stack([np.sin(x * (1 + y / 30)), np.cos(y), np.sin(x + y)], 2) * 60 + 120
    sr = wave * 0.8 + 20
    lq = wave.reshape(48, 4, 48, 4, 3).mean((1, 3)) + rng.normal(0, 3, (48, 48, 3))
    lq[:12, :24] = 2
    if kind == "dark":
        sr, lq = sr / 16, lq / 16
    return tuple(np.clip(np.round(a), 0, 255).astype(np.uint8) for a in (sr, lq))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["bright", "dark"])
def test_it_is_the_runtimes_but_for_its_rounding(kind: str) -> None:
    sr, lq = images(kind)
    expected = sr.copy()
    match_colour(expected, lq, "consistent")
    assert np.abs(expected.astype(int) - sr).max() > (20 if kind == "bright" else 2)
    found = match_consistently(
        torch.from_numpy(sr).permute(2, 0, 1)[None].float() / 127.5 - 1,
        torch.from_numpy(lq).permute(2, 0, 1)[None],
    )
    found = ((found[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    assert np.abs(found - expected).max() < 0.51


def test_crops_of_a_batch_are_matched_each_for_itself() -> None:
    both = [images(kind) for kind in ("bright", "dark")]
    sr = torch.stack([torch.from_numpy(a).permute(2, 0, 1) for a, _ in both]).float() / 127.5 - 1
    lq = torch.stack([torch.from_numpy(b).permute(2, 0, 1) for _, b in both])
    one_by_one = [match_consistently(sr[i : i + 1], lq[i : i + 1])[0] for i in range(2)]
    torch.testing.assert_close(match_consistently(sr, lq), torch.stack(one_by_one))


def test_the_losses_of_a_stage_look_behind_it() -> None:
    def image(side: int) -> torch.Tensor:
        return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)

    torch.manual_seed(0)
    photos = Batch(
        image(64), image(64), image(32), image(32), torch.tensor([0, 1]), lq_native=image(16)
    )
    plain: RcodStageConfig = CONFIG
    (z, sr), (z_matched, matched) = (
        stage(dataclasses.replace(plain, consistent=on)).generate(photos, torch.tensor([250, 750]))
        for on in (False, True)
    )
    assert torch.equal(z, z_matched)
    torch.testing.assert_close(matched, match_consistently(sr, photos.lq_native))
    assert (matched - sr).abs().max() > 0.1
    matched.mean().backward()
