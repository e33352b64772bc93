"""A bundle whose pipeline is a known function: a 3x3 blur and a gain that depends on the level.

The graphs are real ONNX files in the geometry of nano (factor 8, tokens, level weights), small
enough to reason about: every pixel of the result depends on 3x3 pixels of the upsampled input.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rcod_runtime.manifest import (
    Evidence,
    Graph,
    Identity,
    ImageContract,
    Level,
    Manifest,
    MetricRange,
    Precision,
    Tensor,
    sha256_file,
)

FACTOR = 8
CHANNELS = 3 * FACTOR * FACTOR
GAINS = (0.25, 0.5, 1.0)
TOKENS_PX = 16
LEVELS = (
    Level("fidelity", 250, 0.8, 0.6),
    Level("neutral", 500, 0.6, 0.8),
    Level("realism", 750, 0.28, 0.96),
)

IMAGE = Tensor("image", "float32", ("batch", 3, "height", "width"), "NCHW")
Z_LQ = Tensor("z_lq", "float32", ("batch", CHANNELS, "height/8", "width/8"), "NCHW")
Z_SR = Tensor("z_sr", "float32", Z_LQ.shape, "NCHW")
THUMBNAIL = Tensor("image", "float32", ("batch", 3, TOKENS_PX, TOKENS_PX), "NCHW")
TOKENS = Tensor("tokens", "float32", ("batch", 4, 3), "NLC")
LEVEL = Tensor("level", "float32", ("batch", len(LEVELS)), "NK")
M_L = Tensor("m_l", "float32", ("batch",), "N")
ADAPTIVE = Tensor("adaptive", "float32", ("batch", len(LEVELS)), "NK")
LQ = Tensor("lq", "float32", ("batch", 3, "height/4", "width/4"), "NCHW")
VAE_MATRICES = Tensor("vae_matrices", "float32", ("batch", 3, 1, 1), "NKRR")
UNET_MATRICES = Tensor("unet_matrices", "float32", ("batch", 3, 1, 1), "NKRR")
METRIC = MetricRange(0.0, 0.9, 250)


def _save(
    path: Path,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
) -> Graph:
    def info(tensor: Tensor) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.shape)

    graph = helper.make_graph(
        nodes,
        path.stem,
        [info(t) for t in inputs],
        [info(t) for t in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return Graph(
        file=f"onnx/{path.name}",
        data_files={},
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        opset=20,
        precision=Precision.FP32,
        weights=Precision.FP32,
        inputs=inputs,
        outputs=outputs,
    )


def _estimate(image: str, n: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """m_l, the mean of an image, and the level that it means by Eq. 5, as nodes and constants."""
    node = helper.make_node
    nodes = [
        node("ReduceMean", [image, "axes"], ["m_l"], keepdims=0),
        # Eq. 5 in the graph: floor(n (m - m_min) / (m_max - m_min)), then one-hot.
        node("Sub", ["m_l", "m_min"], ["above"]),
        node("Mul", ["above", "per_group"], ["position"]),
        node("Floor", ["position"], ["group"]),
        node("Sub", ["n", "group"], ["steps"]),
        node("Clip", ["steps", "one", "n"], ["clamped"]),
        node("Cast", ["clamped"], ["step"], to=TensorProto.INT64),
        node("Sub", ["step", "one_int"], ["index"]),
        node("OneHot", ["index", "depth", "off_on"], ["adaptive"]),
    ]
    constants = {
        "axes": np.array([1, 2, 3], np.int64),
        "m_min": np.float32(METRIC.m_min),
        "per_group": np.float32(n / (METRIC.m_max - METRIC.m_min)),
        "n": np.float32(n),
        "one": np.float32(1),
        "one_int": np.int64(1),
        "depth": np.int64(n),
        "off_on": np.float32([0, 1]),
    }
    return nodes, constants


def make_bundle(
    folder: Path,
    gains: tuple[float, ...] = GAINS,
    mem: bool = True,
    tile_px: int = 64,
    guided: bool = False,
) -> Manifest:
    """Write the bundle, with a level for each gain.

    Its m_l is the mean of the image, so that a test can choose it. ``guided`` makes an rcod-s: the
    guide's matrices are the means of the photo's colours; encoder and denoiser multiply by theirs.
    """
    node = helper.make_node
    levels = LEVELS[: len(gains)]
    adaptive = dataclasses.replace(ADAPTIVE, shape=("batch", len(levels)))
    blur = np.zeros((3, 3, 3, 3), np.float32)
    for c in range(3):
        blur[c, c] = np.float32([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    encoder_nodes = [
        node("Conv", ["seen" if guided else "image", "blur"], ["blurred"], pads=[1, 1, 1, 1]),
        node("SpaceToDepth", ["blurred"], ["z_lq"], blocksize=FACTOR),
    ]
    weights = {"blur": blur}
    estimates = (M_L, adaptive) if mem else ()
    nodes, constants = _estimate("lq" if guided else "image", len(levels)) if mem else ([], {})
    axes = {"all": np.array([1, 2, 3], np.int64)}
    if guided:
        by_mean = node("ReduceMean", ["vae_matrices", "all"], ["vae_mean"], keepdims=1)
        encoder_nodes[:0] = [by_mean, node("Mul", ["image", "vae_mean"], ["seen"])]
        weights |= axes
    else:
        encoder_nodes += nodes
        weights |= constants
    pooled = [
        node("AveragePool", ["image"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
        node("Reshape", ["p", "shape"], ["r"]),
        node("Transpose", ["r"], ["tokens"], perm=[0, 2, 1]),
    ]
    denoiser_nodes = [
        node("Reshape", ["gains" if len(levels) == 1 else "g", "column"], ["g4"]),
        node("ReduceMean", ["tokens", "token_axes"], ["t"], keepdims=1),
        node("Mul", ["t", "zero"], ["t0"]),
        node("Reshape", ["t0", "column"], ["t4"]),
        node("Mul", ["z_lq", "g4"], ["scaled"]),
        node("Add", ["scaled", "t4"], ["summed" if guided else "z_sr"]),
    ]
    if guided:
        denoiser_nodes += [
            node("ReduceMean", ["unet_matrices", "all"], ["unet_mean"], keepdims=1),
            node("Mul", ["summed", "unet_mean"], ["z_sr"]),
        ]
    if len(levels) > 1:  # with one there is no input that chooses it
        denoiser_nodes.insert(0, node("MatMul", ["level", "gains"], ["g"]))
    column = np.array([-1, 1, 1, 1], np.int64)
    graphs = {
        "encoder": _save(
            folder / "onnx/encoder.onnx",
            (IMAGE, VAE_MATRICES) if guided else (IMAGE,),
            (Z_LQ,) if guided else (Z_LQ, *estimates),
            encoder_nodes,
            weights,
        ),
        "vpim": _save(
            folder / "onnx/vpim.onnx",
            (THUMBNAIL,),
            (TOKENS,),
            pooled,
            {"shape": np.array([0, 3, 4], np.int64)},
        ),
        "denoiser": _save(
            folder / "onnx/denoiser.onnx",
            (
                *((Z_LQ, TOKENS, LEVEL) if len(levels) > 1 else (Z_LQ, TOKENS)),
                *((UNET_MATRICES,) if guided else ()),
            ),
            (Z_SR,),
            denoiser_nodes,
            {
                "gains": np.float32(gains).reshape(-1, 1),
                "column": column,
                "zero": np.float32([0.0]),
                "token_axes": np.array([1, 2], np.int64),
                **(axes if guided else {}),
            },
        ),
        "decoder": _save(
            folder / "onnx/decoder.onnx",
            (Z_SR,),
            (IMAGE,),
            [
                node("DepthToSpace", ["z_sr"], ["d"], blocksize=FACTOR),
                node("Clip", ["d", "low", "high"], ["image"]),
            ],
            {"low": np.float32(-1.0), "high": np.float32(1.0)},
        ),
    }
    if guided:
        graphs["guide"] = _save(
            folder / "onnx/guide.onnx",
            (LQ,),
            (VAE_MATRICES, UNET_MATRICES, *estimates),
            [
                node("ReduceMean", ["lq", "plane"], ["vae_matrices"], keepdims=1),
                node("Sqrt", ["vae_matrices"], ["unet_matrices"]),
                *nodes,
            ],
            {"plane": np.array([2, 3], np.int64), **constants},
        )
    manifest = Manifest(
        version=1,
        identity=Identity(
            "fake", "rcod-s" if guided else "nano", "A blur.", "Apache-2.0", ("made by the test",)
        ),
        levels=levels,
        metric=METRIC,
        image=ImageContract(4, 3, -1.0, 1.0, 32, tile_px, 16, TOKENS_PX),
        graphs=graphs,
        engines=(),
        sample=None,
        evidence=Evidence((), None),
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return manifest
