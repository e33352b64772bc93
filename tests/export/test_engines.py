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
from types import SimpleNamespace
from typing import Any

import pytest

import rcod_export.engines
from rcod_export.engines import EngineConfig, _out_of_date, build_engines, planned_engine
from rcod_export.main import main
from rcod_runtime.bundle import Bundle, open_bundle
from rcod_runtime.errors import (
    BundleError,
    ExportError,
    HashMismatch,
    ManifestError,
    OutputError,
    UsageError,
)
from rcod_runtime.manifest import Engine, Tensor, read_manifest, sha256_file

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


def test_an_interrupted_rebuild_leaves_no_set_of_old_and_new_engines(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in one folder, and the encoder's batch is taken for all."""
    left = 4

    def build(opened: Bundle, wanted: Engine, *_: object) -> Engine:
        nonlocal left
        if not left:
            raise ExportError("stopped")
        left -= 1
        return fake_build(opened, wanted)

    monkeypatch.setattr(rcod_export.engines, "_build", build)
    build_engines(bundle, config)
    left = 1
    with pytest.raises(ExportError, match="stopped"):
        build_engines(bundle, dataclasses.replace(config, batch=(1, 8)))
    engines = read_manifest(bundle / "manifest.json").engines
    assert sorted(engine.graph for engine in engines) == ["encoder", "vpim"]  # vpim's is the same
    left = 2
    build_engines(bundle, dataclasses.replace(config, batch=(1, 8)))
    assert len(read_manifest(bundle / "manifest.json").engines) == 4


def fake_build(opened: Bundle, wanted: Engine, *_: object) -> Engine:
    path = opened.folder / wanted.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(wanted.profile))
    return dataclasses.replace(wanted, sha256=sha256_file(path), bytes=path.stat().st_size)


