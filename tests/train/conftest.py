"""Photos to train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.picture import draw_picture


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small are computed faster so, and runs can be repeated bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        Image.fromarray(np.roll(draw_picture(128, 160), 37 * i, axis=1)).save(folder / f"{i}.png")
    return folder
