"""Which engines are taken, which are refused and why, and what is kept of them."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_export.engines import EngineConfig, _one_model
from rcod_runtime import Upscaler
from rcod_runtime.backends.trt.engines import EngineSet, find_engines
from rcod_runtime.cli import upscale
from rcod_runtime.errors import BackendError, EngineMismatch, HashMismatch, UsageError
from rcod_runtime.image_io import read_image, write_image
from rcod_runtime.manifest import MANIFEST_FILE, Engine, read_manifest
from tests.runtime.simulated.cudart import SimulatedGpu, released
from tests.runtime.simulated.tensorrt import (
    TILE_PX,
    EngineContext,
    RuntimeCache,
    add_engines,
    install,
)

Photo = Callable[..., np.ndarray]


def test_auto_takes_engines_where_they_fit(gpu: SimulatedGpu, engines: Path) -> None:
    with Upscaler(engines) as upscaler:
        assert upscaler.backend == "tensorrt 10.9.0 fp32"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"sm": 120}, "built for sm_89, this GPU is sm_120"),
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


OLDER = (
    r"no GPU answers here \(cudaErrorInsufficientDriver\): the driver is of CUDA 12\.4, older than "
    r"cuda-bindings expects, 13\.5\. Update the driver .*pip install "
    r'"tensorrt-cu12>=10\.3,<12" "cuda-bindings<13"'
)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"count": 0}, r"no GPU answers here \(cudaErrorNoDevice\)"),
        ({"driver": 12040}, OLDER),
        ({"driver": 0}, r"no GPU answers here \(.*\): no NVIDIA driver is installed"),
        ({"count": 1}, "cuda:1: no such GPU, 1 answered"),
    ],
)
def test_what_building_does_not_cure_says_what_does(
    monkeypatch: pytest.MonkeyPatch, engines: Path, machine: dict[str, int], reason: str
) -> None:
    install(monkeypatch, SimulatedGpu(**machine))
    with pytest.raises(EngineMismatch, match=reason) as refused:
        Upscaler(engines, device="cuda:1")
    assert "rcod-export" not in str(refused.value) and "--device cpu" in str(refused.value)


def test_a_missing_library_is_not_cured_by_building(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, engines: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineMismatch, match=r'pip install "rcod\[tensorrt\]"') as refused:
        Upscaler(engines, device="cuda:0")
    assert "rcod-export" not in str(refused.value)


@pytest.mark.parametrize(("target", "fits"), [("tensorrt", True), ("tensorrt-rtx", False)])
def test_only_tensorrt_itself_has_engines_for_later_gpus(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path, target: str, fits: bool
) -> None:
    def for_later(engine: Engine, header: dict[str, Any]) -> Engine:
        return dataclasses.replace(engine, options={"hardware_compatibility": "ampere-plus"})

    manifest = add_engines(own_engines, TILE_PX, target=target, change=for_later)
    install(monkeypatch, SimulatedGpu(sm=90))
    found = find_engines(manifest, 0)
    assert isinstance(found, EngineSet) if fits else "built for sm_89, this GPU is sm_90" in found


def test_of_engines_for_several_tile_sizes_the_bundles_own_or_those_asked_for_are_taken(
    gpu: SimulatedGpu, own_engines: Path, photo: Photo, tmp_path: Path
) -> None:
    """Not the first by name: 128px comes before 64px, and 1024px before 512px."""
    manifest = read_manifest(own_engines / MANIFEST_FILE)
    image = dataclasses.replace(manifest.image, tile_px=TILE_PX)
    manifest = dataclasses.replace(manifest, image=image, engines=())
    (own_engines / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    larger = 2 * TILE_PX
    add_engines(own_engines, TILE_PX)
    add_engines(own_engines, larger)
    for asked, size in ((None, TILE_PX), (TILE_PX, TILE_PX), (larger, larger)):
        with Upscaler(own_engines, backend="tensorrt", tile_px=asked) as upscaler:
            assert upscaler._chain.tile_px == size
    with (
        Upscaler(own_engines, backend="tensorrt") as upscaler,
        pytest.raises(UsageError, match=f"in use are for {TILE_PX} px.* with tile_px={larger}"),
    ):
        upscaler(photo(), tile_px=larger)
    source, out = tmp_path / "photo.png", tmp_path / "out.png"
    write_image(source, photo())
    options = ["--bundle", str(own_engines), "--backend", "tensorrt", "--tile", str(larger)]
    assert upscale.main([str(source), "-o", str(out), *options]) == 0
    with Upscaler(own_engines, backend="openvino", precision="fp32") as host:
        assert read_image(out).pixels.shape == host.output_shape(photo().shape)


def test_engines_for_no_tiles_of_the_size_asked_for_are_not_taken(
    gpu: SimulatedGpu, own_engines: Path, photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    add_engines(own_engines, 2 * TILE_PX)
    words = (
        "its engines are for tiles of 64, 128 px, not of 96. Build others: "
        "rcod-export engines BUNDLE --target tensorrt --tile 96"
    )
    with pytest.raises(EngineMismatch, match=words):
        Upscaler(own_engines, backend="tensorrt", tile_px=96)
    with Upscaler(own_engines, tile_px=96) as upscaler:
        assert not upscaler.backend.startswith("tensorrt") and words in caplog.text
        assert upscaler(photo(), tile_px=96).shape == (96, 160, 3)


@pytest.mark.parametrize("tile_px", ["64", [64], -8, 12, True])
def test_a_tile_size_that_cannot_be_is_no_reason_to_take_a_cpu(
    gpu: SimulatedGpu, engines: Path, tile_px: Any
) -> None:
    with pytest.raises(UsageError, match="tile size .*: expected a"):
        Upscaler(engines, tile_px=tile_px)


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


@pytest.mark.parametrize("output", ["tokens", "z_sr", "image"])
def test_an_engine_that_gives_another_shape_is_refused_before_it_runs(
    gpu: SimulatedGpu, own_engines: Path, output: str
) -> None:
    """It would write beyond the memory that the manifest asks for."""

    def stretched(engine: Engine, header: dict[str, Any]) -> Engine:
        header["stretched"] = {output: 1}
        return engine

    add_engines(own_engines, TILE_PX, change=stretched)
    with pytest.raises(EngineMismatch, match=f"output {output}: expected .*, found .*--force"):
        Upscaler(own_engines, backend="tensorrt")
    assert gpu.launched == {} and "cudaMalloc" not in gpu.calls
    assert released(gpu) == {}


def test_an_engine_that_gives_another_shape_for_some_batches_is_refused_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    shape_of = EngineContext.get_tensor_shape

    def wrong_for_two(context: EngineContext, name: str) -> tuple[int, ...]:
        batch, *rest = shape_of(context, name)
        return (3 if name == "z_sr" and batch == 2 else batch, *rest)

    monkeypatch.setattr(EngineContext, "get_tensor_shape", wrong_for_two)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        upscaler(photo(), batch=3)
        gpu.launched.clear()
        with pytest.raises(EngineMismatch, match=r"output z_sr: expected \(2, .*, found \(3, "):
            upscaler(photo(), batch=2)
        assert gpu.launched == {}
    assert released(gpu) == {}


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
        ({"tile_px": 96}, "in use are for 64 px.*--tile 96"),
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


def test_it_is_kept_of_all_engines_where_the_first_image_is_adaptive(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path, photo: Photo, tmp_path: Path
) -> None:
    """Its level comes first, of the encoder alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_engines(own_engines, TILE_PX, target="tensorrt-rtx")
    for compiled in (4, 0):
        gpu = SimulatedGpu()
        install(monkeypatch, gpu)
        with Upscaler(own_engines) as upscaler:
            upscaler(photo(40, 40), "adaptive")
        assert len(gpu.compiled) == compiled


