"""The metric code against OSEDiff's published per-image log on RealSR."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.errors import MissingPackage
from benchmarks.metrics import psnr_y, ssim_y
from benchmarks.niqe import niqe
from benchmarks.pairs import find_outputs, find_pairs, read_rgb
from benchmarks.pristine import load_pristine

CHOSEN = ("Canon_001_LR4", "Canon_023_LR4", "Canon_050_LR4", "Nikon_007_LR4", "Nikon_042_LR4")
# How far the published figures may be: PSNR and SSIM are printed with six decimals.
PSNR_LIMIT_DB, SSIM_LIMIT, NIQE_MEAN_LIMIT = 0.001, 1e-5, 0.02


def published(folder: Path) -> dict[str, dict[str, float]]:
    """Name -> metric -> value, from the log beside OSEDiff's outputs."""
    (log,) = (folder / "osediff" / "metrics").glob("*.log")
    scores = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if found := re.search(r"/(\w+)\.png \| (.*) \| Runtime", line):
            pairs = re.findall(r"(\w+): ([\d.]+)", found[2])
            scores[found[1]] = {metric: float(value) for metric, value in pairs}
    return scores


def test_metrics_reproduce_published_scores(realsr: Path) -> None:
    pairs = [pair for pair in find_pairs(realsr) if pair.name in CHOSEN]
    assert len(pairs) == len(CHOSEN)
    outputs, scores = find_outputs(realsr / "osediff", pairs), published(realsr)
    for pair in pairs:
        sr, hq = read_rgb(outputs[pair.name]), read_rgb(pair.hq)
        assert psnr_y(sr, hq) == pytest.approx(scores[pair.name]["PSNR"], abs=PSNR_LIMIT_DB)
        assert ssim_y(sr, hq) == pytest.approx(scores[pair.name]["SSIM"], abs=SSIM_LIMIT)


def test_niqe_reproduces_published_scores(realsr: Path) -> None:
    try:
        pristine = load_pristine()
    except MissingPackage as error:
        pytest.skip(str(error).splitlines()[0])
    scores = published(realsr)
    images = [read_rgb(realsr / "osediff" / f"{name}.png") for name in CHOSEN]
    found = np.array([niqe(image, pristine) for image in images])
    expected = np.array([scores[name]["NIQE"] for name in CHOSEN])
    off = found.mean() / expected.mean() - 1
    assert abs(off) < NIQE_MEAN_LIMIT, f"{off:+.3%}: {found} against {expected}"
