"""A small dataset of drawn pictures, and the test model of the export tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.picture import draw_picture

NAMES = ("one_005_LR4", "two_007_LR4", "ten_010_LR4")
REPOSITORY = Path(__file__).resolve().parents[2]


def write_pair(folder: Path, name: str, hq: np.ndarray) -> None:
    height, width = hq.shape[:2]
    lq = Image.fromarray(hq).resize((width // 4, height // 4), Image.Resampling.BOX)
    for part, image in (("LR", lq), ("HR", Image.fromarray(hq))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        image.save(folder / part / f"{name}.png")


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    """Benchmarks choose torch's threads for their process, and rounding goes with them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three pairs, 48x72 -> 192x288; the pictures differ."""
    folder = tmp_path / "drawn"
    for i, name in enumerate(NAMES):
        write_pair(folder, name, np.roll(draw_picture(192, 288), 31 * i, axis=1))
    return folder


@pytest.fixture(scope="session")
def realsr() -> Path:
    """RealSR's test pairs with OSEDiff's outputs and their published scores."""
    named = os.environ.get("RCOD_REALSR")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "realsr"
    if not (folder / "osediff" / "metrics").is_dir():
        pytest.skip("no RealSR test set with OSEDiff's outputs; name its folder in RCOD_REALSR")
    return folder