def test_what_it_compiles_later_for_other_shapes_is_kept_too(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path, photo: Photo, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_engines(own_engines, TILE_PX, target="tensorrt-rtx")
    for compiled in (["decoder", "denoiser", "encoder"], []):
        gpu = SimulatedGpu()
        install(monkeypatch, gpu)
        with Upscaler(own_engines) as upscaler:
            upscaler(photo(), batch=1)
            gpu.compiled.clear()
            upscaler(photo(), batch=2)
        assert sorted(gpu.compiled) == compiled


def test_each_model_of_gpu_and_each_driver_has_a_cache_of_its_own(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path, photo: Photo, tmp_path: Path
) -> None:
    """Of one compute capability: each would refuse the other's, and write its own over it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_engines(own_engines, TILE_PX, target="tensorrt-rtx")
    machines = [(b"NVIDIA L4", 13050), (b"NVIDIA L4", 13060), (b"NVIDIA L40S", 13050)]
    for compiled in (4, 0):
        for name, driver in machines:
            gpu = SimulatedGpu(driver=driver)
            gpu.name = name
            install(monkeypatch, gpu)
            with Upscaler(own_engines) as upscaler:
                upscaler(photo())
            assert len(gpu.compiled) == compiled
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 4 * len(machines)


def test_a_cache_that_cannot_be_written_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path, photo: Photo, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, SimulatedGpu())
    add_engines(own_engines, TILE_PX, target="tensorrt-rtx")
    with Upscaler(own_engines) as upscaler:
        assert upscaler(photo()).shape == (96, 160, 3)


def test_a_cache_that_tensorrt_does_not_give_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path, photo: Photo, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(RuntimeCache, "serialize", lambda self: None)
    install(monkeypatch, SimulatedGpu())
    add_engines(own_engines, TILE_PX, target="tensorrt-rtx")
    with Upscaler(own_engines) as upscaler:
        assert upscaler(photo()).shape == (96, 160, 3)
    assert list((tmp_path / "cache").rglob("*.bin")) == []


def test_at_the_end_of_the_process_a_context_goes_before_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path, photo: Photo, tmp_path: Path
) -> None:
    """There nothing is released in order: Python drops what is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gpu = SimulatedGpu()
    install(monkeypatch, gpu)
    add_engines(own_engines, TILE_PX, target="tensorrt-rtx")
    upscaler = Upscaler(own_engines)
    upscaler(photo(8, 8))  # one tile: no CUDA graph, which here would hold what runs
    upscaler._chain._finalizer.detach()  # type: ignore[attr-defined]
    del upscaler
    gc.collect()
    assert gpu.contexts == 0 and not gpu.orphaned


def test_shapes_that_tensorrt_cannot_follow_are_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, engines: Path
) -> None:
    def refuse(self: EngineContext) -> list[str]:
        raise RuntimeError("a size is negative")

    monkeypatch.setattr(EngineContext, "infer_shapes", refuse)
    with pytest.raises(BackendError, match="infer_shapes was refused .a size is negative"):
        Upscaler(engines, backend="tensorrt")
    assert released(gpu) == {}


