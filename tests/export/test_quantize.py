"""``rcod-export bundle --precision int8``: which convolutions, how close, what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import rcod_export.bundle
import rcod_export.quantize
from rcod_export.bundle import DEFAULT_SAMPLE, ExportConfig, build_bundle
from rcod_export.engines import EngineConfig, build_engines
from rcod_export.inspect import verify_bundle
from rcod_export.parity import onnxruntime_session
from rcod_export.quantize import (
    MAX_SIDE_PX,
    QUANTIZED,
    calibration_photos,
    quantize,
    quantized_convolutions,
)
from rcod_export.triton import TritonConfig, build_repository
from rcod_runtime import Upscaler
from rcod_runtime.errors import ExportError, UsageError
from rcod_runtime.image_io import read_image, write_image
from rcod_runtime.manifest import Precision, read_manifest
from tests.export.conftest import take_exported
from tests.tiny import tiny_info, tiny_parts


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    sample = read_image(DEFAULT_SAMPLE).pixels
    for index in range(3):
        part = np.ascontiguousarray(sample[index * 8 : index * 8 + 40, : 32 + 8 * index])
        write_image(folder / f"{index}.png", part)
    return folder


@pytest.fixture(scope="module")
def int8_config(tiny_config: ExportConfig, photos: Path) -> ExportConfig:
    return dataclasses.replace(tiny_config, precision=Precision.INT8, calibration=photos)


@pytest.fixture(scope="module")
def int8_bundle(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    int8_config: ExportConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("int8") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        take_exported(tiny_bundle, patch)
        build_bundle(tiny_checkpoint, out, int8_config)
    return out


def test_convolutions_that_read_an_activation_or_an_enlargement_take_8_bits(
    int8_bundle: Path,
) -> None:
    # Two of each residual block of the tiny networks, and two that enlarge in denoiser and decoder
    # each; not the first, the last, the ones that make smaller, shortcuts and the skip.
    expected = {"encoder": 2 * 3, "denoiser": 2 * (3 + 2 + 6) + 2, "decoder": 2 * 3 + 2}
    manifest = read_manifest(int8_bundle / "manifest.json")
    for name, graph in manifest.graphs.items():
        model = onnx.load(int8_bundle / graph.file).graph
        eight = quantized_convolutions(model)
        if name not in QUANTIZED:
            assert graph.precision is Precision.FP32 and not eight
            continue
        assert graph.precision is graph.weights is Precision.INT8
        assert len(eight) == expected[name]
        assert not set(eight) & {node.name for node in last_convolutions(model)}
        weights = [
            numpy_helper.to_array(tensor)
            for tensor in model.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
        ]
        assert len(weights) == len(eight)
        # What goes into a convolution is rounded, and nothing else.
        rounded = {n.output[0]: n for n in model.node if n.op_type == "DequantizeLinear"}
        into = {rounded[n.input[0]].input[0] for n in model.node if n.name in eight}
        assert into == {n.output[0] for n in model.node if n.op_type == "QuantizeLinear"}
        # 7 bits: sums of two products in 16 bits do not overflow without VNNI.
        assert all(np.abs(w.astype(int)).max() <= 64 for w in weights)


def last_convolutions(model: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those whose output feeds no other one, directly or not."""
    feeds: dict[str, set[str]] = {}  # value -> convolutions behind it
    for node in reversed(model.node):
        behind = set().union(*(feeds.get(output, set()) for output in node.output))
        behind |= {node.name} if node.op_type == "Conv" else set()
        for name in node.input:
            feeds[name] = feeds.get(name, set()) | behind
    found = [n for n in model.node if n.op_type == "Conv" and not feeds.get(n.output[0])]
    assert found
    return found