def test_an_engine_is_on_the_disk_before_it_has_its_name(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else after a power cut the manifest could speak of an empty file."""
    synced: set[int] = set()
    sync, rename = os.fsync, Path.replace

    def synchronise(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        sync(handle)

    def replace(self: Path, target: Path) -> Path:
        assert self.stat().st_ino in synced, target
        return rename(self, target)

    def run(job: Any, *_: object) -> dict[str, int]:
        Path(job.out).write_bytes(b"engine")
        return {"scratch_bytes": 0}

    monkeypatch.setattr(rcod_export.engines, "_run", run)
    monkeypatch.setattr(os, "fsync", synchronise)
    monkeypatch.setattr(Path, "replace", replace)
    assert len(build_engines(bundle, config).engines) == 4


def test_a_second_process_on_a_bundle_is_refused(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wrote its own manifest over the other's, so that one's engines were lost."""
    refused: list[str] = []

    def build(opened: Bundle, wanted: Engine, *_: object) -> Engine:
        if not refused:
            with pytest.raises(OutputError, match="another process builds its engines") as second:
                build_engines(bundle, dataclasses.replace(config, sms=(75,)))
            refused.append(str(second.value))
        return fake_build(opened, wanted)

    monkeypatch.setattr(rcod_export.engines, "_build", build)
    build_engines(bundle, config)
    assert len(refused) == 1 and len(read_manifest(bundle / "manifest.json").engines) == 4
    build_engines(bundle, dataclasses.replace(config, sms=(75,)))  # and it is free again
    assert len(read_manifest(bundle / "manifest.json").engines) == 8


def test_a_bundle_that_is_exported_again_meanwhile_keeps_its_manifest(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle / "manifest.json"
    manifest = read_manifest(path)
    image = dataclasses.replace(manifest.image, overlap_px=manifest.image.overlap_px - 8)
    newer = dataclasses.replace(manifest, image=image).to_json()

    def build(opened: Bundle, wanted: Engine, *_: object) -> Engine:
        path.write_text(newer, encoding="utf-8")
        return fake_build(opened, wanted)

    monkeypatch.setattr(rcod_export.engines, "_build", build)
    with pytest.raises(OutputError, match="its manifest was changed while engines/.* Run again"):
        build_engines(bundle, config)
    assert path.read_text(encoding="utf-8") == newer


@pytest.mark.parametrize("link", ["engines", "engines/tensorrt-rtx/sm89-sm120/64px"])
def test_engines_are_not_written_through_a_link_of_the_bundle(
    bundle: Path, config: EngineConfig, tmp_path: Path, link: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle / link).parent.mkdir(parents=True, exist_ok=True)
    (bundle / link).symlink_to(outside)
    with pytest.raises(BundleError, match="expected a folder for engines, found a link to"):
        build_engines(bundle, config)
    assert list(outside.iterdir()) == []


def test_a_log_that_cannot_be_written_is_not_taken_for_a_full_disk(
    bundle: Path, config: EngineConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    wrong = dataclasses.replace(config, cache=tmp_path / "file" / "cache")
    with pytest.raises(OutputError, match=r"cache/logs/.*\.log: .*Set XDG_CACHE_HOME"):
        build_engines(bundle, wrong)


def test_an_engine_that_cannot_be_read_is_built_again(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(rcod_export.engines, "sha256_file", refused)
    manifest = read_manifest(built / "manifest.json")
    reason = _out_of_date(built, manifest, manifest.engines[0])
    assert reason == "its file can't be read (Permission denied)"


def test_the_guide_of_an_engine_takes_the_photos_that_a_cpu_takes() -> None:
    """From one pixel on; its convolutions and mean have no smallest size."""
    manifest = open_bundle().manifest
    lq = Tensor("lq", "float32", ("batch", 3, "height/4", "width/4"), "NCHW")
    graph = dataclasses.replace(manifest.graphs["vpim"], inputs=(lq,))
    config = EngineConfig(sms=(89,), tile_px=512)
    profile = planned_engine(manifest, "guide", graph, config, "1").profile
    assert profile == {"lq": ((1, 3, 1, 1), (1, 3, 128, 128), (1, 3, 512, 512))}


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


def hang_until(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> list[Any]:
    """The builder hangs, and half a second after its start this process gets the signal; the list
    takes the builder's process."""
    replace_child(monkeypatch, HANG)
    processes: list[Any] = []
    real = rcod_export.engines.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        processes.append(real(command, **options))
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        return processes[-1]

    monkeypatch.setattr(rcod_export.engines.subprocess, "Popen", popen)
    return processes


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
    processes = hang_until(monkeypatch, signal.SIGINT)
    # A shell's background job has Ctrl-C ignored, and so would this test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engines(bundle, config)
    finally:
        signal.signal(signal.SIGINT, before)
    assert processes[0].poll() is not None
    assert partials(bundle) == [] and read_manifest(bundle / "manifest.json").engines == ()


def test_sigterm_ends_the_builder_too(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = hang_until(monkeypatch, signal.SIGTERM)
    # Without a handler of the command the test fails, and does not end the run of all tests.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        assert main(["engines", str(bundle), "--timeout", "60"]) == 143
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.endswith("stopped\n")
    assert processes[0].poll() is not None and partials(bundle) == []


def test_a_full_disk_keeps_the_engines_that_are_done(
    built: Path, config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    (copy / "engines/tensorrt-rtx/sm89-sm120/64px/vpim.engine").unlink()

    rename = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.suffix == ".engine":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        build_engines(copy, config)
    monkeypatch.undo()
    assert partials(copy) == []
    assert len(read_manifest(copy / "manifest.json").engines) == 3


def test_sm_is_not_ignored_where_the_gpu_decides(
    bundle: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in {
        "load_tensorrt": SimpleNamespace(__version__="11.4.0"),
        "sm_of": 90,
    }.items():
        monkeypatch.setattr(rcod_export.engines, name, lambda *_, answer=answer: answer)
    with pytest.raises(UsageError, match="--sm 89 120: --target tensorrt builds for .* sm_90"):
        build_engines(bundle, dataclasses.replace(config, target="tensorrt"))


@pytest.mark.parametrize("option", ["--workspace", "--timeout"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e300"])
def test_amounts_that_are_none_are_wrong_arguments(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["engines", "bundle", f"{option}={value}"])
    assert stop.value.code == 2
    assert f"{option}: expected a number above 0, at most 1000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
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
