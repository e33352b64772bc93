"""The wheel that ``pip install`` makes of this repository: what is in it and what is not."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rcod_runtime", "rcod_train", "rcod_export")
LIMIT_BYTES = 45 * 2**20  # the embedded model has 34 MB


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It is built of a copy: setuptools leaves a folder of what it built, and takes up again what
    lies there."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")  # others write there meanwhile
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]  # without network
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.iterdir()
    assert wheel.stat().st_size < LIMIT_BYTES
    return wheel


@pytest.fixture(scope="module")
def names(wheel: Path) -> dict[str, int]:
    """Names in the wheel and their sizes."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def test_every_module_and_the_embedded_model_are_in_it(names: dict[str, int]) -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                assert names.get(name) == path.stat().st_size, name


def test_nothing_else_is(names: dict[str, int]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_every_command_has_an_entry_point_that_exists(wheel: Path, names: dict[str, int]) -> None:
    (listing,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    parser = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        parser.read_string(archive.read(listing).decode())
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == {
        "rcod-upscale", "rcod-doctor", "rcod-serve", "rcod-train", "rcod-export",
    }  # fmt: skip
    for target in scripts.values():
        module, function = target.split(":")
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert f"def {function}(" in source


def test_the_module_is_a_command_too() -> None:
    command = [sys.executable, "-m", "rcod_runtime", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--realism" in done.stdout
