from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.image_io import write_image
from tests.runtime.fakes import make_bundle
from tests.runtime.simulated.cudart import SimulatedGpu
from tests.runtime.simulated.tensorrt import add_engines, install


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "fake"
    make_bundle(folder)
    return folder


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session", params=["openvino", "onnxruntime"])
def upscaler(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Upscaler]:
    with Upscaler(bundle, backend=request.param, precision="fp32") as opened:
        yield opened


@pytest.fixture(scope="session")
def photo() -> Callable[..., np.ndarray]:
    def make(height: int = 24, width: int = 40, channels: int = 3, seed: int = 0) -> np.ndarray:
        """Smooth waves and some noise, uint8."""
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width]
        waves = np.stack([np.sin(y / (3 + c)) + np.cos(x / (5 + c)) for c in range(channels)], 2)
        return np.clip(128 + 50 * waves + rng.normal(0, 10, waves.shape), 0, 255).astype(np.uint8)

    return make


@pytest.fixture
def photos(tmp_path: Path, photo: Callable[..., np.ndarray]) -> Path:
    """A folder of three small images: 0.png, 1.png, 2.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        write_image(folder / f"{i}.png", photo(10 + i, 12, seed=i))
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    gpu = SimulatedGpu()
    install(monkeypatch, gpu)
    return gpu


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of the simulated device."""
    folder = tmp_path_factory.mktemp("bundles") / "engines"
    make_bundle(folder)
    add_engines(folder)
    return folder


@pytest.fixture
def own_engines(engines: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(engines, tmp_path / "own"))


@pytest.fixture(scope="session")
def host(bundle: Path) -> Iterator[Upscaler]:
    """The same bundle on the CPU: what the device must give."""
    with Upscaler(bundle, backend="onnxruntime") as opened:
        yield opened
