"""``rcod-export bundle``: what it writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import save_file

import rcod_export.bundle
import rcod_export.onnx_file
import rcod_export.parity
from rcod_export.bundle import MAX_SAMPLE_DIFF_U8, ExportConfig, build_bundle, moved_levels
from rcod_export.main import main
from rcod_export.parity import LIMITS, Limit, compare, measure
from rcod_export.reference import Case
from rcod_runtime import Upscaler
from rcod_runtime.colour import SAMPLE_COLOUR_MATCH
from rcod_runtime.errors import HashMismatch, OutputError, ParityError, UsageError
from rcod_runtime.image_io import read_image, write_image
from rcod_runtime.manifest import Parity, Precision, read_manifest, sha256_file
from rcod_train.checkpoint import levels_of, save_merged
from rcod_train.errors import CheckpointError
from rcod_train.grouping import Grouping
from rcod_train.schedule import OFFICIAL_ALPHA_BAR, alpha_sigma
from tests.export.conftest import take_exported
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
    skips = {("encoder", "skip"), ("denoiser", "skip")}
    levels = {("denoiser", name) for name in ("fidelity", "neutral", "realism")}
    assert rows == plain | skips | levels
    for row in evidence.parity:
        assert row.max_abs <= row.limit_max_abs and row.limit_cosine <= row.cosine
        # Three numbers may be equal to the last bit, and what skips the denoiser must be.
        assert row.max_abs > 0 or row.level in ("m_l", "skip")
        assert not row.max_abs or (row.graph, row.level) != ("denoiser", "skip")
    assert evidence.sample_psnr_db is not None and evidence.sample_psnr_db >= 40


def test_what_skips_the_denoiser_does_not_hide_a_wrong_latent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sixteen times as many channels, handed on as they came, and ten times as large."""
    random = np.random.default_rng(0)
    z, skip = random.normal(size=(1, 4, 8, 8)), 10 * random.normal(size=(1, 64, 8, 8))
    expected = np.concatenate([z, skip], 1).astype(np.float32)
    case = Case("denoiser", "realism", {}, {"z_sr": expected})

    def off_by(error: float) -> list[Parity]:
        found = expected.copy()
        found[:, :4] += error * random.normal(size=z.shape).astype(np.float32)
        run = lambda _: {"z_sr": found}  # noqa: E731
        monkeypatch.setattr(rcod_export.parity, "onnxruntime_session", lambda _: run)
        return list(compare([case], Path("denoiser.onnx"), Precision.INT8, 4))

    assert [row.level for row in off_by(0.05)] == ["skip", "realism"]
    with pytest.raises(ParityError, match="denoiser, level realism"):
        off_by(0.3)


def test_the_runtime_gives_the_bundles_sample_again(tiny_bundle: Path) -> None:
    sample = read_manifest(tiny_bundle / "manifest.json").sample
    assert sample is not None
    lq, sr = (read_image(tiny_bundle / path).pixels for path in (sample.lq, sample.sr))
    with Upscaler(tiny_bundle, precision="fp32") as upscaler:
        found = upscaler(lq, sample.realism, colour_match=SAMPLE_COLOUR_MATCH)
    assert np.abs(found.astype(int) - sr.astype(int)).max() <= sample.max_abs_diff_u8


