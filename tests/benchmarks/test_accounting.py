"""Work is counted by hand on one convolution, and measured on a model too small to matter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks import accounting, rates
from benchmarks.accounting import count_work, main, product_bytes
from benchmarks.full_size_work import ProductCounter, count_full_size
from rcod_runtime.bundle import open_bundle
from rcod_train.network import build_nano


def test_bytes_of_products_leave_weights_and_the_rest_out(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float16), "w16")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["w16"], ["w"], to=TensorProto.FLOAT),
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        "one convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, "h", "w"])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    assert product_bytes(tmp_path / "g.onnx", {"x": (1, 3, 16, 10)}) == 4 * (3 + 8) * 160


def test_every_graph_is_counted_and_shares_add_up(tiny_bundle: Path) -> None:
    name, tile_px, work = count_work(tiny_bundle)
    manifest = open_bundle(tiny_bundle).manifest
    assert (name, tile_px) == (manifest.identity.name, manifest.image.tile_px)
    assert set(work) == set(manifest.graphs)
    for part in work.values():
        assert part.macs > 0
        assert part.product_bytes > 0
        assert part.gpu_floor_ms["RTX 4090"] > 0
    table = accounting.work_table(work)
    shares = [float(line.split()[2].rstrip("%")) for line in table.splitlines()[2:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_ratio_is_measured_time_over_the_floor(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "SIDE", 128)
    monkeypatch.setattr(accounting, "MACS", 128**3)
    monkeypatch.setattr(rates, "COPY_BYTES", 2**20)
    monkeypatch.setattr(accounting, "COPY_BYTES", 2**20)
    assert main(["--bundle", str(tiny_bundle), "--runs", "1", "--threads", "1"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["benchmark"], document["schema_version"]) == ("accounting", 1)
    measured = document["measured"]
    assert measured["copy_gb_per_s"] > 0
    for part in measured["precisions"].values():
        assert part["matmul_library"] in ("openvino", "numpy", "torch")
        for found in (*part["stages"].values(), part["all"]):
            ratio = found["median_ms"] / found["floor_ms"]  # one run: no medians of ratios apart
            assert found["measured_to_floor"] == pytest.approx(ratio, rel=1e-6)
        stages = part["stages"]
        for stage, work in document["work"].items():
            arithmetic_ms = work["macs"] / part["gmacs_per_s"] * 1e-6
            assert stages[stage]["floor_ms"] >= arithmetic_ms * 0.999999


def test_counting_alone_runs_nothing(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tiny_bundle), "--only-work"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measured"] is None


def test_full_size_counts_are_those_of_the_published_networks() -> None:
    """866, 34, 49 and 304 M parameters; VAE as derived from its layers: 558 and 1257 GMAC."""
    work = count_full_size(512)
    millions = {name: round(stage.parameters / 1e6) for name, stage in work.items()}
    assert millions == {"encoder": 34, "decoder": 49, "vpim": 304, "denoiser": 866}
    giga = {name: stage.macs / 1e9 for name, stage in work.items()}
    assert giga["encoder"] == pytest.approx(558, abs=1)
    assert giga["decoder"] == pytest.approx(1257, abs=1)
    assert giga["denoiser"] == pytest.approx(411, abs=1)  # 402 with a text's 77 tokens


def test_counter_and_exported_graph_agree_on_nano() -> None:
    _, tile_px, work = count_work(None)
    vae = build_nano(0).vae.eval()
    with torch.no_grad(), ProductCounter() as counter:
        vae.encode_with_skip(torch.zeros(1, 3, tile_px, tile_px))
    # The graph has the MEM's two small products too.
    assert counter.count.macs == pytest.approx(work["encoder"].macs, rel=1e-5)
    assert 4 * counter.count.activations == pytest.approx(work["encoder"].product_bytes, rel=1e-4)


def test_runs_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", "0"]) == 2
    assert "--runs 0" in capsys.readouterr().err
