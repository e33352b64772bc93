"""The graphs of a bundle against the checkpoint they came from."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rcod_export.graphs import DenoiserGraph, adaptive_weights
from rcod_export.onnx_file import store_as_fp16
from rcod_export.reference import denoise
from rcod_runtime.levels import adaptive_level
from rcod_runtime.manifest import Level, MetricRange
from rcod_train.checkpoint import load_merged
from tests.tiny import tiny_info, tiny_parts


def session(bundle: Path, graph: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle / f"onnx/{graph}.onnx")


def test_a_one_hot_level_equals_the_unet_called_by_its_timestep() -> None:
    parts, info = tiny_parts(), tiny_info()
    graph = DenoiserGraph(copy.deepcopy(parts.unet), info.levels)
    z, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)
    with torch.no_grad():
        for index in range(3):
            one_hot = torch.eye(3)[index].expand(2, -1)
            expected = denoise(parts, z, tokens, info, index)
            torch.testing.assert_close(graph(z, tokens, one_hot), expected, atol=1e-5, rtol=0)


def test_no_time_embedding_remains_in_the_denoiser(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "onnx/denoiser.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Sin", "Cos"}
    names = {tensor.name for tensor in model.graph.initializer}
    assert not [name for name in names if "time_emb" in name]


def test_a_mix_of_levels_mixes_the_rows_of_the_table(tiny_bundle: Path) -> None:
    """The graph's answer to weights (0.25, 0.75, 0) is the U-Net on that mix of table rows."""
    graph = DenoiserGraph(load_merged_unet(tiny_bundle), tiny_info().levels)
    z, skip, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8, 8), torch.randn(1, 16, 16)
    level = torch.tensor([[0.25, 0.75, 0.0]])
    row = 0.25 * graph.table[:1] + 0.75 * graph.table[1:2]
    alpha, sigma = (0.25 * graph.constants[0] + 0.75 * graph.constants[1]).tolist()
    with torch.no_grad():
        eps = graph.unet(z, row, encoder_hidden_states=tokens).sample
    expected = torch.cat([(z - sigma * eps) / alpha, skip], 1).numpy()
    z_lq = torch.cat([z, skip], 1)
    feeds = {"z_lq": z_lq.numpy(), "tokens": tokens.numpy(), "level": level.numpy()}
    found = session(tiny_bundle, "denoiser").run(None, feeds)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def load_merged_unet(bundle: Path) -> torch.nn.Module:
    """The U-Net behind the fixture's bundle: the seed's, with weights rounded as a checkpoint's."""
    return tiny_parts().unet.half().float()


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 96), (5, 96, 32)])
def test_graphs_take_any_batch_and_any_multiple_of_32(
    tiny_bundle: Path, shape: tuple[int, int, int]
) -> None:
    batch, height, width = shape
    image = np.zeros((batch, 3, height, width), np.float32)
    z_lq, m_l, adaptive = session(tiny_bundle, "encoder").run(None, {"image": image})
    assert z_lq.shape == (batch, 4 + 8, height // 8, width // 8) and m_l.shape == (batch,)
    assert adaptive.shape == (batch, 3) and (adaptive.sum(1) == 1).all()
    tokens = np.zeros((batch, 16, 16), np.float32)
    level = np.tile(np.float32([1, 0, 0]), (batch, 1))
    feeds = {"z_lq": z_lq, "tokens": tokens, "level": level}
    (z_sr,) = session(tiny_bundle, "denoiser").run(None, feeds)
    (decoded,) = session(tiny_bundle, "decoder").run(None, {"z_sr": z_sr})
    assert decoded.shape == image.shape and np.abs(decoded).max() <= 1.0


def test_files_name_nothing_of_the_exporting_machine(tiny_bundle: Path) -> None:
    for path in (tiny_bundle / "onnx").iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content and b".py" not in content


def test_fp16_storage_keeps_every_value_and_leaves_inexact_weights_alone() -> None:
    exact = np.linspace(-2, 2, 512, dtype=np.float16).astype(np.float32)
    inexact = exact + np.float32(1e-5)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [512])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [512])
    nodes = [helper.make_node("Add", ["x", "a"], ["s"]), helper.make_node("Add", ["s", "b"], ["y"])]
    weights = [numpy_helper.from_array(exact, "a"), numpy_helper.from_array(inexact, "b")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], weights),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    zero = {"x": np.zeros(512, np.float32)}

    def run() -> np.ndarray:
        return onnxruntime.InferenceSession(model.SerializeToString()).run(None, zero)[0]

    before = run()
    stored = ir.from_proto(model)
    assert store_as_fp16(stored) == 1
    model = ir.to_proto(stored)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(), before)


def test_a_checkpoint_comes_back_as_it_was_saved(tiny_checkpoint: Path) -> None:
    parts, info = load_merged(tiny_checkpoint)
    assert info == tiny_info()
    expected = tiny_parts().vae.half().float().state_dict()
    for name, value in parts.vae.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_eq_5_in_the_graph_is_the_runtimes() -> None:
    info = tiny_info()
    m = torch.linspace(-1, 1, 401, dtype=torch.float64).float()
    found = adaptive_weights(m, info).argmax(1).tolist()
    metric = MetricRange(m_min=info.m_min, m_max=info.m_max, k=info.k)
    levels = [Level(x.name, x.timestep, x.alpha, x.sigma) for x in info.levels]
    expected = [levels.index(adaptive_level(float(x), metric, levels)) for x in m]
    differing = [i for i in range(401) if found[i] != expected[i]]
    assert differing == [] and set(found) == {0, 1, 2}
