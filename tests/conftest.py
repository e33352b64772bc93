"""A tiny checkpoint and the bundle made from it, once for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is there: workers that each compute on all processors slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from rcod_export.bundle import ExportConfig, build_bundle
from rcod_train.checkpoint import save_merged
from tests.tiny import tiny_info, tiny_parts

# Files of minutes, the longest first: whichever began last would run while other workers wait.
LONGEST = (
    "export/test_sd_bundle.py",
    "export/test_bundle.py",
    "runtime/test_cluster.py",
    "train/test_rcod_o.py",
    "train/test_nano.py",
    "benchmarks/test_soak.py",
    "runtime/test_serve.py",
    "benchmarks/test_latency.py",
    "train/test_rcod_s.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist's order: by the number of a file's tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    tests = Path(__file__).parent
    items.sort(key=lambda item: place.get(item.path.relative_to(tests).as_posix(), len(place)))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_merged(folder, tiny_parts(), tiny_info())
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> ExportConfig:
    return ExportConfig(tile_px=64, overlap_px=16)


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: Path, tiny_config: ExportConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Exported by the worker that asks first; all of them read it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = folder / "tiny_bundle"
    with FileLock(folder / "tiny_bundle.lock"):
        if not out.exists():  # an export is written whole or not at all
            build_bundle(tiny_checkpoint, out, tiny_config)
    return out
