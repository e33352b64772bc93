"""A tiny RCOD_O of Stable Diffusion's classes through the same export as nano."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from rcod_export.bundle import ExportConfig, build_bundle
from rcod_export.engines import EngineConfig, build_engines
from rcod_runtime import Upscaler
from rcod_runtime.manifest import read_manifest
from rcod_train.bases import load_base
from rcod_train.checkpoint import save_merged
from rcod_train.official import official_info
from tests.tiny_sd import save_base


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rcod_o")
    save_base(folder)
    parts = load_base(str(folder / "sd"), str(folder / "clip"))
    torch.manual_seed(4)
    torch.nn.init.normal_(parts.vpim.align.weight)
    save_merged(folder / "checkpoint", parts, official_info("tiny-rcod-o"))
    config = ExportConfig(tile_px=128, overlap_px=32)
    build_bundle(folder / "checkpoint", folder / "bundle", config)
    return folder / "bundle"


def test_parity_holds_per_graph_and_level(bundle: Path) -> None:
    manifest = read_manifest(bundle / "manifest.json")
    assert manifest.identity.family == "rcod-o" and not manifest.has_metric_estimator
    rows = [(row.graph, row.level) for row in manifest.evidence.parity]
    assert len(rows) == 6
    for row in manifest.evidence.parity:
        assert row.max_abs <= row.limit_max_abs


def test_no_time_embedding_remains(bundle: Path) -> None:
    model = onnx.load(bundle / "onnx" / "denoiser.onnx")
    assert not {node.op_type for node in model.graph.node} & {"Sin", "Cos"}
    assert not [tensor for tensor in model.graph.initializer if "time_emb" in tensor.name]


def test_it_upscales_an_odd_size(bundle: Path) -> None:
    lq = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    with Upscaler(bundle) as upscaler:
        assert upscaler(lq, "realism").shape == (148, 212, 3)


def test_real_engines_are_built_of_all_graphs(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "rcod[tensorrt-rtx]"')
    manifest = build_engines(bundle, EngineConfig(sms=(89, 120), batch=(1, 2), cache=tmp_path))
    assert {e.graph for e in manifest.engines} == {"encoder", "vpim", "denoiser", "decoder"}
    assert all((bundle / e.file).stat().st_size == e.bytes > 1000 for e in manifest.engines)
