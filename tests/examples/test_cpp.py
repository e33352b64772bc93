"""The C++ consumer, built with CMake, gives the pixels of the Python runtime.

Needs cmake, a C++ compiler and the headers of ONNX Runtime and nlohmann/json: in the system's
folders, or below the folder that RCOD_CPP_HEADERS names (.ci/cpp_headers fetches them).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from benchmarks.picture import draw_picture
from rcod_runtime import Upscaler
from rcod_runtime.bundle import default_bundle_path

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
HEADERS = Path(os.environ.get("RCOD_CPP_HEADERS", "/")) / "usr"


def need_header(name: str) -> None:
    below = ("include", "include/onnxruntime", "include/x86_64-linux-gnu", "local/include")
    if not any((HEADERS / folder / name).is_file() for folder in below):
        pytest.skip(f"{name} is not installed; see this file's head")


def build(folder: Path, *options: str) -> Path:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    prefixes = f"-DCMAKE_PREFIX_PATH={folder};{HEADERS}"
    flags = "-DCMAKE_CXX_FLAGS=-Werror"
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(folder / "build"), prefixes, flags, *options],
        ["cmake", "--build", str(folder / "build")],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "rcod_upscale"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the system's headers and the library of the Python package."""
    need_header("onnxruntime_cxx_api.h")
    need_header("nlohmann/json.hpp")
    libraries = list((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this onnxruntime package has no shared library")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "lib" / name).symlink_to(libraries[0])
    return build(folder)


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def upscaler() -> Upscaler:
    return Upscaler(device="cpu", backend="onnxruntime", precision="fp32")


@pytest.mark.parametrize(
    ("height", "width", "realism"),
    [
        (128, 128, "neutral"),  # one tile
        (37, 53, "fidelity"),  # a tile that is filled up
        (1, 1, "realism"),
        (130, 301, "0.7"),  # several tiles both ways, smaller ones, between two levels
        (120, 370, "neutral"),  # tiles of the usual size
    ],
)
def test_the_pixels_are_those_of_the_python_runtime(
    program: Path, upscaler: Upscaler, tmp_path: Path, height: int, width: int, realism: str
) -> None:
    lq = draw_picture(height, width)
    Image.fromarray(lq).save(tmp_path / "lq.ppm")
    done = run(program, default_bundle_path(), tmp_path / "lq.ppm", tmp_path / "sr.ppm", realism)
    assert done.returncode == 0, done.stderr
    sr = np.asarray(Image.open(tmp_path / "sr.ppm"))
    setting = float(realism) if realism[0].isdigit() else realism
    expected = upscaler(lq, setting)
    assert sr.shape == expected.shape == (4 * height, 4 * width, 3)
    difference = np.abs(sr.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lq.ppm", "sr.ppm"]


def test_what_it_cannot_do_is_said_and_nothing_is_written(program: Path, tmp_path: Path) -> None:
    Image.fromarray(draw_picture(8, 8)).save(tmp_path / "lq.ppm")
    (tmp_path / "cut.ppm").write_bytes((tmp_path / "lq.ppm").read_bytes()[:-1])
    (tmp_path / "manifest.json").write_text('{"version": 2}')
    bundle, lq, sr = default_bundle_path(), tmp_path / "lq.ppm", tmp_path / "sr.ppm"
    for arguments, words in (
        ((), "usage: rcod_upscale BUNDLE"),
        ((tmp_path / "none", lq, sr), "no manifest.json; is it a bundle?"),
        ((tmp_path, lq, sr), "expected version 1, found 2"),
        ((bundle, tmp_path / "cut.ppm", sr), "the image ends too early"),
        ((bundle, tmp_path / "manifest.json", sr), "expected a PPM image"),
        ((bundle, lq, sr, "loud"), "realism loud: expected a level's name or 0 to 1"),
        ((bundle, lq, sr, "1.5"), "realism 1.5: expected"),
        ((bundle, lq, tmp_path / "none" / "sr.ppm"), "can't be written"),
    ):
        done = run(program, *arguments)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert not sr.exists()


def test_without_a_choice_the_middle_level_is_taken(program: Path, tmp_path: Path) -> None:
    """Of a bundle whose levels have other names, or that was folded to one."""
    manifest = json.loads((default_bundle_path() / "manifest.json").read_text())
    for level, name in zip(manifest["levels"], "abc", strict=True):
        level["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "onnx").symlink_to(default_bundle_path() / "onnx")
    Image.fromarray(draw_picture(8, 8)).save(tmp_path / "lq.ppm")
    results = []
    for arguments in ((), ("b",)):
        done = run(program, tmp_path, tmp_path / "lq.ppm", tmp_path / "sr.ppm", *arguments)
        assert done.returncode == 0, done.stderr
        results.append((tmp_path / "sr.ppm").read_bytes())
    assert results[0] == results[1]


# What the program calls of TensorRT and CUDA: engines say what they are, and compute nothing.
TENSORRT_HEADER = """
#pragma once
#include <cstdint>
#include <iostream>
#include <string>
namespace nvinfer1 {
enum class TensorIOMode { kINPUT, kOUTPUT };
struct Dims { int32_t nbDims; int64_t d[8]; };
struct ILogger {
    enum class Severity { kERROR, kWARNING };
    virtual ~ILogger() = default;
    virtual void log(Severity, const char*) noexcept = 0;
};
struct IExecutionContext {
    bool setTensorAddress(const char*, void*) { return true; }
    bool setInputShape(const char*, const Dims&) { return true; }
    Dims getTensorShape(const char*) { return {}; }
    bool enqueueV3(void*) { return false; }
};
struct ICudaEngine {
    IExecutionContext* createExecutionContext() { return new IExecutionContext; }
    int32_t getNbIOTensors() { return 0; }
    const char* getIOTensorName(int32_t) { return ""; }
    TensorIOMode getTensorIOMode(const char*) { return TensorIOMode::kINPUT; }
};
struct IRuntime {
    ICudaEngine* deserializeCudaEngine(const void* plan, size_t bytes) {
        std::cerr << "loaded " << std::string(static_cast<const char*>(plan), bytes) << "\\n";
        return new ICudaEngine;
    }
};
inline IRuntime* createInferRuntime(ILogger&) { return new IRuntime; }
}
extern "C" inline int32_t getInferLibVersion() noexcept { return 101302; }
"""
CUDA_HEADER = """
#pragma once
#include <cstddef>
#include <cstdlib>
using cudaError_t = int;
using cudaStream_t = void*;
struct cudaDeviceProp { char name[256]; int major, minor; };
enum { cudaSuccess, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaStreamNonBlocking };
inline const char* cudaGetErrorString(int) { return ""; }
inline int cudaGetDeviceProperties(cudaDeviceProp* device, int) {
    *device = {"NVIDIA L4", 8, 9};
    return 0;
}
inline int cudaMalloc(void** pointer, size_t bytes) { *pointer = std::malloc(bytes); return 0; }
inline int cudaFree(void* pointer) { std::free(pointer); return 0; }
inline int cudaMemcpyAsync(void*, const void*, size_t, int, cudaStream_t) { return 0; }
inline int cudaStreamCreateWithFlags(cudaStream_t*, int) { return 0; }
inline int cudaStreamSynchronize(cudaStream_t) { return 0; }
inline int cudaStreamDestroy(cudaStream_t) { return 0; }
"""


@pytest.fixture(scope="module")
def tensorrt_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_header("nlohmann/json.hpp")
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / "NvInferRuntime.h").write_text(TENSORRT_HEADER)
    (folder / "cuda_runtime_api.h").write_text(CUDA_HEADER)
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-DRCOD_TENSORRT"]
    command += ["-I", str(folder), "-I", str(HEADERS / "include"), str(SOURCE / "rcod_upscale.cpp")]
    done = subprocess.run([*command, "-o", str(folder / "a")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "a"


def with_engines(folder: Path, *engines: dict[str, object]) -> Path:
    """A bundle with a set of engines for each: tile, and what differs from a whole one."""
    manifest = json.loads((default_bundle_path() / "manifest.json").read_text())
    manifest["engines"] = []
    for changes in engines:
        kind = {
            "sm": [89],
            "target": "tensorrt",
            "version": "10.13.2.6",
            "os": f"linux-{platform.machine()}",
            "options": {},
            "least": 1,
            "graphs": manifest["graphs"],
        } | changes
        tile = kind["tile"]
        for graph in kind["graphs"]:
            file = f"engines/{kind['target']}/{tile}px/{graph}.engine"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(f"{graph} {tile}")
            shapes = [[batch, 3, tile, tile] for batch in (kind["least"], 4, 4)]
            entry = {"file": file, "graph": graph, "profile": {"image": shapes}}
            own = ("sm", "target", "version", "os", "options")
            manifest["engines"].append(entry | {key: kind[key] for key in own})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("engines", "tile"),
    [
        ([{"tile": 256}, {"tile": 512}, {"tile": 768}], 512),  # the bundle's own
        ([{"tile": 256}, {"tile": 768}], 256),
        ([{"tile": 512, "graphs": ["encoder", "decoder"]}, {"tile": 256}], 256),
        ([{"tile": 512, "least": 2}, {"tile": 256}], 256),
        ([{"tile": 512, "sm": [90]}, {"tile": 512, "target": "tensorrt-rtx"}], None),
        ([{"tile": 512, "options": {"gpu": "NVIDIA L40S"}}, {"tile": 256}], 256),
        ([{"tile": 512, "options": {"gpu": "NVIDIA L4"}}], 512),
        ([{"tile": 512, "os": "windows-amd64"}], None),
        ([{"tile": 512, "version": "10.1.0"}, {"tile": 256, "version": "10.13.0.35"}], 256),
    ],
)
def test_engines_of_one_set_are_loaded_once_each(
    tensorrt_program: Path, tmp_path: Path, engines: list[dict[str, object]], tile: int | None
) -> None:
    bundle = with_engines(tmp_path, *engines)
    Image.fromarray(draw_picture(8, 8)).save(tmp_path / "lq.ppm")
    done = run(tensorrt_program, bundle, tmp_path / "lq.ppm", tmp_path / "sr.ppm")
    graphs = () if tile is None else ("decoder", "denoiser", "encoder", "vpim")
    *loaded, why = done.stderr.splitlines()
    assert loaded == [f"loaded {graph} {tile}" for graph in graphs]
    missing = "no engines for single tiles on SM 89 (NVIDIA L4, linux-"
    expected = missing if tile is None else "can't run the graph"
    assert done.returncode == 1 and expected in why


def test_the_tensorrt_variant_compiles(tmp_path: Path) -> None:
    for header in ("NvInferRuntime.h", "nlohmann/json.hpp"):
        need_header(header)
    build(tmp_path, "-DTENSORRT=ON")
