"""``rcod-export triton``: the repository, read back with Triton's own schema."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from rcod_export.engines import EngineConfig, planned_engine
from rcod_export.main import main
from rcod_export.triton import TritonConfig, _check_precision, build_repository
from rcod_runtime.bundle import default_bundle_path, open_bundle
from rcod_runtime.errors import BundleError, HashMismatch, OutputError, UsageError
from rcod_runtime.manifest import Precision, read_manifest

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
text_format = pytest.importorskip("google.protobuf.text_format")


def configs(repository: Path) -> dict[str, Any]:
    """Every config.pbtxt, parsed by Triton's schema: an unknown field or kind fails."""
    parsed = {}
    for path in repository.glob("*/config.pbtxt"):
        message = schema.ModelConfig()
        text_format.Parse(path.read_text(), message)
        assert message.name == path.parent.name
        parsed[message.name] = message
    return parsed


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded model."""
    out = tmp_path_factory.mktemp("triton") / "models"
    argv = ["triton", str(default_bundle_path()), "-o", str(out), "--device", "cpu", "--batch", "2"]
    assert main(argv) == 0
    return out


def test_every_graph_is_a_model_that_batches_and_warms_up(repository: Path) -> None:
    manifest = open_bundle().manifest
    found = configs(repository)
    assert found.keys() == {"rcod", *(f"rcod_{name}" for name in manifest.graphs)}
    for name, graph in manifest.graphs.items():
        model = found[f"rcod_{name}"]
        assert model.backend == "onnxruntime" and model.max_batch_size == 2
        assert model.dynamic_batching.max_queue_delay_microseconds == 2000
        assert model.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
        assert [t.name for t in model.input] == [t.name for t in graph.inputs]
        assert [t.name for t in model.output] == [t.name for t in graph.outputs]
        assert all(t.data_type == schema.TYPE_FP32 for t in [*model.input, *model.output])
        warm = model.model_warmup[0]
        for tensor in graph.inputs:
            assert list(warm.inputs[tensor.name].dims) == list(tensor.sized(1, 512, 512)[1:])
        digest = hashlib.sha256((repository / f"rcod_{name}" / "1" / "model.onnx").read_bytes())
        assert digest.hexdigest() == graph.sha256


def test_the_ensemble_followed_step_by_step_is_the_pipeline(repository: Path) -> None:
    """As Triton would: by the names in the maps, on the files in the repository."""
    ensemble = configs(repository)["rcod"]
    assert {t.name for t in ensemble.input} == {"image", "thumbnail", "level"}
    assert [t.name for t in ensemble.output] == ["sr"]
    rng = np.random.default_rng(0)
    sizes = {"image": (1, 3, 64, 96), "thumbnail": (1, 3, 64, 64), "level": (1, 3)}
    for tensor in ensemble.input:
        fixed = [(a, b) for a, b in zip(tensor.dims, sizes[tensor.name][1:], strict=True) if a > 0]
        assert all(a == b for a, b in fixed)
    inputs = {name: rng.uniform(-1, 1, size).astype(np.float32) for name, size in sizes.items()}
    inputs["level"] = np.array([[0, 1, 0]], np.float32)
    tensors = dict(inputs)
    steps = ensemble.ensemble_scheduling.step
    taken = {name for step in steps for name in step.input_map.values()}
    given = {name for step in steps for name in step.output_map.values()}
    assert given <= taken | {"sr"}, "Triton refuses an ensemble with a tensor that nobody takes"
    for step in steps:
        path = repository / step.model_name / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feed = {key: tensors[value] for key, value in step.input_map.items()}
        names = list(step.output_map)
        for name, value in zip(names, session.run(names, feed), strict=True):
            assert step.output_map[name] not in tensors, "one maker for each tensor"
            tensors[step.output_map[name]] = value
    graphs = {
        name: onnxruntime.InferenceSession(
            default_bundle_path() / graph.file, providers=["CPUExecutionProvider"]
        )
        for name, graph in open_bundle().manifest.graphs.items()
    }
    z_lq = graphs["encoder"].run(["z_lq"], {"image": inputs["image"]})[0]
    tokens = graphs["vpim"].run(["tokens"], {"image": inputs["thumbnail"]})[0]
    feed = {"z_lq": z_lq, "tokens": tokens, "level": inputs["level"]}
    (z_sr,) = graphs["denoiser"].run(["z_sr"], feed)
    (expected,) = graphs["decoder"].run(["image"], {"z_sr": z_sr})
    assert np.array_equal(tensors["sr"], expected)


def with_engines(
    bundle: Path,
    *sms: int,
    tiles_px: tuple[int, ...] = (64,),
    batch: tuple[int, int] = (1, 3),
    versions: tuple[str, ...] = ("11.0.0",),
) -> Path:
    """A bundle with entries as ``rcod-export engines`` makes them, and files in their place."""
    manifest = read_manifest(bundle / "manifest.json")
    engines = []
    for sm, tile in itertools.product(sms, tiles_px):
        config = EngineConfig("tensorrt", (sm,), tile, batch=batch)
        for name, graph in manifest.graphs.items():
            entry = planned_engine(manifest, name, graph, config, versions[-(sm == sms[0])])
            data = f"{name} {sm} {tile}".encode()
            (bundle / entry.file).parent.mkdir(parents=True, exist_ok=True)
            (bundle / entry.file).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            engines.append(dataclasses.replace(entry, sha256=digest, bytes=len(data)))
    whole = dataclasses.replace(manifest, engines=tuple(engines))
    (bundle / "manifest.json").write_text(whole.to_json())
    return bundle


def test_engines_are_chosen_by_compute_capability(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_engines(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")), 89, 120)
    out = build_repository(bundle, tmp_path / "models", TritonConfig("tensorrt", batch=8))
    model = configs(out)["rcod_encoder"]
    assert model.platform == "tensorrt_plan" and model.max_batch_size == 3, "the engines' most"
    assert dict(model.cc_model_filenames) == {"8.9": "model_sm89.plan", "12.0": "model_sm120.plan"}
    version = out / "rcod_encoder" / "1"
    assert sorted(p.name for p in version.iterdir()) == ["model_sm120.plan", "model_sm89.plan"]
    assert (version / "model_sm89.plan").read_bytes() == b"encoder 89 64"
    (bundle / "engines/tensorrt/sm89/64px/encoder.engine").write_bytes(b"encoder 88 64")
    with pytest.raises(HashMismatch, match="rcod-export engines builds it again"):
        build_repository(bundle, tmp_path / "models", TritonConfig("tensorrt"))
    (bundle / "engines/tensorrt/sm89/64px/encoder.engine").unlink()
    with pytest.raises(BundleError, match=r"encoder.engine: the manifest names it, but it is not"):
        build_repository(bundle, tmp_path / "models", TritonConfig("tensorrt"))
    assert configs(out)["rcod_encoder"] == model, "what was there is left"


def test_the_ensemble_takes_no_more_than_each_of_its_models(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Triton refuses one that would; the engine of the visual tokens is built for one photo."""
    bundle = with_engines(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")), 89)
    found = configs(build_repository(bundle, tmp_path / "models", TritonConfig("tensorrt")))
    batches = {name: model.max_batch_size for name, model in found.items()}
    assert batches == {"rcod": 1, "rcod_vpim": 1} | {
        f"rcod_{name}": 3 for name in ("encoder", "denoiser", "decoder")
    }


def test_engines_that_take_no_single_tile_are_not_taken(tiny_bundle: Path, tmp_path: Path) -> None:
    """A request is one tile, which they refuse, the warm-up's first."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    bundle = with_engines(copy, 89, batch=(2, 3))
    with pytest.raises(UsageError, match="no engines of .* for single tiles.*--batch 1 4"):
        build_repository(bundle, tmp_path / "models", TritonConfig("tensorrt"))


def test_engines_of_several_versions_fit_no_server(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    bundle = with_engines(copy, 80, 89, versions=("11.4.0", "10.9.0"))
    words = "of one TensorRT, .*sm80/64px: 10.9.0, .*sm89/64px: 11.4.0. Build the older"
    with pytest.raises(UsageError, match=words):
        build_repository(bundle, tmp_path / "models", TritonConfig("tensorrt"))


def test_one_tile_size_is_taken(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    bundle = with_engines(copy, 89, tiles_px=(64, 128))
    for chosen, tile in ((None, 64), (128, 128)):  # the bundle's own is 64
        out = build_repository(bundle, tmp_path / "m", TritonConfig("tensorrt", tile_px=chosen))
        warm = configs(out)["rcod_encoder"].model_warmup[0]
        assert list(warm.inputs["image"].dims) == [3, tile, tile]
        plan = out / "rcod_encoder" / "1" / "model_sm89.plan"
        assert plan.read_bytes() == f"encoder 89 {tile}".encode()
    with pytest.raises(UsageError, match="tiles of 96 px. There are some of 64, 128 px: give --ti"):
        build_repository(bundle, tmp_path / "m", TritonConfig("tensorrt", tile_px=96))


def test_what_cannot_be_had_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engines of --target tensorrt for single tiles of 64"):
        build_repository(tiny_bundle, tmp_path / "a", TritonConfig("tensorrt"))
    with pytest.raises(UsageError, match="engines run on a GPU alone"):
        build_repository(tiny_bundle, tmp_path / "a", TritonConfig("tensorrt", "cpu"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="exists and is no repository"):
        build_repository(tiny_bundle, tmp_path / "mine", TritonConfig())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"batch": 0}, "--batch 0: expected at least 1"),
        ({"instances": -1}, "--instances -1: expected at least 1"),
        ({"delay_us": -1}, "--delay -1: expected at least 0"),
        ({"tile_px": 100}, "--tile 100: expected a multiple of 32"),
    ],
)
def test_numbers_that_cannot_be_had_are_refused(
    choices: dict[str, int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        build_repository(default_bundle_path(), tmp_path / "models", TritonConfig(**choices))
    assert list(tmp_path.iterdir()) == []


def test_what_a_device_cannot_compute_is_refused_with_what_to_give() -> None:
    manifest = open_bundle().manifest

    def check(precision: Precision, config: TritonConfig) -> None:
        graphs = {
            k: dataclasses.replace(v, precision=precision) for k, v in manifest.graphs.items()
        }
        _check_precision(Path("b"), dataclasses.replace(manifest, graphs=graphs), config)

    for config in (TritonConfig(), TritonConfig("tensorrt")):
        with pytest.raises(UsageError, match="Give --backend onnxruntime --device cpu"):
            check(Precision.INT8, config)
    check(Precision.INT8, TritonConfig(device="cpu"))
    for config in (TritonConfig(), TritonConfig(device="cpu")):
        with pytest.raises(UsageError, match="no bf16 convolutions on a CPU.*--backend tensorrt"):
            check(Precision.BF16, config)
    check(Precision.BF16, TritonConfig("tensorrt"))


def test_a_repository_that_holds_other_models_is_not_replaced(tmp_path: Path) -> None:
    for name in ("rcod", "rcod_encoder", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text(name)
    with pytest.raises(OutputError, match="found mine in it. Choose another -o"):
        build_repository(default_bundle_path(), tmp_path, TritonConfig())
    assert (tmp_path / "mine" / "config.pbtxt").read_text() == "mine"