def test_engines_of_another_model_of_gpu_are_left(
    monkeypatch: pytest.MonkeyPatch, own_engines: Path
) -> None:
    """Of one compute capability: TensorRT chose its kernels on the one that built them."""

    def built_on(engine: Engine, header: dict[str, Any]) -> Engine:
        return dataclasses.replace(engine, options={"gpu": "NVIDIA GeForce RTX 4090"})

    gpu = SimulatedGpu()
    install(monkeypatch, gpu)
    add_engines(own_engines, TILE_PX, change=built_on)
    for name, fits in ((b"NVIDIA GeForce RTX 4090", True), (b"NVIDIA L4", False)):
        gpu.name = name
        if fits:
            Upscaler(own_engines, backend="tensorrt").close()
            continue
        with pytest.raises(EngineMismatch, match="built on a NVIDIA GeForce RTX 4090, this GPU is"):
            Upscaler(own_engines, backend="tensorrt")


def test_an_engine_for_one_model_of_gpu_says_which(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu
) -> None:
    gpu.name = b"NVIDIA L4"
    config = EngineConfig(target="tensorrt")
    assert _one_model(config) == "NVIDIA L4"
    assert dataclasses.replace(config, gpu="NVIDIA L4").options == {"gpu": "NVIDIA L4"}
    for portable in ({"target": "tensorrt-rtx"}, {"hardware_compatibility": "ampere-plus"}):
        assert _one_model(dataclasses.replace(config, **portable)) == ""
