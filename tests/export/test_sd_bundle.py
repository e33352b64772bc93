"""Tiny RCOD_O (trained for a few steps) and RCOD_S of Stable Diffusion's classes through the same
export as nano. RCOD_S has all of its U-Net's levels, RCOD_O two."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from benchmarks.picture import draw_picture
from rcod_export.bundle import ExportConfig, build_bundle
from rcod_export.engines import EngineConfig, build_engines
from rcod_export.onnx_file import export_onnx
from rcod_export.parity import compare
from rcod_export.reference import parity_cases, photo_cases, whole_images
from rcod_export.specs import graph_specs
from rcod_runtime import Upscaler
from rcod_runtime.errors import ManifestError
from rcod_runtime.manifest import Precision, read_manifest
from rcod_train.checkpoint import load_merged, save_merged
from rcod_train.main import main
from rcod_train.official import official_info
from rcod_train.schedule import alpha_sigma
from tests.runtime.simulated.cudart import SimulatedGpu
from tests.runtime.simulated.tensorrt import add_engines, install
from tests.tiny_sd import save_base, tiny_guided_parts, tiny_shallow_unet

CONFIG = ExportConfig(tile_px=128, overlap_px=32)
MOVED = (250, 500, 625)
CONFIGS = {"rcod-o": dataclasses.replace(CONFIG, timesteps=MOVED), "rcod-s": CONFIG}
GRAPHS = {
    "rcod-o": {"encoder", "vpim", "denoiser", "decoder"},
    "rcod-s": {"guide", "encoder", "vpim", "denoiser", "decoder"},
}


def train_rcod_o(folder: Path) -> None:
    """A few steps by the command; its checkpoint is ``folder``/rcod-o."""
    (folder / "photos").mkdir()
    for i in range(2):
        picture = np.roll(draw_picture(64, 80), 17 * i, axis=1)
        Image.fromarray(picture).save(folder / "photos" / f"{i}.png")
    settings = ["rcod.steps=3", "rcod.learning_rate=0.01", "rcod.accumulate=1", "mem.steps=2",
                "rcod.metric_samples=4", "rcod.crop_px=64", "rcod.context_px=64",
                "mem.crop_px=64", "mem.context_px=64"]  # fmt: skip
    argv = ["rcod-o", "--base", str(folder / "sd"), "--clip", str(folder / "clip"), "--no-lpips"]
    argv += ["--data", str(folder / "photos"), "--out", str(folder / "run"), "--workers", "0"]
    assert main([*argv, *(part for setting in settings for part in ("--set", setting))]) == 0
    (folder / "run" / "checkpoint").rename(folder / "rcod-o")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    save_base(folder)
    tiny_shallow_unet().save_pretrained(folder / "sd" / "unet")
    train_rcod_o(folder)
    guided = tiny_guided_parts()
    with torch.no_grad():
        guided.mem.mlp[0].bias.fill_(0.6)  # an estimate that falls between the bins
        guided.vae.decoder.conv_out.weight.mul_(0.2)  # as a trained one it stays inside [-1, 1]
    info = dataclasses.replace(official_info("tiny-rcod-s"), family="rcod-s")
    save_merged(folder / "rcod-s", guided, info)
    return folder


@pytest.fixture(scope="module", params=["rcod-o", "rcod-s"])
def bundle(request: pytest.FixtureRequest, checkpoints: Path) -> Path:
    folder = checkpoints / f"bundle-{request.param}"
    if not folder.exists():
        build_bundle(checkpoints / request.param, folder, CONFIGS[request.param])
    return folder


@pytest.fixture(scope="module")
def guided_bundle(checkpoints: Path) -> Path:
    folder = checkpoints / "bundle-rcod-s"
    if not folder.exists():
        build_bundle(checkpoints / "rcod-s", folder, CONFIG)
    return folder


def test_parity_holds_per_graph_and_level(bundle: Path) -> None:
    manifest = read_manifest(bundle / "manifest.json")
    assert set(manifest.graphs) == GRAPHS[manifest.identity.family]
    assert manifest.has_metric_estimator
    assert {row.graph for row in manifest.evidence.parity} == set(manifest.graphs)
    levels = [row.level for row in manifest.evidence.parity if row.graph == "denoiser"]
    assert levels == ["fidelity", "neutral", "realism"]
    for row in manifest.evidence.parity:
        assert row.max_abs <= row.limit_max_abs


@pytest.mark.parametrize("bundle", ["rcod-o"], indirect=True)
def test_levels_can_be_moved_to_other_timesteps(bundle: Path) -> None:
    """The export itself holds each against PyTorch called with that timestep."""
    levels = read_manifest(bundle / "manifest.json").levels
    names = ["fidelity", "neutral", "realism"]
    assert [(x.name, x.timestep) for x in levels] == list(zip(names, MOVED, strict=True))
    assert [(x.alpha, x.sigma) for x in levels] == [alpha_sigma(t) for t in MOVED]


def test_no_time_embedding_remains(bundle: Path) -> None:
    model = onnx.load(bundle / "onnx" / "denoiser.onnx")
    assert not {node.op_type for node in model.graph.node} & {"Sin", "Cos"}
    assert not [tensor for tensor in model.graph.initializer if "time_emb" in tensor.name]


def test_it_upscales_an_odd_size(bundle: Path) -> None:
    lq = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    with Upscaler(bundle) as upscaler:
        assert upscaler(lq, "realism").shape == (148, 212, 3)


def test_branches_stay_in_the_graphs_and_take_their_matrices_from_the_guide(
    guided_bundle: Path,
) -> None:
    manifest = read_manifest(guided_bundle / "manifest.json")
    for name, matrices in (("encoder", "vae_matrices"), ("denoiser", "unet_matrices")):
        assert matrices in {tensor.name for tensor in manifest.graphs[name].inputs}
        model = onnx.load(guided_bundle / manifest.graphs[name].file)
        weights = {tensor.name for tensor in model.graph.initializer}
        assert any("lora_A" in weight for weight in weights)
    shapes = {tensor.name: tensor.shape for tensor in manifest.graphs["guide"].outputs}
    assert shapes["vae_matrices"] == ("batch", 6, 3, 3)
    assert shapes["unet_matrices"] == ("batch", 10, 5, 5)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_the_runtime_feeds_the_guides_matrices_of_the_photo(
    guided_bundle: Path, checkpoints: Path, backend: str
) -> None:
    """Against PyTorch, for photos of several sizes: other photo, other branches."""
    parts, info = load_merged(checkpoints / "rcod-s")
    rng = np.random.default_rng(3)
    with Upscaler(guided_bundle, backend=backend, precision="fp32") as upscaler:
        for height, width in ((32, 32), (16, 48)):
            lq = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            expected = whole_images(photo_cases(parts, info, lq, 4))
            for level in info.levels:
                found = upscaler(lq, level.name, colour_match="none", tile_px=192, overlap_px=0)
                difference = np.abs(found.astype(int) - expected[level.name].astype(int))
                assert difference.max() <= 1, level.name


def test_with_a_guide_the_graphs_choose_the_adaptive_level_for_all_tiles(
    guided_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lq = np.random.default_rng(5).integers(0, 256, (80, 70, 3)).astype(np.uint8)
    with Upscaler(guided_bundle, precision="fp32") as upscaler:
        adaptive = upscaler(lq, "adaptive", batch=2)
        candidates = [upscaler(lq, x.name, batch=2) for x in upscaler.manifest.levels]
    equal = [np.array_equal(adaptive, candidate) for candidate in candidates]
    assert equal.count(True) == 1


@pytest.mark.parametrize("realism", ["adaptive", 0.3])
def test_the_tensorrt_backend_feeds_them_too(
    guided_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, realism: str | float
) -> None:
    """On the simulated device: guide and tokens once, a row for every tile of the batch."""
    folder = Path(shutil.copytree(guided_bundle, tmp_path / "copy"))
    add_engines(folder, tile_px=128, batch=(1, 2))
    install(monkeypatch, SimulatedGpu())
    with (
        Upscaler(folder, backend="tensorrt") as device,
        Upscaler(folder, backend="onnxruntime") as host,
    ):
        for size in ((40, 50), (60, 33)):
            lq = np.random.default_rng(5).integers(0, 256, (*size, 3)).astype(np.uint8)
            expected = host(lq, realism, tile_px=128, batch=2)
            np.testing.assert_array_equal(device(lq, realism), expected)


def test_a_guided_bundle_without_its_guide_is_refused(guided_bundle: Path, tmp_path: Path) -> None:
    text = (guided_bundle / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"rcod-s"', '"rcod-o"'))
    with pytest.raises(ManifestError, match="expected the graphs encoder, vpim"):
        read_manifest(tmp_path / "manifest.json")


def test_branches_in_half_hold_their_limits_and_the_guide_stays_in_fp32(
    checkpoints: Path, tmp_path: Path
) -> None:
    """Of the encoder; the denoiser's are the same modules, and minutes longer to export."""
    parts, info = load_merged(checkpoints / "rcod-s")
    cases = [case for case in parity_cases(parts, info) if case.graph == "encoder"]
    specs = graph_specs(parts, info, Precision.FP16, scale=4)
    guide, encoder = next(specs), next(specs)
    assert (guide.name, guide.precision) == ("guide", Precision.FP32)  # its phases
    assert (encoder.name, encoder.precision) == ("encoder", Precision.FP16)
    path = tmp_path / "encoder.onnx"
    export_onnx(encoder.module, encoder.inputs, encoder.outputs, encoder.dynamic, 20, path)
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds = {types.get(node.input[1]) for node in graph.node if node.op_type == "Conv"}
    assert kinds == {onnx.TensorProto.FLOAT16}
    rows = list(compare(cases, path, Precision.FP16, 4))
    assert rows and all(0 < row.max_abs <= row.limit_max_abs for row in rows)


def test_real_engines_are_built_of_all_graphs(guided_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "rcod[tensorrt-rtx]"')
    folder = Path(shutil.copytree(guided_bundle, tmp_path / "copy"))
    config = EngineConfig(sms=(89, 120), batch=(1, 2), cache=tmp_path)
    manifest = build_engines(folder, config)
    assert {engine.graph for engine in manifest.engines} == set(manifest.graphs)
    for engine in manifest.engines:
        assert (folder / engine.file).stat().st_size == engine.bytes > 1000
        assert engine.precision is manifest.graphs[engine.graph].precision
