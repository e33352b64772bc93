"""The TensorRT backend on the simulated device: the shipping code, unchanged."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.backends.trt.engine import make_logger
from rcod_runtime.cli import doctor
from rcod_runtime.errors import (
    BackendError,
    EngineMismatch,
    HashMismatch,
    NonFiniteOutput,
    UsageError,
)
from rcod_runtime.manifest import Engine
from tests.runtime.fakes import GAINS, make_bundle
from tests.runtime.simulated.cudart import CopyKind, Error, SimulatedGpu
from tests.runtime.simulated.memory import Violation
from tests.runtime.simulated.streams import Stream
from tests.runtime.simulated.tensorrt import (
    DType,
    EngineContext,
    Mode,
    RuntimeCache,
    RuntimeConfig,
    SimulatedEngine,
    add_engines,
    install,
)

Photo = Callable[..., np.ndarray]
TILE_PX = 64  # photos of 24x40 make 96x160: two rows of three tiles


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    gpu = SimulatedGpu()
    install(monkeypatch, gpu)
    return gpu


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "engines"
    make_bundle(folder)
    add_engines(folder, TILE_PX)
    return folder


@pytest.fixture
def own_engines(engines: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engines, tmp_path / "own"))


@pytest.fixture(scope="session")
def host(bundle: Path) -> Iterator[Upscaler]:
    with Upscaler(bundle, backend="onnxruntime") as opened:
        yield opened


def released(gpu: SimulatedGpu) -> dict[str, int]:
    if gpu.leaks():
        gc.collect()  # contexts are Python objects
    return gpu.leaks()


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
    monkeypatch: pytest.MonkeyPatch, engines: Path, host: Upscaler, photo: Photo
) -> None:
    lq = photo()
    expected = host(lq, tile_px=TILE_PX)
    counting = SimulatedGpu()
    install(monkeypatch, counting)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        opening = len(counting.calls)
        upscaler(lq, batch=1)
        running = len(counting.calls)
    names = counting.calls[:running]
    assert {"cudaMalloc", "cudaMemcpyAsync", "enqueue", "cudaGraphLaunch"} <= set(names)
    for number, name in enumerate(names):
        gpu = SimulatedGpu()
        install(monkeypatch, gpu)
        gpu.fail_at = number
        if number < opening:
            with pytest.raises(BackendError, match=name):
                Upscaler(engines, backend="tensorrt")
            assert released(gpu) == {}, f"{name}, call {number}"
            continue
        with Upscaler(engines, backend="tensorrt") as upscaler:
            with pytest.raises(BackendError, match=name if name != "enqueue" else "execute_async"):
                upscaler(lq, batch=1)
            np.testing.assert_array_equal(upscaler(lq, batch=1), expected)
        assert released(gpu) == {}, f"{name}, call {number}"


def test_two_threads_get_their_own_images(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo
) -> None:
    photos = [photo(8 + 8 * i, 40, seed=i) for i in range(4)]
    found: dict[int, np.ndarray] = {}
    with Upscaler(engines, backend="tensorrt") as upscaler:

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


# Arrays that lie on the GPU.


class OnGpu:
    """An array of another library on the simulated GPU, written when its stream gets there."""

    def __init__(self, gpu: SimulatedGpu, stream: Stream, values: np.ndarray) -> None:
        self.gpu, self.shape = gpu, values.shape
        self.address = gpu.memory.allocate(values.nbytes)
        raw = np.frombuffer(values.tobytes(), np.uint8)
        gpu.scheduler.enqueue(stream, lambda: self._view().__setitem__(slice(None), raw))

    def _view(self) -> np.ndarray:
        return self.gpu.memory.view(self.address, 4 * int(np.prod(self.shape)))

    @property
    def values(self) -> np.ndarray:
        return self._view().copy().view(np.float32).reshape(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "<f4", "data": (self.address, False), "version": 3}


@pytest.mark.parametrize("seed", range(10))
def test_arrays_on_the_gpu_go_in_and_out_on_the_callers_stream(
    monkeypatch: pytest.MonkeyPatch, engines: Path, seed: int
) -> None:
    gpu = SimulatedGpu(seed=seed)
    install(monkeypatch, gpu)
    rng = np.random.default_rng(seed)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        stream = gpu.cudaStreamCreateWithFlags(1)[1]
        thumbnail = OnGpu(gpu, stream, rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32))
        images = rng.uniform(-0.5, 0.5, (3, 2, 3, TILE_PX, TILE_PX)).astype(np.float32)
        found = []
        for image, realism in zip(images, ("fidelity", "realism", "adaptive"), strict=True):
            out = OnGpu(gpu, stream, np.zeros_like(image))
            upscaler.enqueue(OnGpu(gpu, stream, image), thumbnail, out, realism, stream)
            found.append(out)  # all are enqueued before anybody waits
        gpu.cudaStreamSynchronize(stream)
        results = [out.values for out in found]
        gpu.cudaStreamDestroy(stream)
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    # m_l of the fake is the image's mean, about 0 here: the last level.
    for image, result, gain in zip(images, results, (GAINS[0], GAINS[2], GAINS[2]), strict=True):
        padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
        inner = (slice(None), slice(None))
        blurred = sum(
            weights[i, j] * padded[(*inner, slice(i, i + TILE_PX), slice(j, j + TILE_PX))]
            for i in range(3)
            for j in range(3)
        )
        assert np.abs(result - np.clip(blurred * gain, -1, 1)).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": (5, 3, 64, 64)}, "5 tiles; the engines are built for 1 to 4.*--batch 1 5"),
        ({"shape": (1, 3, 32, 32)}, r"expected \(1, 3, 64, 64\) <f4, found \(1, 3, 32, 32\)"),
        ({"typestr": "<f2"}, "found .* <f2"),
        ({"strides": (4, 8, 16, 32)}, "expected C order"),
    ],
)
def test_arrays_on_the_gpu_that_cannot_be_used_say_why(
    gpu: SimulatedGpu, engines: Path, change: dict[str, Any], match: str
) -> None:
    class Array:
        __cuda_array_interface__ = {
            "shape": (1, 3, 64, 64), "typestr": "<f4", "data": (256, False), "version": 3, **change
        }  # fmt: skip

    with Upscaler(engines, backend="tensorrt") as upscaler:
        with pytest.raises(UsageError, match=match):
            upscaler.enqueue(Array(), Array(), Array())
        with pytest.raises(UsageError, match="expected an array on the GPU.*found ndarray"):
            upscaler.enqueue(np.zeros((1, 3, 64, 64), np.float32), Array(), Array())


def test_arrays_on_the_gpu_need_engines(host: Upscaler) -> None:
    with pytest.raises(UsageError, match="need the bundle's engines, onnxruntime"):
        host.enqueue(None, None, None)


# Choosing engines.


def test_auto_takes_engines_where_they_fit(gpu: SimulatedGpu, engines: Path) -> None:
    with Upscaler(engines) as upscaler:
        assert upscaler.backend == "tensorrt 10.9.0 fp32"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"sm": 120}, "built for sm_89, this GPU is sm_120"),
        ({"count": 0}, "no GPU answers here"),
        ({"version": "10.13.2"}, "built by tensorrt 10.9.0, 10.13.2 is installed"),
    ],
)
def test_engines_of_another_machine_are_refused_or_announced(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    engines: Path,
    machine: dict[str, Any],
    reason: str,
) -> None:
    version = machine.pop("version", "10.9.0")
    install(monkeypatch, SimulatedGpu(**machine), version)
    for options in ({"backend": "tensorrt"}, {"device": "cuda:0"}):
        with pytest.raises(EngineMismatch, match=f"{reason}.*rcod-export engines"):
            Upscaler(engines, **options)
    with Upscaler(engines) as upscaler:
        assert not upscaler.backend.startswith("tensorrt")
    assert reason in caplog.text


def test_doctor_says_which_engines_fit_and_runs_them(
    gpu: SimulatedGpu, own_engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_engines(own_engines, TILE_PX)
    assert doctor.main(["--bundle", str(own_engines), "--device", "cuda:1"]) == 0
    out = capsys.readouterr().out
    assert "gpu cuda:1: sm_89" in out and "tensorrt 10.9.0" in out
    assert "engines/tensorrt/sm89/64px: fits" in out
    assert "backend tensorrt: tensorrt 10.9.0 fp32, loads" in out
    assert "used by default: tensorrt 10.9.0 fp32 on cuda:1" in out
    assert released(gpu) == {}


def test_doctor_says_why_engines_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, SimulatedGpu(sm=120))
    assert doctor.main(["--bundle", str(engines)]) == 0  # a CPU runs it
    out = capsys.readouterr().out
    assert "64px: not used, built for sm_89, this GPU is sm_120" in out
    assert "used by default: openvino" in out
    assert doctor.main(["--bundle", str(engines), "--device", "cuda:0"]) == 7
    assert "this GPU is sm_120" in capsys.readouterr().err


def test_an_engine_of_another_system_is_refused(gpu: SimulatedGpu, own_engines: Path) -> None:
    add_engines(
        own_engines, TILE_PX, change=lambda e, _: dataclasses.replace(e, os="windows-amd64")
    )
    with pytest.raises(EngineMismatch, match="built for windows-amd64, this is"):
        Upscaler(own_engines, backend="tensorrt")


def test_an_engine_whose_file_changed_is_not_loaded(gpu: SimulatedGpu, own_engines: Path) -> None:
    path = next(own_engines.rglob("decoder.engine"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(HashMismatch, match="decoder.engine.*not loaded"):
        Upscaler(own_engines, backend="tensorrt")
    assert released(gpu) == {}


def half_output(engine: Engine, header: dict[str, Any]) -> Engine:
    header["dtypes"] = {"z_sr": "HALF"}
    return engine


def test_an_engine_with_other_types_is_refused(gpu: SimulatedGpu, own_engines: Path) -> None:
    add_engines(own_engines, TILE_PX, change=half_output)
    with pytest.raises(EngineMismatch, match="z_sr: expected float32, found HALF"):
        Upscaler(own_engines, backend="tensorrt")


def test_a_set_without_one_engine_says_which(gpu: SimulatedGpu, own_engines: Path) -> None:
    manifest = add_engines(own_engines, TILE_PX)
    fewer = tuple(e for e in manifest.engines if e.graph != "vpim")
    text = dataclasses.replace(manifest, engines=fewer).to_json()
    (own_engines / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(EngineMismatch, match="no engine for vpim"):
        Upscaler(own_engines, backend="tensorrt")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"tile_px": 96}, "built for 64 px.*--tile 96"),
        ({"batch": 5}, r"expected an integer in 1\.\.4"),
    ],
)
def test_what_the_engines_are_not_built_for_is_refused(
    gpu: SimulatedGpu, engines: Path, photo: Photo, call: dict[str, Any], match: str
) -> None:
    with Upscaler(engines, backend="tensorrt") as upscaler, pytest.raises(UsageError, match=match):
        upscaler(photo(), **call)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "tensorrt", "device": "cpu"},
        {"backend": "tensorrt", "precision": "bf16"},
        {"backend": "openvino", "device": "cuda:0"},
        {"device": "cuda:x"},
    ],
)
def test_choices_that_exclude_each_other_are_refused(
    gpu: SimulatedGpu, engines: Path, options: dict[str, str]
) -> None:
    with pytest.raises(UsageError):
        Upscaler(engines, **options)


# TensorRT-RTX: what it compiles for the GPU is kept.


def test_what_rtx_compiled_is_kept_for_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
    own_engines: Path,
    host: Upscaler,
    photo: Photo,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_engines(own_engines, TILE_PX, target="tensorrt-rtx")
    expected = host(photo(), tile_px=TILE_PX, batch=4)
    graphs = ["decoder", "denoiser", "encoder", "vpim"]
    for compiled, damage in ((graphs, False), ([], True), (graphs, False)):
        gpu = SimulatedGpu()
        install(monkeypatch, gpu)
        with Upscaler(own_engines) as upscaler:
            assert upscaler.backend.startswith("tensorrt-rtx")
            np.testing.assert_array_equal(upscaler(photo()), expected)
        assert sorted(gpu.compiled) == compiled
        files = list((tmp_path / "cache").rglob("*.bin"))
        assert len(files) == 4 and not list(own_engines.rglob("*.bin"))
        for file in files if damage else ():
            file.write_bytes(b"another machine's")


def test_a_cache_that_cannot_be_written_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path, photo: Photo, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, SimulatedGpu())
    add_engines(own_engines, TILE_PX, target="tensorrt-rtx")
    with Upscaler(own_engines) as upscaler:
        assert upscaler(photo()).shape == (96, 160, 3)


# The simulated device itself: what it must catch.


def test_the_device_catches_what_a_gpu_would_not_forgive() -> None:
    gpu = SimulatedGpu()
    address = gpu.memory.allocate(1024)
    assert np.isnan(gpu.memory.view(address, 4).view(np.float32)[0])
    for wrong, nbytes in [(address, 1025), (address - 1, 4), (address + 2048, 4)]:
        with pytest.raises(Violation):
            gpu.memory.view(wrong, nbytes)
    with pytest.raises(Violation, match="aligned"):
        gpu.memory.view(address + 4, 4, aligned=True)
    gpu.memory.free(address)
    with pytest.raises(Violation, match="freed"):
        gpu.memory.view(address, 4)
    with pytest.raises(Violation, match="no live block"):
        gpu.memory.free(address)


def parameters(documentation: str) -> int:
    """Of a function whose documentation begins with its signature."""
    inside = documentation.strip().split("\n")[0].split("(", 1)[1].rsplit(")", 1)[0]
    return len(inside.split(",")) if inside else 0


def test_cuda_has_what_the_device_stands_in_for() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason='needs pip install "rcod[tensorrt]"')
    module = SimulatedGpu().module()
    for name, value in vars(module).items():
        if not name.startswith("cuda"):
            continue
        assert hasattr(real, name), name
        if inspect.isfunction(value):
            simulated = getattr(SimulatedGpu, name)
            count = simulated.__code__.co_argcount - 1
            assert parameters(getattr(real, name).__doc__) == count, name
        elif isinstance(value, int):
            assert int(getattr(real, name)) == value, name
    for kind in CopyKind:
        assert int(getattr(real.cudaMemcpyKind, kind.name)) == kind
    for error in Error:
        assert int(getattr(real.cudaError_t, error.name)) == error
    attributes = real.cudaDeviceAttr
    assert int(attributes.cudaDevAttrComputeCapabilityMajor) == 75
    assert int(attributes.cudaDevAttrComputeCapabilityMinor) == 76
    mode = real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert int(mode) == 1


def test_tensorrt_has_what_the_device_stands_in_for() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason='needs pip install "rcod[tensorrt-rtx]"')
    stands_in = {
        "ICudaEngine": SimulatedEngine,
        "IExecutionContext": EngineContext,
        "IRuntimeConfig": RuntimeConfig,
        "IRuntimeCache": RuntimeCache,
    }
    own = {"begin", "finish", "busy"}  # of the simulation
    for name, simulated in stands_in.items():
        for attribute, value in vars(simulated).items():
            if callable(value) and not attribute.startswith("_") and attribute not in own:
                assert hasattr(getattr(real, name), attribute), f"{name}.{attribute}"
    assert hasattr(real.ICudaEngine, "device_memory_size_v2")
    assert hasattr(real.ICudaEngine, "num_io_tensors")
    assert real.TensorIOMode.INPUT.name == Mode.INPUT.name
    assert real.DataType.FLOAT.name == DType.FLOAT.name
    assert real.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert real.ILogger.Severity.WARNING < real.ILogger.Severity.INFO
    assert real.Runtime(make_logger(real)).engine_host_code_allowed is False
