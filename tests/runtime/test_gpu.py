"""The TensorRT backend on a real GPU: engines are built here, run, and compared with the CPU."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_export.engines import EngineConfig, build_engines
from rcod_runtime import Upscaler
from rcod_runtime.backends.trt.libraries import MODULES, load_cuda, load_tensorrt, sm_of
from rcod_runtime.errors import BackendError, ExportError

pytestmark = pytest.mark.gpu
MIN_PSNR_DB = 40.0  # of engines in fp32 against ONNX Runtime, 8 bit


@pytest.fixture(scope="module")
def runtime() -> Any:
    try:
        runtime = load_cuda()
        sm_of(runtime, 0)
    except BackendError as exc:
        pytest.skip(str(exc))
    return runtime


@pytest.fixture(scope="module", params=list(MODULES))
def engines(
    request: pytest.FixtureRequest,
    runtime: Any,
    tiny_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    try:
        load_tensorrt(request.param)
    except BackendError as exc:
        pytest.skip(str(exc))
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    config = EngineConfig(target=request.param, sms=(sm_of(runtime, 0),), batch=(1, 2))
    try:
        build_engines(folder, config)
    except ExportError as exc:
        if request.param == "tensorrt-rtx" and "builds for" in str(exc):
            pytest.skip(f"no RTX engines for this GPU: {exc}")
        raise
    return folder


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return 10 * float(np.log10(255.0**2 / max(error, 1e-9)))


@pytest.mark.parametrize("realism", ["fidelity", 0.5, "realism", "adaptive"])
def test_engines_give_the_cpus_image(
    engines: Path, photo: Callable[..., np.ndarray], realism: str | float
) -> None:
    lq = photo(40, 56)
    with (
        Upscaler(engines, backend="tensorrt") as device,
        Upscaler(engines, backend="onnxruntime") as host,
    ):
        expected = host(lq, realism, tile_px=64, batch=1)
        for batch in (1, 2, 1):  # the second and third bind anew, then capture again
            for _ in range(3):
                assert psnr_db(device(lq, realism, batch=batch), expected) >= MIN_PSNR_DB


def test_a_replayed_graph_gives_the_same_bytes(
    engines: Path, photo: Callable[..., np.ndarray]
) -> None:
    with Upscaler(engines, backend="tensorrt") as device:
        first = device(photo(), batch=1)
        for _ in range(5):
            np.testing.assert_array_equal(device(photo(), batch=1), first)


def test_a_thousand_calls_hold_no_more_memory_than_ten(
    engines: Path, runtime: Any, photo: Callable[..., np.ndarray]
) -> None:
    with Upscaler(engines, backend="tensorrt") as device:

        def free_after(calls: int) -> int:
            for i in range(calls):
                device(photo(8 + 8 * (i % 3), 40), i % 10 / 10, batch=1 + i % 2)
            return int(runtime.cudaMemGetInfo()[1])

        before = free_after(10)
        assert before - free_after(1000) < 2**20


def test_a_dropped_upscaler_gives_back_its_memory(
    engines: Path, runtime: Any, photo: Callable[..., np.ndarray]
) -> None:
    def free_after_one() -> int:
        Upscaler(engines, backend="tensorrt")(photo())
        gc.collect()
        return int(runtime.cudaMemGetInfo()[1])

    before = free_after_one()  # what the libraries keep is loaded now
    assert before - min(free_after_one() for _ in range(5)) < 2**20


@pytest.mark.parametrize("own", [True, False])
def test_another_librarys_capture_goes_on_while_an_upscaler_is_dropped(
    engines: Path, runtime: Any, photo: Callable[..., np.ndarray], own: bool
) -> None:
    held = [Upscaler(engines, backend="tensorrt")]
    held[0](photo())
    stream = runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)[1]
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
    assert int(runtime.cudaStreamBeginCapture(stream, mode)[0]) == 0
    thread = threading.Thread(target=held.clear)
    if own:
        held.clear()
    else:
        thread.start()
        thread.join()
    error, graph = runtime.cudaStreamEndCapture(stream)
    assert int(error) == 0
    runtime.cudaGraphDestroy(graph)
    runtime.cudaStreamDestroy(stream)


def test_two_threads_get_their_own_images(engines: Path, photo: Callable[..., np.ndarray]) -> None:
    photos = [photo(24, 40, seed=i) for i in range(2)]
    with Upscaler(engines, backend="tensorrt") as device:
        expected = [device(lq) for lq in photos]
        found: dict[int, list[np.ndarray]] = {0: [], 1: []}

        def work(i: int) -> None:
            for _ in range(20):
                found[i].append(device(photos[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, images in found.items():
        for image in images:
            np.testing.assert_array_equal(image, expected[i])
