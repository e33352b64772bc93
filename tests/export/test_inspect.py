"""``rcod-export inspect`` and ``verify``, and the costs they speak of."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

import rcod_export.inspect
import rcod_runtime.bundle
import rcod_runtime.selftest
from rcod_export.cost import Gpu, measure_cost
from rcod_export.inspect import inspect_bundle, verify_bundle
from rcod_export.main import main
from rcod_export.specs import handed_on
from rcod_runtime.cli.doctor import examine
from rcod_runtime.errors import BundleError, ExportError, HashMismatch
from rcod_runtime.manifest import Precision, read_manifest, sha256_file
from rcod_train.network import predict_eps
from tests.tiny import tiny_parts


def test_macs_are_those_that_torch_counts(tiny_bundle: Path) -> None:
    parts = tiny_parts()
    calls = {
        "encoder": lambda: parts.vae.encode_with_skip(torch.zeros(1, 3, 64, 64)),
        "vpim": lambda: parts.vpim(torch.zeros(1, 3, 32, 32)),
        "decoder": lambda: parts.vae.decode(torch.zeros(1, handed_on(parts), 8, 8)),
    }
    manifest = read_manifest(tiny_bundle / "manifest.json")
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        graph = manifest.graphs[name]
        shapes = {tensor.name: tensor.sized(1, 64, 64) for tensor in graph.inputs}
        macs = measure_cost(tiny_bundle / graph.file, shapes).macs
        assert macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01), name


def test_the_denoiser_costs_the_unet_without_its_time_embedding(tiny_bundle: Path) -> None:
    parts = tiny_parts()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        z, tokens = torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 16)
        predict_eps(parts.unet, z, torch.tensor([250]), tokens)
    graph = read_manifest(tiny_bundle / "manifest.json").graphs["denoiser"]
    shapes = {tensor.name: tensor.sized(1, 64, 64) for tensor in graph.inputs}
    macs = measure_cost(tiny_bundle / graph.file, shapes).macs
    assert 0.8 * counter.get_total_flops() / 2 < macs < counter.get_total_flops() / 2


def test_cost_and_floor_by_hand(tmp_path: Path) -> None:
    """(4, 8) x (8, 16): 512 MACs; 512 bytes of weights; 128 + 256 bytes of input and output."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 16], [0.0] * 128)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [weight],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    cost = measure_cost(path, {"x": (4, 8)})
    assert (cost.macs, cost.parameters, cost.weight_bytes, cost.io_bytes) == (512, 128, 512, 384)
    fast_memory = Gpu("a", fp16_tflops=2e-9, fp32_tflops=1e-9, gb_per_s=1e3, source="")
    slow_memory = Gpu("b", fp16_tflops=1e3, fp32_tflops=1e3, gb_per_s=896e-9, source="")
    assert cost.floor_s(fast_memory, half=False) == pytest.approx(1.024)
    assert cost.floor_s(fast_memory, half=True) == pytest.approx(0.512)
    assert cost.floor_s(slow_memory, half=True) == pytest.approx(1.0)


def test_shapes_that_do_not_fit_are_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(ExportError, match="no shapes for inputs"):
        measure_cost(tiny_bundle / "onnx/vpim.onnx", {"image": (1, 7, 32, 32)})


def test_inspect_speaks_of_every_graph(tiny_bundle: Path) -> None:
    text = "\n".join(inspect_bundle(tiny_bundle))
    for word in ("encoder", "vpim", "denoiser", "decoder", "GMAC", "RTX 4090", "Conv", "no engine"):
        assert word in text


def test_verify_tests_the_sample(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle)]) == 0
    assert capsys.readouterr().out.count("self-test passed") >= 2


def test_a_backend_that_cannot_run_a_bundle_is_named_and_not_tested(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime refuses bf16 on a CPU; a sound bundle is no failure of it."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bf16"))
    manifest = read_manifest(bundle / "manifest.json")
    graphs = {
        name: dataclasses.replace(graph, precision=Precision.BF16)
        for name, graph in manifest.graphs.items()
    }
    text = dataclasses.replace(manifest, graphs=graphs).to_json()
    (bundle / "manifest.json").write_text(text)
    for module in (rcod_export.inspect, rcod_runtime.selftest):
        monkeypatch.setattr(module, "self_test", lambda _, backend, *__: f"tested {backend}")
    for lines in (list(verify_bundle(bundle)), list(examine(bundle))):
        assert "backend openvino: tested openvino" in lines
        (line,) = (line for line in lines if line.startswith("backend onnxruntime"))
        assert line.endswith("has no bf16 convolutions on a CPU, which this bundle needs")


@pytest.fixture
def bundle_with_engine(tiny_bundle: Path, tmp_path: Path) -> Path:
    """An entry of an engine built elsewhere; the file is not read by anything but the hash."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    (bundle / "engines").mkdir()
    engine = bundle / "engines" / "vpim.engine"
    engine.write_bytes(b"engine")
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    raw["engines"] = [
        {
            "file": "engines/vpim.engine",
            "sha256": sha256_file(engine),
            "bytes": 6,
            "graph": "vpim",
            "target": "tensorrt",
            "version": "11.4.0",
            "sm": [89],
            "os": "linux-armv8",
            "profile": {"image": [[1, 3, 32, 32]] * 3},
            "precision": "fp32",
            "options": {},
            "onnx_sha256": raw["graphs"]["vpim"]["sha256"],
            "scratch_bytes": 5_000_000,
        }
    ]
    path.write_text(json.dumps(raw))
    return bundle


def test_an_engine_for_another_machine_is_named_and_its_scratch_shown(
    bundle_with_engine: Path,
) -> None:
    assert "vpim.engine: not here, built for linux-armv8" in "\n".join(
        verify_bundle(bundle_with_engine)
    )
    line = next(x for x in inspect_bundle(bundle_with_engine) if x.startswith("vpim"))
    assert line.endswith(" 5")


def test_a_changed_engine_is_refused(bundle_with_engine: Path) -> None:
    (bundle_with_engine / "engines" / "vpim.engine").write_bytes(b"ENGINE")
    with pytest.raises(HashMismatch, match="Engines are programs"):
        list(verify_bundle(bundle_with_engine))


def test_an_engine_that_cannot_be_read_is_a_typed_error(
    bundle_with_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> str:
        if path.name == "vpim.engine":
            raise PermissionError(13, "Permission denied", str(path))
        return sha256_file(path)

    monkeypatch.setattr(rcod_runtime.bundle, "sha256_file", refused)
    with pytest.raises(BundleError, match="vpim.engine: can't be read .Permission denied"):
        list(verify_bundle(bundle_with_engine))


def test_a_changed_sample_is_refused(bundle_with_engine: Path) -> None:
    (bundle_with_engine / "sample" / "sr.png").write_bytes(b"other")
    with pytest.raises(HashMismatch, match="sr.png: the sample was changed"):
        list(verify_bundle(bundle_with_engine))
