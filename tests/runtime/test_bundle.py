"""Manifests and bundles: one test for each way to be wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcod_runtime import Upscaler
from rcod_runtime.bundle import open_bundle
from rcod_runtime.errors import BundleError, HashMismatch, ManifestError
from rcod_runtime.manifest import Level, Manifest, read_manifest

Change = Callable[[dict[str, Any]], None]


def test_a_manifest_comes_back_as_it_was_written(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    manifest = Manifest.from_json(text, "m")
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json(), "m") == manifest


WRONG: dict[str, tuple[Change, str]] = {
    "unknown field": (lambda m: m.update(colour=1), '"colour".*unknown field'),
    "unknown inner field": (lambda m: m["image"].update(x=1), '"image.x".*unknown field'),
    "missing field": (lambda m: m["identity"].pop("licence"), '"identity.licence".*no such field'),
    "newer version": (lambda m: m.update(version=2), '"version": expected 1, found 2. Upgrade'),
    "older version": (lambda m: m.update(version=0), '"version": expected 1, found 0'),
    "text for a number": (
        lambda m: m["levels"][1].update(timestep="5OO"),
        r'"levels\[1\].timestep": expected an integer, found "5OO"',
    ),
    "true for a number": (lambda m: m["levels"][0].update(timestep=True), "timestep"),
    "timestep out of range": (lambda m: m["levels"][0].update(timestep=0), "1..1000"),
    "constants that don't fit": (lambda m: m["levels"][0].update(sigma=0.1), "sigma"),
    "levels out of order": (lambda m: m["levels"].reverse(), "timestep"),
    "levels of one name": (lambda m: m["levels"][1].update(name="fidelity"), "own name"),
    "no levels": (lambda m: m.update(levels=[]), "levels"),
    "metric turned round": (lambda m: m["metric"].update(m_max=-0.5), "metric.m_max"),
    "tile not a multiple": (lambda m: m["image"].update(tile_px=70), "image.tile_px"),
    "overlap too large": (lambda m: m["image"].update(overlap_px=40), "image.overlap_px"),
    "graph missing": (lambda m: m["graphs"].pop("vpim"), "graphs"),
    "absolute path": (lambda m: m["graphs"]["vpim"].update(file="/etc/passwd"), "inside"),
    "path that climbs": (lambda m: m["graphs"]["vpim"].update(file="../x.onnx"), "inside"),
    "windows path": (lambda m: m["graphs"]["vpim"].update(file="a\\b.onnx"), "inside"),
    "hash of another kind": (lambda m: m["graphs"]["vpim"].update(sha256="abc"), "SHA-256"),
    "unknown precision": (lambda m: m["graphs"]["vpim"].update(precision="int3"), "precision"),
    "axes that don't fit": (
        lambda m: m["graphs"]["vpim"]["inputs"][0].update(layout="N"),
        r"graphs.vpim.inputs\[0\].shape",
    ),
    "weights for other levels": (
        lambda m: m["graphs"]["denoiser"]["inputs"][2].update(shape=["batch", 7]),
        "3 weights",
    ),
    "object for a list": (lambda m: m.update(engines={}), "engines"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_is_refused_with_the_field(bundle: Path, case: str) -> None:
    change, message = WRONG[case]
    raw = json.loads((bundle / "manifest.json").read_text())
    changed = copy.deepcopy(raw)
    change(changed)
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest.from_json(json.dumps(changed), "x/manifest.json")
    assert str(caught.value).startswith("x/manifest.json: ")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": NaN}', '{"version": 1, "version": 1}', "[" * 100_000],
)
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="m: expected"):
        Manifest.from_json(text, "m")


def test_an_oversized_or_binary_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(b" " * (5 << 20))
    with pytest.raises(ManifestError, match="at most"):
        read_manifest(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(path)


def test_values_are_checked_when_an_object_is_made() -> None:
    with pytest.raises(ManifestError, match='"timestep"'):
        Level("fidelity", 5000, 0.8, 0.6)


def test_a_missing_bundle_and_a_file_in_its_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nothing.*can't be read"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="found a file"):
        open_bundle(tmp_path / "file")


def test_a_missing_graph_is_named(own_bundle: Path) -> None:
    (own_bundle / "onnx/decoder.onnx").unlink()
    with pytest.raises(BundleError, match="decoder.onnx: the manifest names it"):
        Upscaler(own_bundle)


def test_a_changed_graph_is_refused_by_its_hash(own_bundle: Path) -> None:
    path = own_bundle / "onnx/denoiser.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(HashMismatch, match="denoiser.onnx: expected SHA-256"):
        Upscaler(own_bundle)
    path.write_bytes(data + b"x")
    with pytest.raises(HashMismatch, match="bytes, found"):
        Upscaler(own_bundle)


def test_a_link_out_of_the_bundle_is_refused(own_bundle: Path, tmp_path: Path) -> None:
    path = own_bundle / "onnx/vpim.onnx"
    outside = tmp_path / "outside.onnx"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Upscaler(own_bundle)
