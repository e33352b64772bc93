"""Graphs exported once, for tests of what comes before and after an export: it takes a minute."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest

import rcod_export.bundle
import rcod_export.onnx_file
from rcod_export.specs import GraphSpec
from rcod_runtime.manifest import Graph, read_manifest, sha256_file


@pytest.fixture
def exported_before(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """build_bundle writes the graphs of tiny_bundle in the place of exporting."""
    take_exported(tiny_bundle, monkeypatch)


def take_exported(bundle: Path, monkeypatch: pytest.MonkeyPatch, but: tuple[str, ...] = ()) -> None:
    """build_bundle exports the graphs ``but`` alone and writes those of ``bundle`` for the rest."""
    made = read_manifest(bundle / "manifest.json")
    export = rcod_export.bundle._export

    def exported(spec: GraphSpec, folder: Path, opset: int) -> Graph:
        if spec.name in but:
            return export(spec, folder, opset)
        graph = made.graphs[spec.name]
        path = folder / graph.file
        data_files = rcod_export.onnx_file._write(ir.load(bundle / graph.file), path)
        return dataclasses.replace(
            graph,
            sha256=sha256_file(path),
            bytes=path.stat().st_size,
            data_files={f"onnx/{name}": sha256_file(path.with_name(name)) for name in data_files},
        )

    monkeypatch.setattr(rcod_export.bundle, "_export", exported)
