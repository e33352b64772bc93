"""A disk that runs full at each write of an export: nothing half-written, what was there stays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

import rcod_export.bundle
import rcod_export.onnx_file
from rcod_export.bundle import ExportConfig, build_bundle
from rcod_export.engines import _write_manifest
from rcod_runtime import Upscaler
from rcod_runtime.errors import OutputError
from rcod_runtime.manifest import read_manifest
from rcod_train.checkpoint import load_merged
from tests.faults import full_disk

resource = pytest.importorskip("resource", reason="no limits on files here")


@pytest.fixture
def export(
    exported_before: None,
    tiny_checkpoint: Path,
    tiny_config: ExportConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Path], object]:
    """build_bundle with all its writes; the graphs were exported and compared before."""
    loaded = load_merged(tiny_checkpoint)
    for name, replacement in {
        "load_merged": lambda _: loaded,
        "parity_cases": lambda *_: (),
        "photo_cases": lambda *_: (),
        "compare": lambda *_: (),
        "check_sample": lambda *_: 99.0,
    }.items():
        monkeypatch.setattr(rcod_export.bundle, name, replacement)
    return lambda out: build_bundle(tiny_checkpoint, out, tiny_config)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_at_every_write_of_an_export_a_full_disk_leaves_the_old_bundle(
    export: Callable[[Path], object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with full_disk(tmp_path, 0) as opened:
        export(out)
    names = [Path(name).name for name in opened]
    graphs = ["encoder.onnx", "decoder.onnx", "vpim.onnx", "denoiser.onnx"]
    assert names[:6] == [*graphs, "lq.png", "manifest.json"] and names[-1] == "MODEL_CARD.md"
    before = content(tmp_path)
    for number in range(1, len(names) + 1):
        with (
            pytest.raises(OutputError, match=r"out.* written \(File too large"),
            full_disk(tmp_path, number) as opened,
        ):
            export(out)
        assert len(opened) == number, names[number - 1]
        assert content(tmp_path) == before, names[number - 1]
    export(out)
    Upscaler(out).close()


def test_a_full_disk_at_weights_beside_a_graph_leaves_nothing(
    export: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rcod_export.onnx_file, "MAX_INLINE_BYTES", 1000)
    for number in (1, 2):
        with (
            pytest.raises(OutputError, match="out: could not be written"),
            full_disk(tmp_path, number) as opened,
        ):
            export(tmp_path / "out")
        assert Path(opened[0]).name == "encoder.onnx.data"
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_engines_manifest_leaves_the_old_one_and_its_signature(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(tiny_bundle / "manifest.json")
    (tmp_path / "manifest.json").write_text("old")
    (tmp_path / "manifest.sig").write_bytes(bytes(64))
    before = content(tmp_path)
    with pytest.raises(OutputError, match="manifest.json: can't"), full_disk(tmp_path, 1):
        _write_manifest(tmp_path, manifest)
    assert content(tmp_path) == before


def test_a_manifest_written_anew_drops_the_signature_and_says_so(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "manifest.sig").write_bytes(bytes(64))
    with caplog.at_level(logging.WARNING):
        _write_manifest(tmp_path, read_manifest(tiny_bundle / "manifest.json"))
    assert sorted(content(tmp_path)) == ["manifest.json"]
    assert "Sign again: rcod-export sign" in caplog.text
