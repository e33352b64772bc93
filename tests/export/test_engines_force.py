"""``rcod-export engines --force``, and what is not replaced without it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rcod_export.engines
from rcod_export.engines import EngineConfig, build_engines
from rcod_export.main import main
from rcod_runtime.bundle import Bundle
from rcod_runtime.errors import ExportError, UsageError
from rcod_runtime.manifest import Engine, read_manifest, sha256_file

HERE = {"version": "10.9.0", "gpu": "NVIDIA L4", "os": "linux-x86_64"}


class Machine:
    """What the builder finds here; ``built`` are the engines that it made."""

    def __init__(self) -> None:
        self.found, self.built = dict(HERE), list[str]()

    def build(self, opened: Bundle, wanted: Engine, *_: object) -> Engine:
        self.built.append(wanted.graph)
        path = opened.folder / wanted.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{wanted.version} {wanted.options} {wanted.os} {wanted.onnx_sha256}")
        return dataclasses.replace(wanted, sha256=sha256_file(path), bytes=path.stat().st_size)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    stands_in: dict[str, Any] = {
        "_build": machine.build,
        "load_tensorrt": lambda *_: SimpleNamespace(__version__=machine.found["version"]),
        "load_cuda": lambda *_: None,
        "sm_of": lambda *_: 89,
        "gpu_name": lambda *_: machine.found["gpu"],
        "operating_system": lambda: machine.found["os"],
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(rcod_export.engines, name, value)
    return machine


@pytest.fixture
def bundle(tiny_bundle: Path, machine: Machine, tmp_path: Path) -> Path:
    """With engines of this machine."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    build_engines(folder, EngineConfig(target="tensorrt"))
    assert len(machine.built) == 4
    machine.built.clear()
    return folder


def test_what_is_up_to_date_is_built_anew_where_that_is_asked_for(
    bundle: Path, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """As where TensorRT refuses an engine that is the one that was built."""
    argv = ["engines", str(bundle), "--target", "tensorrt"]
    assert main(argv) == 0 and machine.built == []
    assert main([*argv, "--force"]) == 0
    assert sorted(machine.built) == ["decoder", "denoiser", "encoder", "vpim"]
    assert "vpim.engine: building, --force was given" in caplog.text


def test_a_forced_build_that_is_interrupted_goes_on_without_force(
    bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after_one(opened: Bundle, wanted: Engine, *rest: object) -> Engine:
        if machine.built:
            raise ExportError("stopped")
        return machine.build(opened, wanted, *rest)

    config = EngineConfig(target="tensorrt")
    with monkeypatch.context() as patched:
        patched.setattr(rcod_export.engines, "_build", stop_after_one)
        with pytest.raises(ExportError, match="stopped"):
            build_engines(bundle, dataclasses.replace(config, force=True))
    assert len(read_manifest(bundle / "manifest.json").engines) == 1
    build_engines(bundle, config)
    assert len(machine.built) == len(set(machine.built)) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA GeForce RTX 4090"}, "for the NVIDIA GeForce RTX 4090 alone"),
        ({"os": "windows-amd64"}, "on windows-amd64"),
    ],
)
def test_engines_of_another_machine_are_replaced_by_force_alone(
    bundle: Path, machine: Machine, change: dict[str, str], words: str
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    machine.found |= change
    config = EngineConfig(target="tensorrt")
    was = "built on linux-x86_64 for the NVIDIA L4 alone"
    with pytest.raises(UsageError, match=rf"\.engine: {was}, and here .*{words}.*--force"):
        build_engines(bundle, config)
    assert machine.built == [] and (bundle / "manifest.json").read_bytes() == before
    build_engines(bundle, dataclasses.replace(config, force=True))
    assert len(machine.built) == 4
    build_engines(bundle, config)  # they are this one's now


def test_another_setting_replaces_this_machines_own_engines(bundle: Path, machine: Machine) -> None:
    build_engines(bundle, EngineConfig(target="tensorrt", batch=(1, 8), optimization_level=4))
    assert len(machine.built) == 4
    build_engines(bundle, EngineConfig(target="tensorrt", hardware_compatibility="ampere-plus"))
    build_engines(bundle, EngineConfig(target="tensorrt"))
    assert len(machine.built) == 12


def test_a_newer_tensorrt_replaces_what_the_older_one_built(bundle: Path, machine: Machine) -> None:
    machine.found |= {"version": "10.13.2"}
    build_engines(bundle, EngineConfig(target="tensorrt"))
    assert len(machine.built) == 4
