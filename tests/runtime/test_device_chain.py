"""The TensorRT backend on the simulated device: the shipping code, unchanged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.chain import STAGES
from rcod_runtime.errors import BackendError, EngineMismatch, NonFiniteOutput, UsageError
from tests.runtime.fakes import make_bundle
from tests.runtime.simulated.cudart import SimulatedGpu, released
from tests.runtime.simulated.tensorrt import TILE_PX, add_engines, install

Photo = Callable[..., np.ndarray]
# Calls that an image can do without: what fails is a warning.
WITHOUT = {
    "cudaSetDevice", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphGetNodes",
    "cudaGraphInstantiate", "cudaGraphDestroy", "execute_async_v3",
}  # fmt: skip
SAID = {  # of a call that fails, where its name is not said
    "cudaGetDeviceCount": "no GPU answers here",
    "cudaDeviceGetAttribute": "does not say its compute capability",
    "deserialize_cuda_engine": "refuses it",
}


@pytest.mark.parametrize("realism", ["fidelity", 0.25, "realism", "adaptive"])
@pytest.mark.parametrize("batch", [1, 2, None])
def test_the_image_is_the_cpus_bit_for_bit(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo, realism: Any, batch: int | None
) -> None:
    with Upscaler(engines, backend="tensorrt") as upscaler:
        for seed in range(3):  # the first run, the capture, a replay
            lq = photo(24, 40, seed=seed)
            found = upscaler(lq, realism, batch=batch)
            expected = host(lq, realism, tile_px=TILE_PX, batch=batch or 4)
            np.testing.assert_array_equal(found, expected)
    assert gpu.replays > 0


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_the_streams_changes_the_image(
    monkeypatch: pytest.MonkeyPatch, engines: Path, host: Upscaler, photo: Photo, seed: int
) -> None:
    install(monkeypatch, SimulatedGpu(seed=seed))
    lq = photo(40, 56)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        found = [upscaler(lq, "realism", batch=1) for _ in range(2)]
    expected = host(lq, "realism", tile_px=TILE_PX)
    for image in found:
        np.testing.assert_array_equal(image, expected)


def test_one_captured_graph_serves_every_level(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo
) -> None:
    lq = photo()
    with Upscaler(engines, backend="tensorrt") as upscaler:
        upscaler(lq, 0.5, batch=1)
        executables = set(gpu.executables)
        assert len(executables) == 1
        for realism in (0.0, 0.3, 1.0):
            found = upscaler(lq, realism, batch=1)
            np.testing.assert_array_equal(found, host(lq, realism, tile_px=TILE_PX))
        assert gpu.executables == executables


def test_another_tile_batch_drops_the_captured_graph(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo
) -> None:
    lq = photo()
    with Upscaler(engines, backend="tensorrt") as upscaler:
        for batch in (1, 3, 1):
            found = upscaler(lq, batch=batch)
            expected = host(lq, tile_px=TILE_PX, batch=batch)
            np.testing.assert_array_equal(found, expected)
            assert len(gpu.executables) <= 1


def test_an_image_smaller_than_the_tile_is_filled_up_to_it(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo
) -> None:
    lq = photo(6, 9)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        found = upscaler(lq, colour_match="none")
    expected = host(lq, tile_px=64, colour_match="none")
    assert found.shape == (24, 36, 3)
    np.testing.assert_array_equal(found[:-1, :-1], expected[:-1, :-1])


def test_one_level_with_a_metric_estimator_has_nothing_to_choose(
    gpu: SimulatedGpu, tmp_path: Path, photo: Photo
) -> None:
    make_bundle(tmp_path, gains=(0.5,))
    add_engines(tmp_path, TILE_PX)
    lq = photo(8, 8)
    with (
        Upscaler(tmp_path, backend="tensorrt") as upscaler,
        Upscaler(tmp_path, backend="onnxruntime") as host,
    ):
        np.testing.assert_array_equal(upscaler(lq, "adaptive"), upscaler(lq, "fidelity"))
        lq = photo()
        expected = host(lq, "adaptive", tile_px=TILE_PX, batch=4)
        np.testing.assert_array_equal(upscaler(lq, "adaptive"), expected)


def test_close_releases_everything_and_twice_is_harmless(
    gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    upscaler = Upscaler(engines, backend="tensorrt")
    upscaler(photo())
    assert gpu.leaks()["executable graphs"] == 1
    upscaler.close()
    upscaler.close()
    assert released(gpu) == {}
    with pytest.raises(UsageError, match="closed"):
        upscaler(photo())


def test_a_thousand_images_of_alternating_sizes_hold_no_more_than_one(
    gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    small, large = photo(8, 8), photo(24, 40)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        upscaler(small), upscaler(large)
        held = gpu.leaks()
        for i in range(500):
            upscaler(small, i / 500)
            upscaler(large if i % 50 == 0 else small, batch=1 + i % 2)
        now = gpu.leaks()
    assert {kind: n for kind, n in now.items() if n > held.get(kind, 0)} == {}
    assert released(gpu) == {}


def test_every_call_that_fails_is_a_typed_error_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
    engines: Path,
    host: Upscaler,
    photo: Photo,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """But for those that can be done without, which are a warning: CUDA graphs, and setting the
    GPU back."""
    lq = photo(16, 40)  # three tiles: the first run, the capture, a replay
    expected = host(lq, tile_px=TILE_PX)
    counting = SimulatedGpu()
    install(monkeypatch, counting)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        opening = len(counting.calls)
        upscaler(lq, batch=1)
        running = len(counting.calls)
    names = counting.calls[:running]
    assert set(names) == {
        "cudaGetDeviceCount", "cudaDeviceGetAttribute", "cudaGetDevice", "cudaSetDevice",
        "cudaMalloc", "cudaMallocHost", "cudaMemcpyAsync",
        "cudaStreamCreateWithFlags", "cudaStreamSynchronize", "cudaStreamWaitEvent",
        "cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventSynchronize",
        "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphGetNodes",
        "cudaGraphInstantiate", "cudaGraphDestroy", "cudaGraphLaunch",
        "deserialize_cuda_engine", "create_execution_context", "set_tensor_address",
        "set_input_shape", "infer_shapes", "execute_async_v3",
    }  # fmt: skip
    for number, name in enumerate(names):
        gpu = SimulatedGpu()
        install(monkeypatch, gpu)
        gpu.fail_at = number
        caplog.clear()
        try:
            with Upscaler(engines, backend="tensorrt") as upscaler:
                assert number >= opening or name == "cudaSetDevice"
                try:
                    found = upscaler(lq, batch=1)
                except BackendError as exc:
                    assert name in str(exc)
                else:
                    assert name in WITHOUT and name in caplog.text
                    np.testing.assert_array_equal(found, expected)
                np.testing.assert_array_equal(upscaler(lq, batch=1), expected)
        except (BackendError, EngineMismatch) as exc:
            assert number < opening and SAID.get(name, name) in str(exc)
        assert released(gpu) == {}, f"{name}, call {number}"


@pytest.mark.parametrize("graph", STAGES)
def test_an_engine_that_no_cuda_graph_can_hold_runs_without(
    gpu: SimulatedGpu,
    engines: Path,
    host: Upscaler,
    photo: Photo,
    graph: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu.not_captured = {graph}
    with Upscaler(engines, backend="tensorrt") as upscaler:
        upscaler.warmup()
        for seed in range(2):
            lq = photo(24, 40, seed=seed)
            found = upscaler(lq, "adaptive", batch=1)
            np.testing.assert_array_equal(found, host(lq, "adaptive", tile_px=TILE_PX))
    assert gpu.replays == 0 and "no CUDA graph, launched one by one" in caplog.text
    assert released(gpu) == {}


def test_whatever_fails_while_it_closes_the_rest_is_released(
    monkeypatch: pytest.MonkeyPatch, engines: Path, photo: Photo
) -> None:
    lq = photo(16, 24)
    failed: list[str] = []
    while True:
        gpu = SimulatedGpu()
        install(monkeypatch, gpu)
        upscaler = Upscaler(engines, backend="tensorrt")
        upscaler(lq, batch=1)
        gpu.fail_at = len(gpu.calls) + len(failed)
        try:
            upscaler.close()
        except BackendError as exc:
            failed.append(gpu.calls[gpu.fail_at])
            assert failed[-1] in str(exc)
        else:
            break
        upscaler.close()  # where the GPU did not become current, it is done now
        assert released(gpu) == {}, f"{failed[-1]}, call {len(failed)}"
    assert set(failed) == {
        "cudaGetDevice", "cudaSetDevice", "cudaStreamSynchronize", "cudaGraphExecDestroy",
        "cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaEventDestroy",
        "cudaThreadExchangeStreamCaptureMode",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("run", "among"),
    [
        (lambda upscaler, lq: upscaler(lq, "adaptive", batch=1), "cudaGraphLaunch"),
        (lambda upscaler, lq: upscaler.profile(runs=1, batch=1), "cudaEventElapsedTime"),
    ],
    ids=["adaptive", "profile"],
)
def test_one_upscaler_stands_every_call_that_fails(
    gpu: SimulatedGpu,
    engines: Path,
    host: Upscaler,
    photo: Photo,
    run: Callable[[Upscaler, np.ndarray], object],
    among: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lq = photo(16, 24)
    errors: list[str] = []
    failed = set()
    with Upscaler(engines, backend="tensorrt") as upscaler:

        def work() -> None:
            caplog.clear()
            try:
                run(upscaler, lq)
            except BackendError as exc:
                errors.append(str(exc))

        for name in gpu.failing(work):
            assert name in (errors.pop() if errors else caplog.text)
            failed.add(name)
            with upscaler._chain._cuda.guard():  # type: ignore[attr-defined]
                upscaler._chain._drop_captures()  # type: ignore[attr-defined]
        assert errors == [] and among in failed
        np.testing.assert_array_equal(upscaler(lq), host(lq, tile_px=TILE_PX, batch=4))
    assert released(gpu) == {}


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_two_threads_get_their_own_images(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo, device: str
) -> None:
    photos = [photo(8 + 8 * i, 40, seed=i) for i in range(4)]
    found: dict[int, np.ndarray] = {}
    with Upscaler(engines, backend="tensorrt", device=device) as upscaler:

        def work(i: int) -> None:
            for _ in range(5):
                found[i] = upscaler(photos[i], i / 3, batch=2)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(photos))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, lq in enumerate(photos):
        if lq.shape[0] >= TILE_PX // 4:  # smaller ones are filled up, which the CPU does not do
            np.testing.assert_array_equal(found[i], host(lq, i / 3, tile_px=TILE_PX, batch=2))


def test_the_callers_gpu_stays_current(gpu: SimulatedGpu, engines: Path, photo: Photo) -> None:
    with Upscaler(engines, device="cuda:1") as upscaler:
        assert gpu.owner == 1 and gpu.current == 0
        upscaler(photo())
        assert gpu.current == 0
    assert released(gpu) == {}


def test_nan_of_a_graph_is_named_with_its_tile(
    gpu: SimulatedGpu, tmp_path: Path, photo: Photo
) -> None:
    make_bundle(tmp_path, gains=(1.0, float("nan"), 1.0))
    add_engines(tmp_path, TILE_PX)
    with Upscaler(tmp_path, backend="tensorrt") as upscaler:
        with pytest.raises(NonFiniteOutput, match="graph denoiser, realism neutral, tile row 0"):
            upscaler(photo(), "neutral")
        with pytest.raises(NonFiniteOutput, match="denoiser"):  # NaN * 0 is NaN: no level is whole
            upscaler(photo(), "realism")
    assert released(gpu) == {}


def test_an_iterator_that_is_left_early_leaves_nothing_in_flight(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo
) -> None:
    lq = photo()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Upscaler(engines, backend="tensorrt") as upscaler:
        with pytest.raises(KeyboardInterrupt):
            upscaler(lq, batch=1, progress=stop)
        assert all(not stream.queue for stream in gpu.scheduler.streams)
        np.testing.assert_array_equal(upscaler(lq, batch=1), host(lq, tile_px=TILE_PX))


@pytest.mark.parametrize("seed", range(5))
def test_an_iterator_that_is_left_early_is_made_up_for_where_waiting_failed(
    monkeypatch: pytest.MonkeyPatch, engines: Path, host: Upscaler, photo: Photo, seed: int
) -> None:
    gpu = SimulatedGpu(seed=seed)
    install(monkeypatch, gpu)
    images = [photo(16, 40, seed=i) for i in range(2)]
    expected = host(images[1], tile_px=TILE_PX)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        for number in range(6):  # the GPU made current, three streams waited for, a graph released

            def stop(done: int, total: int, number: int = number) -> None:
                gpu.fail_at = len(gpu.calls) + number
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                upscaler(images[0], batch=1, progress=stop)
            assert gpu.fail_at is not None and gpu.fail_at < len(gpu.calls)
            gpu.fail_at = None
            np.testing.assert_array_equal(upscaler(images[1], batch=1), expected)
    assert released(gpu) == {}


def test_the_profile_names_every_stage(gpu: SimulatedGpu, engines: Path) -> None:
    with Upscaler(engines, backend="tensorrt") as upscaler:
        profile = upscaler.profile(runs=3)
    assert list(profile) == ["encoder", "denoiser", "decoder"]
    assert all(ms > 0 for ms in profile.values())


def test_a_warm_upscaler_has_captured_its_graph(
    gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    with Upscaler(engines, backend="tensorrt") as upscaler:
        upscaler.warmup()
        (captured,) = gpu.executables
        upscaler(photo(64, 64), overlap_px=0)
        assert gpu.executables == {captured}
