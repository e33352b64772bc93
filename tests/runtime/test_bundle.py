"""Manifests and bundles: one test for each way to be wrong."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcod_runtime import Upscaler
from rcod_runtime.bundle import open_bundle
from rcod_runtime.errors import BundleError, HashMismatch, ManifestError
from rcod_runtime.manifest import Level, Manifest, read_manifest

Change = Callable[[dict[str, Any]], object]


def test_a_manifest_comes_back_as_it_was_written(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    manifest = Manifest.from_json(text, "m")
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json(), "m") == manifest


def change_shapes(manifest: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """The same change to every axis of every tensor."""
    for graph in manifest["graphs"].values():
        for tensor in (*graph["inputs"], *graph["outputs"]):
            tensor["shape"] = [change(axis) for axis in tensor["shape"]]


def add_engine(manifest: dict[str, Any], **fields: Any) -> None:
    engine = {
        "file": "engines/vpim.engine", "sha256": "0" * 64, "bytes": 9, "graph": "vpim",
        "target": "tensorrt", "version": "10.9.0", "sm": [89], "os": "linux-x86_64",
        "profile": {"image": [[1, 3, 16, 16]] * 3}, "precision": "fp32", "options": {},
        "onnx_sha256": manifest["graphs"]["vpim"]["sha256"], "scratch_bytes": 10,
    }  # fmt: skip
    manifest["engines"] = [{**engine, **fields}]


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
    "tensors of one name": (
        lambda m: m["graphs"]["denoiser"]["inputs"].append(m["graphs"]["denoiser"]["inputs"][0]),
        "graphs.denoiser.inputs.*own name",
    ),
    "another format of graphs": (
        lambda m: m["graphs"]["vpim"].update(file="onnx/vpim.xml"),
        "ends in .onnx",
    ),
    "many files of weights": (
        lambda m: m["graphs"]["vpim"].update(data_files={f"{i}.bin": "0" * 64 for i in range(17)}),
        "at most 16 files",
    ),
    "a thumbnail of another size": (lambda m: m["image"].update(tokens_px=17), "3, 17, 17"),
    "graphs that don't fit together": (
        lambda m: m["graphs"]["decoder"]["inputs"][0].update(
            shape=["batch", 4, "height/8", "width/8"]
        ),
        r"graphs.decoder.inputs\[0\].shape.*batch, 192, height/8",
    ),
    "latents that tiles don't divide into": (
        lambda m: change_shapes(m, lambda x: f"{x.partition('/')[0]}/7" if "/8" in str(x) else x),
        "k divides 32",
    ),
    "an axis without a name for it": (
        lambda m: m["graphs"]["decoder"]["outputs"][0].update(shape=["batch", 3, "h", "width"]),
        "a length, or batch, height or width",
    ),
    "tensors beyond memory": (
        lambda m: (
            m["image"].update(tile_px=128),
            change_shapes(m, lambda x: 2**20 if x == 192 else x),
        ),
        "at most 67108864 values",
    ),
    "a sample at an unknown level": (
        lambda m: m.update(
            sample={
                "lq": "a",
                "sr": "b",
                "realism": "dream",
                "lq_sha256": "0" * 64,
                "sr_sha256": "0" * 64,
                "max_abs_diff_u8": 0,
            }
        ),
        "sample.realism.*one of fidelity",
    ),
    "an engine of a graph that is not there": (lambda m: add_engine(m, graph="guide"), "engines"),
    "an engine beyond any size": (lambda m: add_engine(m, bytes=2**40), r"engines\[0\].bytes"),
    "scratch beyond any size": (lambda m: add_engine(m, scratch_bytes=2**40), "scratch_bytes"),
    "an engine's shapes beyond any size": (
        lambda m: add_engine(m, profile={"image": [[1], [1], [2**21]]}),
        r"engines\[0\].profile",
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


def test_a_manifest_with_engines_and_a_sample_is_read(bundle: Path) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    add_engine(raw)
    assert len(Manifest.from_json(json.dumps(raw), "m").engines) == 1


def test_a_link_inside_the_bundle_is_refused_too(own_bundle: Path) -> None:
    """Files named relative to a graph would be taken from beside the link's target."""
    path = own_bundle / "onnx/vpim.onnx"
    (own_bundle / "other").mkdir()
    path.rename(own_bundle / "other/vpim.onnx")
    path.symlink_to("../other/vpim.onnx")
    with pytest.raises(BundleError, match="vpim.onnx: expected a file of its own, found a link"):
        open_bundle(own_bundle)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", ["manifest.json", "onnx/vpim.onnx"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(own_bundle: Path, name: str) -> None:
    (own_bundle / name).unlink()
    os.mkfifo(own_bundle / name)
    with pytest.raises(BundleError, match="a pipe|no regular file"):
        open_bundle(own_bundle)


@pytest.mark.parametrize("name", ["manifest.json", "onnx/vpim.onnx"])
def test_a_link_to_itself_is_a_bundle_error(own_bundle: Path, name: str) -> None:
    (own_bundle / name).unlink()
    (own_bundle / name).symlink_to(Path(name).name)
    with pytest.raises(BundleError):
        open_bundle(own_bundle)


def test_a_manifest_that_is_a_link_out_is_refused(own_bundle: Path, tmp_path: Path) -> None:
    (own_bundle / "manifest.json").rename(tmp_path / "outside.json")
    (own_bundle / "manifest.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(BundleError, match="manifest.json: leads out of the bundle"):
        open_bundle(own_bundle)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_folder_that_cannot_be_named_is_a_bundle_error(name: str) -> None:
    with pytest.raises(BundleError):
        open_bundle(name)


def test_weights_beyond_any_size_are_refused_before_they_are_hashed(own_bundle: Path) -> None:
    raw = json.loads((own_bundle / "manifest.json").read_text())
    raw["graphs"]["vpim"]["data_files"] = {"onnx/vpim.data": "0" * 64}
    (own_bundle / "manifest.json").write_text(json.dumps(raw))
    with (own_bundle / "onnx/vpim.data").open("wb") as file:
        file.truncate(2**34 + 1)  # sparse
    with pytest.raises(BundleError, match="vpim.data: expected at most 17179869184 bytes"):
        open_bundle(own_bundle)


def test_keys_of_a_manifest_do_not_steer_the_terminal(bundle: Path) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["\x1b[2J" + "x" * 100_000] = 1
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(json.dumps(raw), "m")
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_manifest_of_the_largest_size_is_refused_in_time(bundle: Path) -> None:
    """Type hints were looked up anew for every object: ten seconds."""
    raw = json.loads((bundle / "manifest.json").read_text())
    tensor = raw["graphs"]["vpim"]["inputs"][0]
    raw["graphs"]["vpim"]["inputs"] = [{**tensor, "name": f"t{i}"} for i in range(30_000)]
    text = json.dumps(raw)
    assert 2**20 < len(text) < 2**22
    begin = time.process_time()
    with pytest.raises(ManifestError, match="graphs.vpim.inputs"):
        Manifest.from_json(text, "m")
    assert time.process_time() - begin < 5
