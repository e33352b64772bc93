"""The validation on a stage that only blurs: its figures, its grid, and what NIQE can't judge."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import rcod_train.run
from benchmarks.picture import draw_picture
from rcod_train.config import LoopConfig, TrainConfig
from rcod_train.data import Batch, to_unit
from rcod_train.errors import MissingPackage
from rcod_train.grouping import Grouping
from rcod_train.quality.metrics import psnr_y, ssim_y
from rcod_train.quality.niqe import niqe
from rcod_train.quality.pristine import Pristine
from rcod_train.run import Run
from rcod_train.validation import Validation

UNIT = Pristine(np.zeros(36), np.eye(36), "made by the test")


class Blurring:
    """Fidelity gives hq back, neutral blurs it, realism makes it grey."""

    grouping = Grouping(0.2, 0.9)

    def generate(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        sr = to_unit(batch.hq)
        if t.item() == 500:
            sr = F.avg_pool2d(sr, 3, 1, 1, count_include_pad=False)
        return sr, sr if t.item() < 750 else torch.zeros_like(sr)


def pair(hq: np.ndarray) -> Batch:
    image = torch.from_numpy(hq.copy()).permute(2, 0, 1)[None]
    return Batch(image, image // 2, image, image, torch.tensor([0]))


def validated(folder: Path, hqs: list[np.ndarray], **options: Any) -> dict[str, Any]:
    stage: Any = Blurring()
    Validation(stage, [pair(hq) for hq in hqs], folder, **options)(7)
    return json.loads((folder / "step-0000007.json").read_text())


def test_figures_are_means_over_the_photos_at_every_level(tmp_path: Path) -> None:
    hqs = [draw_picture(192, 192), draw_picture(192, 192)[::-1]]
    document = validated(tmp_path, hqs, pristine=UNIT)
    assert document["photos"] == 2
    levels = document["levels"]
    assert list(levels) == ["input", "fidelity", "neutral", "realism"]
    darker = [hq // 2 for hq in hqs]
    for name, metric in (("psnr_y_db", psnr_y), ("ssim_y", ssim_y)):
        expected = np.mean([metric(x, hq) for x, hq in zip(darker, hqs, strict=True)])
        assert levels["input"][name] == pytest.approx(expected)
    assert levels["input"]["niqe"] == pytest.approx(np.mean([niqe(x, UNIT) for x in darker]))
    with Image.open(tmp_path / "step-0000007.png") as grid:
        assert grid.size == (5 * 192, 2 * 192)
        assert np.array_equal(np.asarray(grid)[:192, -192:], hqs[0])


def test_what_has_no_figure_is_null(tmp_path: Path) -> None:
    """Equal images have no finite PSNR; of a photo something flat was made, which has no NIQE."""
    levels = validated(tmp_path, [draw_picture(192, 192)], pristine=UNIT)["levels"]
    assert levels["fidelity"]["psnr_y_db"] is None and levels["fidelity"]["ssim_y"] == 1.0
    assert levels["realism"]["niqe"] is None and levels["realism"]["psnr_y_db"] > 0
    assert validated(tmp_path, [draw_picture(64, 64)])["levels"]["neutral"]["niqe"] is None


def test_photos_that_niqe_cannot_judge_are_left_out_of_its_mean_at_every_level(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hq, flat = draw_picture(192, 192), np.full((192, 192, 3), 90, np.uint8)
    with caplog.at_level(logging.INFO, "rcod_train"):
        levels = validated(tmp_path, [flat, hq], pristine=UNIT)["levels"]
    assert levels["fidelity"]["niqe"] == pytest.approx(niqe(hq, UNIT))
    assert "NIQE leaves out 1 of 2 photos. NIQE: expected at least two patches" in caplog.text


def test_a_board_gets_the_figures_and_the_grid(tmp_path: Path) -> None:
    seen: list[Any] = []
    board: Any = SimpleNamespace(validation=lambda *arguments: seen.append(arguments))
    document = validated(tmp_path, [draw_picture(64, 64)], board=board)
    ((step, levels, grid),) = seen
    assert (step, levels, grid.shape) == (7, document["levels"], (64, 5 * 64, 3))


def test_without_its_parameters_a_run_says_once_that_niqe_is_left_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> Pristine:
        raise MissingPackage("NIQE: not installed: pip install this\n    or that")

    monkeypatch.setattr(rcod_train.run, "load_pristine", missing)
    config = TrainConfig((str(photos),), str(tmp_path))
    run = Run(config, (LoopConfig(context_px=96, crop_px=64),), resume=False)
    with caplog.at_level(logging.INFO, "rcod_train"):
        assert run.pristine is None and run.pristine is None
    assert caplog.text.count("The validation leaves NIQE out. NIQE: not installed: pip") == 1
    assert "or that" not in caplog.text