def test_the_manifest_says_what_is_int8_and_how_close_that_is(int8_bundle: Path) -> None:
    manifest = read_manifest(int8_bundle / "manifest.json")
    rows = {(r.graph, r.level) for r in manifest.evidence.parity if r.precision is Precision.INT8}
    graphs = ("denoiser", "decoder")
    by_level = {(graph, level.name) for graph in graphs for level in manifest.levels}
    assert rows == by_level | {("encoder", None), ("encoder", "skip"), ("denoiser", "skip")}
    exact = {r.graph for r in manifest.evidence.parity if r.precision is Precision.FP32}
    assert exact == {"vpim"}
    assert (
        "8 bits, for CPUs: encoder, decoder, denoiser."
        in (int8_bundle / "MODEL_CARD.md").read_text()
    )


def test_images_are_close_to_fp32_on_every_backend(int8_bundle: Path, tiny_bundle: Path) -> None:
    lines = [line for line in verify_bundle(int8_bundle) if line.startswith("backend")]
    assert len(lines) >= 2 and all("int8 and " in line for line in lines)
    lq = read_image(DEFAULT_SAMPLE).pixels[:40, :48]
    with Upscaler(tiny_bundle, precision="fp32") as exact:
        expected = exact(lq, "realism").astype(int)
    for backend in ("openvino", "onnxruntime"):
        with Upscaler(int8_bundle, backend=backend, precision="fp32") as upscaler:
            error = upscaler(lq, "realism").astype(int) - expected
        psnr_db = 10 * np.log10(255**2 / np.square(error).mean())
        assert 35 < psnr_db < 70, backend  # 70: nothing was rounded


def test_the_same_photos_give_the_same_bytes(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    int8_bundle: Path,
    int8_config: ExportConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_exported(tiny_bundle, monkeypatch)
    build_bundle(tiny_checkpoint, tmp_path / "again", int8_config)
    for name in ("manifest.json", *(f"onnx/{graph}.onnx" for graph in QUANTIZED)):
        assert (tmp_path / "again" / name).read_bytes() == (int8_bundle / name).read_bytes(), name


def test_rounding_does_not_move_the_mean_of_a_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two convolutions behind activations, of which the last stays fp32. Without the correction of
    its bias the first one's rounded weights, times inputs that are never negative, move its mean;
    Eq. 3 made 0.7 of 255 of that at t = 800."""
    random = np.random.default_rng(3)
    weights = [random.normal(size=(8, 8, 3, 3)), random.normal(size=(8, 8, 1, 1))]
    values = {"w0": weights[0], "b0": random.normal(size=8), "w1": weights[1], "b1": np.zeros(8)}
    shape = ["n", 8, 48, 48]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Conv", ["a", "w0", "b0"], ["c"], "inner", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "w1", "b1"], ["y"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    feeds = [{"x": random.normal(size=(1, 8, 48, 48)).astype(np.float32)} for _ in range(4)]

    def moved() -> float:
        """By how much the mean of a channel differs from the exact graph's, root mean square."""
        path = tmp_path / "g.onnx"
        onnx.save_model(model, path)
        exact = onnxruntime_session(path)
        expected = [exact(feed)["y"] for feed in feeds]
        quantize(path, feeds)
        assert quantized_convolutions(onnx.load(path).graph) == ["inner"]
        rounded = onnxruntime_session(path)
        found = [rounded(feed)["y"] for feed in feeds]
        return float(np.square(np.subtract(found, expected).mean((0, 1, 3, 4))).mean() ** 0.5)

    corrected = moved()
    monkeypatch.setattr(rcod_export.quantize, "correct_biases", lambda *_: None)
    plain = moved()
    assert corrected < plain / 4, (corrected, plain)


def test_photos_are_cut_to_their_middle(tmp_path: Path) -> None:
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[18 : 18 + 64, 118 : 118 + 64] = 255
    write_image(tmp_path / "b.png", pixels)
    write_image(tmp_path / "a.png", pixels[:30, :41])
    (tmp_path / "notes.txt").write_text("not a photo")
    small, large = calibration_photos(tmp_path, 8)
    assert small.shape == (24, 40, 3)
    assert large.shape == (MAX_SIDE_PX, MAX_SIDE_PX, 3) and large.min() == 255


@pytest.mark.parametrize(
    "name, pixels, message",
    [
        ("small.png", np.zeros((40, 7, 3), np.uint8), "at least 8 px a side"),
        ("grey.png", np.zeros((40, 40), np.uint8), "8-bit RGB"),
        ("notes.txt", None, "no photo in it"),
    ],
)
def test_what_can_not_be_calibrated_on_is_refused(
    name: str, pixels: np.ndarray | None, message: str, tmp_path: Path
) -> None:
    if pixels is None:
        (tmp_path / name).write_text("text")
    else:
        write_image(tmp_path / name, pixels)
    with pytest.raises(UsageError, match=message):
        list(calibration_photos(tmp_path, 8))
    with pytest.raises(UsageError, match="expected a folder"):
        list(calibration_photos(tmp_path / "none", 8))


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP32])
def test_int8_and_photos_belong_together(
    precision: Precision,
    photos: Path,
    tiny_checkpoint: Path,
    tiny_config: ExportConfig,
    tmp_path: Path,
) -> None:
    folder = None if precision is Precision.INT8 else photos
    config = dataclasses.replace(tiny_config, precision=precision, calibration=folder)
    with pytest.raises(UsageError, match="--precision int8 needs --calibration"):
        build_bundle(tiny_checkpoint, tmp_path / "out", config)