def test_an_export_is_repeatable_byte_for_byte(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tiny_config: ExportConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the denoiser, which takes longest and goes the same way."""
    take_exported(tiny_bundle, monkeypatch, but=("encoder", "decoder", "vpim"))
    build_bundle(tiny_checkpoint, tmp_path / "again", tiny_config)
    for path in tiny_bundle.rglob("*"):
        if path.is_file():
            again = tmp_path / "again" / path.relative_to(tiny_bundle)
            assert again.read_bytes() == path.read_bytes(), path.name


def test_a_graph_beyond_its_limit_is_refused_and_nothing_is_written(
    exported_before: None,
    tiny_checkpoint: Path,
    tiny_config: ExportConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LIMITS[Precision.FP32], "denoiser", Limit(1e-12, 0.99999))
    with pytest.raises(ParityError, match="denoiser, level fidelity.*limit 1e-12"):
        build_bundle(tiny_checkpoint, tmp_path / "out", tiny_config)
    assert list(tmp_path.iterdir()) == []


def test_levels_that_give_the_same_image_are_refused(
    tiny_config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the timestep doesn't reach the network; said before anything is exported."""
    monkeypatch.setattr(rcod_export.bundle, "_export", None)
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
        measure("vpim", None, Precision.FP32, one, one[:2], limit)
    with pytest.raises(ParityError, match="not all values are finite"):
        measure("vpim", None, Precision.FP32, one, one * np.float32("nan"), limit)
    with pytest.raises(ParityError, match="cosine"):
        measure("vpim", None, Precision.FP32, np.float32([1e-5, 0]), np.float32([0, 1e-5]), limit)
    with pytest.raises(ParityError, match="cosine"):
        measure("vpim", None, Precision.FP32, np.zeros(2, np.float32), np.float32([1e-5, 0]), limit)


def test_two_zeros_agree() -> None:
    zero = np.zeros(1, np.float32)
    assert measure("guide", "m_l", Precision.FP32, zero, zero, Limit(1e-4, 0.999)).cosine == 1


def test_a_folder_that_is_no_bundle_is_not_replaced(
    tiny_checkpoint: Path, tiny_config: ExportConfig, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"mine")
    for manifest in (None, '{"name": "a web page", "icons": []}', "no JSON"):
        if manifest is not None:
            (tmp_path / "photos" / "manifest.json").write_text(manifest)
        with pytest.raises(OutputError, match="is no bundle of rcod-export"):
            build_bundle(tiny_checkpoint, tmp_path / "photos", tiny_config)
        assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"mine"


def test_what_lies_beside_a_bundle_is_not_deleted_with_it(
    tiny_checkpoint: Path, tiny_config: ExportConfig, tmp_path: Path
) -> None:
    fields = {"version": 0, "identity": {}, "levels": [], "graphs": {}}  # another version's
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".0123.rcod-partial").touch()  # a killed process left it
    with pytest.raises(OutputError, match="expected nothing but the bundle .* found .git in it"):
        build_bundle(tiny_checkpoint, tmp_path, tiny_config)
    assert {path.name for path in tmp_path.iterdir()} > {".git", "manifest.json"}


def test_a_tile_size_the_network_cannot_take_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--tile 144: expected a multiple of 32"):
        build_bundle(tiny_checkpoint, tmp_path / "out", ExportConfig(tile_px=144))


