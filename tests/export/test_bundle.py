"""``rcod-export bundle``: what it writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rcod_export.parity
from rcod_export.bundle import ExportConfig, build_bundle
from rcod_export.main import main
from rcod_export.parity import Limit, measure
from rcod_runtime import Upscaler
from rcod_runtime.errors import ExportError, OutputError, ParityError
from rcod_runtime.image_io import read_image
from rcod_runtime.manifest import read_manifest, sha256_file
from rcod_train.checkpoint import save_merged
from rcod_train.errors import CheckpointError
from tests.tiny import tiny_info, tiny_parts


def test_the_manifest_describes_the_files(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle / "manifest.json")
    assert set(manifest.graphs) == {"encoder", "vpim", "denoiser", "decoder"}
    for graph in manifest.graphs.values():
        assert sha256_file(tiny_bundle / graph.file) == graph.sha256
        assert (tiny_bundle / graph.file).stat().st_size == graph.bytes
    assert [level.timestep for level in manifest.levels] == [250, 500, 750]
    assert (tiny_bundle / "MODEL_CARD.md").read_text().startswith("# tiny")


def test_parity_is_recorded_for_each_graph_and_each_level(tiny_bundle: Path) -> None:
    evidence = read_manifest(tiny_bundle / "manifest.json").evidence
    rows = {(row.graph, row.level) for row in evidence.parity}
    plain = {("encoder", None), ("encoder", "m_l"), ("vpim", None), ("decoder", None)}
    assert rows == plain | {("denoiser", name) for name in ("fidelity", "neutral", "realism")}
    for row in evidence.parity:
        assert 0 < row.max_abs <= row.limit_max_abs
        assert row.limit_cosine <= row.cosine
    assert evidence.sample_psnr_db is not None and evidence.sample_psnr_db >= 40


def test_the_runtime_gives_the_bundles_sample_again(tiny_bundle: Path) -> None:
    sample = read_manifest(tiny_bundle / "manifest.json").sample
    assert sample is not None
    lq, sr = (read_image(tiny_bundle / path).pixels for path in (sample.lq, sample.sr))
    with Upscaler(tiny_bundle, precision="fp32") as upscaler:
        found = upscaler(lq, realism=sample.realism)
    assert np.abs(found.astype(int) - sr.astype(int)).max() <= sample.max_abs_diff_u8


def test_an_export_is_repeatable_byte_for_byte(
    tiny_checkpoint: Path, tiny_bundle: Path, tiny_config: ExportConfig, tmp_path: Path
) -> None:
    build_bundle(tiny_checkpoint, tmp_path / "again", tiny_config)
    for path in tiny_bundle.rglob("*"):
        if path.is_file():
            again = tmp_path / "again" / path.relative_to(tiny_bundle)
            assert again.read_bytes() == path.read_bytes(), path.name


def test_a_graph_beyond_its_limit_is_refused_and_nothing_is_written(
    tiny_checkpoint: Path,
    tiny_config: ExportConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(rcod_export.parity.LIMITS, "denoiser", Limit(1e-12, 0.99999))
    with pytest.raises(ParityError, match="denoiser, level fidelity.*limit 1e-12"):
        build_bundle(tiny_checkpoint, tmp_path / "out", tiny_config)
    assert list(tmp_path.iterdir()) == []


def test_levels_that_give_the_same_image_are_refused(
    tiny_config: ExportConfig, tmp_path: Path
) -> None:
    """As when the timestep doesn't reach the network."""
    parts = tiny_parts()
    for name, parameter in parts.unet.named_parameters():
        if "time_emb_proj" in name:
            torch.nn.init.zeros_(parameter)
    levels = tiny_info().levels
    twin = dataclasses.replace(levels[0], name="neutral", timestep=levels[0].timestep + 1)
    checkpoint = tmp_path / "checkpoint"
    save_merged(checkpoint, parts, tiny_info(levels=(levels[0], twin, levels[2])))
    with pytest.raises(ParityError, match="fidelity and neutral"):
        build_bundle(checkpoint, tmp_path / "out", tiny_config)
    assert not (tmp_path / "out").exists()


def test_comparison_names_shapes_and_non_finite_values() -> None:
    limit = Limit(1e-4, 0.999)
    one = np.ones(3, np.float32)
    with pytest.raises(ParityError, match=r"shape \(3,\), ONNX \(2,\)"):
        measure("vpim", None, one, one[:2], limit)
    with pytest.raises(ParityError, match="not all values are finite"):
        measure("vpim", None, one, one * np.float32("nan"), limit)
    with pytest.raises(ParityError, match="cosine"):
        measure("vpim", None, np.float32([1e-5, 0]), np.float32([0, 1e-5]), limit)


def test_a_folder_that_is_no_bundle_is_not_replaced(
    tiny_checkpoint: Path, tiny_config: ExportConfig, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"mine")
    with pytest.raises(OutputError, match="is not a bundle"):
        build_bundle(tiny_checkpoint, tmp_path / "photos", tiny_config)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"mine"


def test_a_tile_size_the_network_cannot_take_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="multiple of 32"):
        build_bundle(tiny_checkpoint, tmp_path / "out", ExportConfig(tile_px=100))


def test_a_missing_checkpoint_is_named_with_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError):
        build_bundle(tmp_path / "none", tmp_path / "out", ExportConfig())
    code = main(["bundle", str(tmp_path / "none"), "-o", str(tmp_path / "out")])
    assert code == 9
    assert "rcod.json: not found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_fields_of_rcod_json_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    info = json.loads((tiny_checkpoint / "rcod.json").read_text())
    (tmp_path / "rcod.json").write_text(json.dumps(info | {"colour": "red"}))
    with pytest.raises(CheckpointError, match="unknown fields.*colour"):
        build_bundle(tmp_path, tmp_path / "out", ExportConfig())


@pytest.mark.parametrize("module", ["rcod_export.main", "rcod_train.main"])
def test_help_answers_without_torch(module: str) -> None:
    code = (
        "import sys, importlib\n"
        f"m = importlib.import_module({module!r})\n"
        "try:\n    m.main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'onnx', 'openvino', 'numpy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout
