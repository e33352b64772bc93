"""Graphs exported once, for tests of what comes before and after an export: it takes a minute."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import rcod_export.bundle
import rcod_export.onnx_file
from rcod_export.specs import GraphSpec
from rcod_runtime.manifest import Graph, read_manifest


@pytest.fixture
def exported_before(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """build_bundle writes the graphs of tiny_bundle in the place of exporting."""
    made = read_manifest(tiny_bundle / "manifest.json")

    def exported(spec: GraphSpec, folder: Path, opset: int) -> Graph:
        graph = made.graphs[spec.name]
        rcod_export.onnx_file._write(ir.load(tiny_bundle / graph.file), folder / graph.file)
        return graph

    monkeypatch.setattr(rcod_export.bundle, "_export", exported)