@pytest.mark.parametrize(("tile_px", "overlap_px"), [(0, 0), (8192, 64), (96, 64), (512, -1)])
def test_tiles_that_no_bundle_has_are_refused_before_the_checkpoint_is_read(
    tile_px: int, overlap_px: int, tmp_path: Path
) -> None:
    config = ExportConfig(tile_px=tile_px, overlap_px=overlap_px)
    with pytest.raises(UsageError, match=f"--tile {tile_px} --overlap {overlap_px}: expected"):
        build_bundle(tmp_path / "none", tmp_path / "out", config)


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


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def half_bundle(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tiny_config: ExportConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """That in fp16 has one level folded in."""
    out = tmp_path_factory.mktemp("half") / request.param
    fold = "realism" if request.param == "fp16" else None
    precision = Precision(request.param)
    config = dataclasses.replace(tiny_config, precision=precision, fold_level=fold)
    build_bundle(tiny_checkpoint, out, config)
    return out


def test_half_graphs_compute_in_half_and_take_and_give_fp32(half_bundle: Path) -> None:
    manifest = read_manifest(half_bundle / "manifest.json")
    precision = manifest.graphs["denoiser"].precision
    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision.value]
    for name, graph in manifest.graphs.items():
        model = onnx.load(half_bundle / graph.file)
        types = {t.name: t.data_type for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Conv":
                assert types[node.input[1]] == half, (name, node.name)
        ends = [*model.graph.input, *model.graph.output]
        assert {e.type.tensor_type.elem_type for e in ends} == {TensorProto.FLOAT}
    for row in manifest.evidence.parity:
        assert row.precision is precision and row.max_abs <= row.limit_max_abs
        handed_on = (row.graph, row.level) == ("denoiser", "skip")  # which stays fp32
        assert (row.max_abs == 0) == handed_on


def test_eq_3_stays_in_fp32_in_half_graphs(half_bundle: Path) -> None:
    """The last operations, z_lq - sigma eps and the division by alpha, take fp32 values."""
    model = onnx.shape_inference.infer_shapes(onnx.load(half_bundle / "onnx/denoiser.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    last = {output: node for node in model.graph.node for output in node.output}
    joined = last["z_sr"]  # with the decoder's skip, which is handed on
    division = last[joined.input[0]]
    difference = last[division.input[0]]
    kinds = [node.op_type for node in (joined, division, difference)]
    assert kinds == ["Concat", "Div", "Sub"]
    inner = [*division.input, *difference.input, *last[difference.input[1]].input]
    assert {types.get(name, TensorProto.FLOAT) for name in inner} == {TensorProto.FLOAT}


def test_a_half_bundle_runs_and_gives_its_sample(half_bundle: Path) -> None:
    sample = read_manifest(half_bundle / "manifest.json").sample
    assert sample is not None
    lq, sr = (read_image(half_bundle / path).pixels for path in (sample.lq, sample.sr))
    with Upscaler(half_bundle, backend="openvino", precision="fp32") as upscaler:
        found = upscaler(lq, sample.realism, colour_match=SAMPLE_COLOUR_MATCH)
    assert np.abs(found.astype(int) - sr.astype(int)).max() <= sample.max_abs_diff_u8


def test_bf16_needs_an_opset_that_has_it(
    tiny_checkpoint: Path, tiny_config: ExportConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, precision=Precision.BF16, opset=20)
    with pytest.raises(UsageError, match="opset 20.*Use --opset 23"):
        build_bundle(tiny_checkpoint, tmp_path / "out", config)


def test_opset_23_has_normalisation_and_attention_as_operators(half_bundle: Path) -> None:
    """bf16 needs it, the fp16 bundle has what most runtimes read."""
    operators = {"GroupNormalization", "Attention"}
    spelled_out = {"InstanceNormalization", "Softmax"}
    model = onnx.load(half_bundle / "onnx/denoiser.onnx")
    opset = next(x.version for x in model.opset_import if not x.domain)
    kinds = {node.op_type for node in model.graph.node}
    if half_bundle.name == "bf16":
        assert opset == 23 and operators <= kinds and not kinds & spelled_out
    else:
        assert opset == 20 and spelled_out <= kinds and not kinds & operators


@pytest.mark.parametrize("half_bundle", ["fp16"], indirect=True)
def test_a_folded_level_is_the_level_and_nothing_is_left_to_choose(
    half_bundle: Path, tiny_bundle: Path
) -> None:
    manifest = read_manifest(half_bundle / "manifest.json")
    assert [level.name for level in manifest.levels] == ["realism"]
    assert {t.name for t in manifest.graphs["denoiser"].inputs} == {"z_lq", "tokens"}
    lq = read_image(tiny_bundle / "sample/lq.png").pixels
    with (
        Upscaler(half_bundle, precision="fp32") as one,
        Upscaler(tiny_bundle, precision="fp32") as all_levels,
    ):
        expected = all_levels(lq, "realism").astype(int)
        for setting in ("realism", 0.0, 1.0):
            # Half precision moves some six values in 786432 by two; another level moves most.
            error = np.abs(one(lq, setting).astype(int) - expected)
            assert error.max() <= MAX_SAMPLE_DIFF_U8[manifest.graphs["decoder"].precision]
            assert (error > 1).mean() < 1e-4 and error.mean() < 0.02
        with pytest.raises(UsageError, match="expected one of realism"):
            one(lq, "fidelity")
        with pytest.raises(UsageError, match="no metric estimation module"):
            one(lq, "adaptive")


def test_moved_levels_keep_constants_that_are_fixed() -> None:
    """Published code has one alpha_bar in Eq. 3 for every timestep."""
    grouping = Grouping(0.2, 0.9)
    info = tiny_info(levels=levels_of(grouping, OFFICIAL_ALPHA_BAR))
    moved = moved_levels(info, (100, 200, 999)).levels
    assert [level.timestep for level in moved] == [100, 200, 999]
    assert {(level.alpha, level.sigma) for level in moved} == {alpha_sigma(0, OFFICIAL_ALPHA_BAR)}


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ((250, 500), "one for each of fidelity, neutral, realism"),
        ((250, 600, 500), r"--timesteps 250 600 500: expected ascending integers in 1\.\.999"),
        ((250, 250, 500), "ascending"),
        ((0, 250, 500), "ascending"),
        ((250, 500, 1000), "ascending"),
    ],
)
def test_timesteps_that_are_no_levels_are_refused(
    timesteps: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        moved_levels(tiny_info(), timesteps)


def test_a_level_that_is_not_there_cannot_be_folded(
    tiny_checkpoint: Path, tiny_config: ExportConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, fold_level="dream")
    with pytest.raises(UsageError, match="expected one of fidelity, neutral, realism"):
        build_bundle(tiny_checkpoint, tmp_path / "out", config)


def test_a_sample_that_the_self_test_would_not_take_is_refused_before_the_export(
    tiny_checkpoint: Path, tiny_config: ExportConfig, tmp_path: Path
) -> None:
    for height, width, words in (
        (1040, 1040, "at most 1048576 pixels .* found 1040 x 1040"),
        (51, 100, "at least 64 px a side in the sample, found 100 x 51"),
    ):
        write_image(tmp_path / "sample.png", np.zeros((height, width, 3), np.uint8))
        config = dataclasses.replace(tiny_config, sample=tmp_path / "sample.png")
        with pytest.raises(UsageError, match=words):
            build_bundle(tiny_checkpoint, tmp_path / "out", config)


@pytest.fixture(scope="module")
def external_bundle(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tiny_config: ExportConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """As a model has it whose weights pass protobuf's limit."""
    out = tmp_path_factory.mktemp("external") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_exported(tiny_bundle, monkeypatch)
        monkeypatch.setattr(rcod_export.onnx_file, "MAX_INLINE_BYTES", 10_000)
        build_bundle(tiny_checkpoint, out, tiny_config)
    return out


def test_large_weights_lie_beside_their_graph_and_are_checked(
    external_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    graph = read_manifest(external_bundle / "manifest.json").graphs["denoiser"]
    assert list(graph.data_files) == ["onnx/denoiser.onnx.data"]
    lq = read_image(tiny_bundle / "sample/lq.png").pixels
    for backend in ("openvino", "onnxruntime"):
        with (
            Upscaler(external_bundle, backend=backend, precision="fp32") as external,
            Upscaler(tiny_bundle, backend=backend, precision="fp32") as inline,
        ):
            np.testing.assert_array_equal(external(lq, 0.3), inline(lq, 0.3))
    damaged = Path(shutil.copytree(external_bundle, tmp_path / "damaged"))
    path = damaged / "onnx/denoiser.onnx.data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(HashMismatch, match="denoiser.onnx.data"):
        Upscaler(damaged)


def test_other_weights_beside_the_same_graph_are_other_content(external_bundle: Path) -> None:
    """Engines are tied to it: without the data's hash, stale engines would pass for fresh."""
    graph = read_manifest(external_bundle / "manifest.json").graphs["denoiser"]
    other = dataclasses.replace(graph, data_files={"onnx/denoiser.onnx.data": "0" * 64})
    assert other.sha256 == graph.sha256 and other.content_sha256 != graph.content_sha256


def test_adapters_need_the_models_they_were_trained_on_and_checkpoints_do_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "adapters").mkdir()
    save_file({}, tmp_path / "adapters" / "full.safetensors")
    with pytest.raises(UsageError, match="adapters, which are merged .* Give --base and --clip"):
        build_bundle(tmp_path / "adapters", tmp_path / "b", ExportConfig(base="sd"))
    with pytest.raises(UsageError, match="a merged checkpoint takes no --base"):
        build_bundle(tmp_path / "merged", tmp_path / "b", ExportConfig(base="sd"))
    assert not (tmp_path / "b").exists()
