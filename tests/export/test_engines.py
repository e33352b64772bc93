"""``rcod-export engines``: a real TensorRT-RTX builder, on the CPU, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

import rcod_export.engines
from rcod_export.engines import EngineConfig, build_engines
from rcod_export.main import main
from rcod_runtime.errors import ExportError, HashMismatch, ManifestError, OutputError, UsageError
from rcod_runtime.manifest import read_manifest, sha256_file

pytest.importorskip("tensorrt_rtx", reason='needs pip install "rcod[tensorrt-rtx]"')

GRAPHS = {"encoder", "vpim", "denoiser", "decoder"}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(sms=(89, 120), batch=(1, 2), cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def built(
    tiny_bundle: Path, config: EngineConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "tiny"))
    build_engines(bundle, config)
    return bundle


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


def partials(bundle: Path) -> list[Path]:
    return list(bundle.rglob("*.partial"))


def test_every_graph_has_an_engine_for_both_gpus(built: Path) -> None:
    manifest = read_manifest(built / "manifest.json")
    assert {engine.graph for engine in manifest.engines} == GRAPHS
    for engine in manifest.engines:
        path = built / engine.file
        assert path.stat().st_size == engine.bytes > 1000
        assert sha256_file(path) == engine.sha256
        assert engine.sm == (89, 120) and engine.scratch_bytes >= 0
        assert engine.onnx_sha256 == manifest.graphs[engine.graph].sha256
    denoiser = next(e for e in manifest.engines if e.graph == "denoiser")
    assert denoiser.profile["z_lq"] == ((1, 12, 8, 8), (2, 12, 8, 8), (2, 12, 8, 8))
    assert denoiser.profile["level"] == ((1, 3), (2, 3), (2, 3))


def test_what_is_up_to_date_is_not_built_again(
    built: Path, config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*.engine")}
    with caplog.at_level("INFO"):
        build_engines(built, config)
    assert caplog.text.count("up to date") == 4
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*.engine")} == before


def test_only_what_changed_is_built_and_the_reason_is_said(
    built: Path, config: EngineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    folder = copy / "engines" / "tensorrt-rtx" / "sm89-sm120" / "64px"
    (folder / "vpim.engine").unlink()
    (folder / "decoder.engine").write_bytes(b"other")
    with caplog.at_level("INFO"):
        build_engines(copy, config)
    assert "vpim.engine: building, its file is missing" in caplog.text
    assert "decoder.engine: building, its file was changed" in caplog.text
    assert caplog.text.count("up to date") == 2
    caplog.clear()
    with caplog.at_level("INFO"):
        build_engines(copy, dataclasses.replace(config, batch=(1, 1)))
    assert "denoiser.engine: building, profile was" in caplog.text
    assert "vpim.engine: up to date" in caplog.text  # it always runs once
    caplog.clear()
    with caplog.at_level("INFO"):
        build_engines(copy, dataclasses.replace(config, batch=(1, 1), workspace_bytes=2**30))
    assert caplog.text.count("engine: building, options was {}, is {'workspace_bytes'") == 4


def test_an_engine_of_another_onnx_is_refused(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    path = copy / "manifest.json"
    raw = json.loads(path.read_text())
    raw["engines"][0]["onnx_sha256"] = "0" * 64
    path.write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match="rcod-export engines"):
        read_manifest(path)


def test_an_operator_the_parser_does_not_know_is_named(bundle: Path, config: EngineConfig) -> None:
    import onnx

    path = bundle / "onnx" / "vpim.onnx"
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    node.op_type = "Wobble"
    onnx.save(model, path)
    refresh(bundle, "vpim")
    with pytest.raises(
        ExportError, match=r"vpim.onnx: the ONNX parser refused it: op Wobble, node"
    ):
        build_engines(bundle, config)
    assert partials(bundle) == []


def test_a_damaged_graph_is_refused_before_building(bundle: Path, config: EngineConfig) -> None:
    with (bundle / "onnx" / "vpim.onnx").open("r+b") as file:
        file.write(b"\0\0")
    with pytest.raises(HashMismatch):
        build_engines(bundle, config)


def refresh(bundle: Path, graph: str) -> None:
    """Make the manifest agree with a changed ONNX file."""
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    file = bundle / raw["graphs"][graph]["file"]
    raw["graphs"][graph] |= {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    path.write_text(json.dumps(raw))


CRASH = "import os, sys; print('about to go', file=sys.stderr, flush=True); os.abort()"
HANG = "import time; time.sleep(600)"


def replace_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    real = rcod_export.engines.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        return real([command[0], "-c", code], **options)

    monkeypatch.setattr(rcod_export.engines.subprocess, "Popen", popen)


def test_a_crash_of_the_builder_is_reported_with_the_logs_end(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_child(monkeypatch, CRASH)
    with pytest.raises(
        ExportError, match=r"builder died \(signal SIGABRT\)[\s\S]*about to go"
    ) as e:
        build_engines(bundle, config)
    assert str(config.cache) in str(e.value)
    assert read_manifest(bundle / "manifest.json").engines == () and partials(bundle) == []


def test_a_build_that_takes_too_long_is_ended(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_child(monkeypatch, HANG)
    started = time.monotonic()
    with pytest.raises(ExportError, match="not built within 0.5 s. Give more with --timeout"):
        build_engines(bundle, dataclasses.replace(config, timeout_s=0.5))
    assert time.monotonic() - started < 60


def test_a_cancelled_build_leaves_no_process_and_no_half_file(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_child(monkeypatch, HANG)
    processes = []
    real = rcod_export.engines.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        processes.append(real(command, **options))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return processes[-1]

    monkeypatch.setattr(rcod_export.engines.subprocess, "Popen", popen)
    # A shell's background job has Ctrl-C ignored, and so would this test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engines(bundle, config)
    finally:
        signal.signal(signal.SIGINT, before)
    assert processes[0].poll() is not None
    assert partials(bundle) == [] and read_manifest(bundle / "manifest.json").engines == ()


def test_a_full_disk_keeps_the_engines_that_are_done(
    built: Path, config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    (copy / "engines/tensorrt-rtx/sm89-sm120/64px/vpim.engine").unlink()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        build_engines(copy, config)
    monkeypatch.undo()
    assert partials(copy) == []
    assert len(read_manifest(copy / "manifest.json").engines) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sms": ()}, "at least one --sm"),
        ({"batch": (4, 1)}, "smallest <= largest"),
        ({"batch": (0, 1)}, "1 <= smallest"),
        ({"tile_px": 100}, "a multiple of 32"),
        ({"hardware_compatibility": "ampere-plus"}, "TensorRT-RTX has no such engines"),
    ],
)
def test_settings_that_cannot_be_used(
    bundle: Path, config: EngineConfig, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        build_engines(bundle, dataclasses.replace(config, **changes))


def test_a_gpu_that_rtx_engines_do_not_know_is_named(bundle: Path, config: EngineConfig) -> None:
    with pytest.raises(ExportError, match="sm 90: tensorrt-rtx builds for SM75"):
        build_engines(bundle, dataclasses.replace(config, sms=(90,)))


def test_a_missing_library_says_the_pip_line(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ExportError, match=r'pip install "rcod\[tensorrt-rtx\]"'):
        build_engines(bundle, config)


def test_the_command(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["engines", str(built), "--sm", "89", "120", "--batch", "1", "2"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(built) and "denoiser.engine" in captured.err
    assert main(["engines", str(built / "none")]) == 4
    assert "Traceback" not in capsys.readouterr().err