def test_engines_are_not_built_of_int8_graphs(int8_bundle: Path) -> None:
    before = (int8_bundle / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="for CPUs.*--precision fp16"):
        build_engines(int8_bundle, EngineConfig(sms=(89,)))
    assert (int8_bundle / "manifest.json").read_bytes() == before


def test_a_gpu_does_not_get_them(int8_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for CPUs. Give --backend onnxruntime --device"):
        build_repository(int8_bundle, tmp_path / "models", TritonConfig())
    build_repository(int8_bundle, tmp_path / "models", TritonConfig(device="cpu"))
    with pytest.raises(UsageError, match="for CPUs. Use --device cpu"):
        Upscaler(int8_bundle, device="cuda:0", backend="onnxruntime")


def test_other_families_and_opsets_are_refused(
    int8_config: ExportConfig,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = tiny_parts(), dataclasses.replace(tiny_info(), family="rcod-o")
    monkeypatch.setattr(rcod_export.bundle, "load_merged", lambda _: loaded)
    with pytest.raises(UsageError, match="expected a nano checkpoint, found rcod-o"):
        build_bundle(tiny_checkpoint, tmp_path / "out", int8_config)
    with pytest.raises(UsageError, match="--opset 20"):
        build_bundle(tiny_checkpoint, tmp_path / "out", dataclasses.replace(int8_config, opset=23))


@pytest.mark.parametrize(
    ("failing", "error", "message"),
    [
        ("quantize_static", ValueError("No data is collected."), "could not quantize it: No data"),
        ("quantize_static", OSError(28, "No space left on device"), "No space left.*TMPDIR"),
        ("quant_pre_process", None, r"expected \d+ convolutions .* made \d+"),
    ],
)
def test_what_the_quantizer_can_not_do_is_named(
    failing: str,
    error: Exception | None,
    message: str,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last: its preparation logs what goes wrong, and passes the graph on as it was."""
    path = tmp_path / "decoder.onnx"
    shutil.copy(tiny_bundle / "onnx" / "decoder.onnx", path)
    before = path.read_bytes()

    def fail(source: Path, result: Path, *_: object, **__: object) -> None:
        if error is not None:
            raise error
        onnx.save_model(onnx.shape_inference.infer_shapes(onnx.load(source)), result)

    monkeypatch.setattr(f"onnxruntime.quantization.{failing}", fail)
    channels = read_manifest(tiny_bundle / "manifest.json").graphs["decoder"].inputs[0].shape[1]
    z_sr = np.random.default_rng(0).normal(size=(1, channels, 4, 4)).astype(np.float32)
    with pytest.raises(ExportError, match=message):
        quantize(path, [{"z_sr": z_sr}])
    assert path.read_bytes() == before
