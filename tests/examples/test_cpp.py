"""The C++ consumer, built with CMake, gives the pixels of the Python runtime.

Needs cmake, a C++ compiler and the headers of ONNX Runtime and nlohmann/json: in the system's
folders, or below the folder that RCOD_CPP_HEADERS names (.ci/cpp_headers fetches them).
"""

from __future__ import annotations

import os
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
        (130, 301, "0.7"),  # several tiles both ways, between two levels
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


def test_the_tensorrt_variant_compiles(tmp_path: Path) -> None:
    for header in ("NvInferRuntime.h", "nlohmann/json.hpp"):
        need_header(header)
    build(tmp_path, "-DTENSORRT=ON")
