"""A bundle as a model repository of Triton Inference Server: its graphs, and an ensemble of them.

<out>/rcod_encoder/ rcod_vpim/ rcod_denoiser/ rcod_decoder/ (rcod_guide/)   one model for each graph
<out>/rcod/                                                                 the ensemble

The ensemble takes one tile: ``image`` (3, H, W) and ``thumbnail`` (3, S, S) float32 in [-1, 1], and
``level``, a weight for each of the levels; it gives ``sr`` (3, H, W). What the runtime does
around the graphs (upsampling, tiles, colours) is the client's there.

With "onnxruntime" the models are the bundle's ONNX files, on CPU or GPU. With "tensorrt" they are
its engines of that target and one tile size, one for each compute capability (cc_model_filenames);
Triton's TensorRT must be the version they were built with. Engines for TensorRT-RTX can't be loaded
by Triton. No model of an ensemble may take fewer tiles than the ensemble, so with engines, whose
visual tokens are of one photo, a request is one tile; the other models join those of several.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rcod_export.engines import check_tile
from rcod_export.inspect import check_engines
from rcod_export.output import check_replaceable, written_output
from rcod_runtime.backends.trt.engines import EngineSet, engine_sets, flaw
from rcod_runtime.bundle import open_bundle
from rcod_runtime.errors import UsageError
from rcod_runtime.manifest import Engine, Graph, Manifest, Tensor

ENSEMBLE = "rcod"
ORDER = ("guide", "vpim", "encoder", "denoiser", "decoder")
MODELS = {ENSEMBLE, *(f"{ENSEMBLE}_{name}" for name in ORDER)}
# Tensors of the ensemble whose names differ from those in the graphs.
RENAMED = {("vpim", "image"): "thumbnail", ("decoder", "image"): "sr"}
DTYPES = {"float32": "TYPE_FP32"}


@dataclass(frozen=True)
class TritonConfig:
    """``batch``: most tiles in one call; ``delay_us``: how long a call waits for others to join;
    ``tile_px``: of the engines, None is the bundle's."""

    backend: str = "onnxruntime"
    device: str = "gpu"
    batch: int = 4
    tile_px: int | None = None
    delay_us: int = 2000
    instances: int = 1


def build_repository(bundle: Path, out: Path, config: TritonConfig) -> Path:
    """Write the repository whole or not at all; one of ours that is there is replaced.

    Raises:
        BundleError: the bundle is not whole.
        UsageError: there are no engines to take, or a choice that can't be had.
        OutputError: ``out`` can't be written, or holds something that is no repository of ours.
    """
    _check(config)
    is_one = (out / ENSEMBLE / "config.pbtxt").is_file()
    check_replaceable(out, "repository", is_one, MODELS)
    opened = open_bundle(bundle)
    _check_precision(bundle, opened.manifest, config)
    check_tile(opened.manifest, config.tile_px)
    manifest, names = opened.manifest, [n for n in ORDER if n in opened.manifest.graphs]
    sets = _engine_sets(bundle, manifest, config) if config.backend == "tensorrt" else []
    engines = {name: [s.engines[name] for s in sets] for name in names}
    check_engines(opened, (engine for s in sets for engine in s.engines.values()))
    with written_output(out) as folder:
        for name in names:
            version = folder / f"{ENSEMBLE}_{name}" / "1"
            version.mkdir(parents=True)
            _copy(opened.folder, version, manifest.graphs[name], engines[name])
            text = model_config(manifest, name, config, engines[name])
            (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        (folder / ENSEMBLE / "1").mkdir(parents=True)  # Triton wants a version, empty here
        batch = min(_largest_batch(engines[name], config) for name in names)
        text = ensemble_config(manifest, names, batch)
        (folder / ENSEMBLE / "config.pbtxt").write_text(text, encoding="utf-8")
    return out


def _check(config: TritonConfig) -> None:
    if config.backend == "tensorrt" and config.device != "gpu":
        raise UsageError("--backend tensorrt: engines run on a GPU alone.")
    for option, value, least in (
        ("--batch", config.batch, 1),
        ("--instances", config.instances, 1),
        ("--delay", config.delay_us, 0),
    ):
        if value < least:
            raise UsageError(f"{option} {value}: expected at least {least}.")


def _check_precision(bundle: Path, manifest: Manifest, config: TritonConfig) -> None:
    if manifest.has_int8 and (config.backend, config.device) != ("onnxruntime", "cpu"):
        raise UsageError(
            f"{bundle}: its int8 graphs are for CPUs. Give --backend onnxruntime --device cpu."
        )
    if manifest.has_bf16 and config.backend == "onnxruntime":
        raise UsageError(
            f"{bundle}: ONNX Runtime has no bf16 convolutions on a CPU, and enlarges no images in "
            "bf16 on a GPU. Give --backend tensorrt, or export the bundle with --precision fp16 "
            "for a GPU, fp32 for a CPU."
        )


def _engine_sets(bundle: Path, manifest: Manifest, config: TritonConfig) -> list[EngineSet]:
    """Those that Triton can load, of one tile size: one for each compute capability.

    A request is one tile, so an engine that takes no fewer than two can't be used.
    """
    tile_px = config.tile_px or manifest.image.tile_px
    whole = [s for s in engine_sets(manifest) if flaw(manifest, s) is None]
    loadable = [s for s in whole if s.target == "tensorrt" and s.batches[0] == 1]
    found = [s for s in loadable if s.tile_px == tile_px]
    if not found:
        sizes = ", ".join(str(s.tile_px) for s in loadable)
        raise UsageError(
            f"{bundle}: no engines of --target tensorrt for single tiles of {tile_px} px. "
            + (f"There are some of {sizes} px: give --tile. " if sizes else "")
            + f"Build them on the GPU: rcod-export engines {bundle} --target tensorrt "
            f"--tile {tile_px} --batch 1 {config.batch}, or take --backend onnxruntime."
        )
    if len({s.version for s in found}) > 1:
        versions = ", ".join(f"{s.folder}: {s.version}" for s in found)
        raise UsageError(
            f"{bundle}: expected engines of one TensorRT, that of the server, found {versions}. "
            "Build the older ones again on their GPU, or remove their folder and export again."
        )
    return found


def _largest_batch(engines: list[Engine], config: TritonConfig) -> int:
    profiles = [shapes for engine in engines for shapes in engine.profile.values()]
    return min([config.batch, *(highest[0] for _, _, highest in profiles)])


def _copy(bundle: Path, version: Path, graph: Graph, engines: list[Engine]) -> None:
    for engine in engines:
        shutil.copy(bundle / engine.file, version / _plan(engine))
    if not engines:
        shutil.copy(bundle / graph.file, version / "model.onnx")
        for data in graph.data_files:  # by the names that the graph refers to
            shutil.copy(bundle / data, version / Path(data).name)


def _plan(engine: Engine) -> str:
    return f"model_sm{'_'.join(map(str, engine.sm))}.plan"


def model_config(manifest: Manifest, name: str, config: TritonConfig, engines: list[Engine]) -> str:
    """config.pbtxt of one graph."""
    graph, tile = manifest.graphs[name], config.tile_px or manifest.image.tile_px
    batch = _largest_batch(engines, config)
    head = [f'name: "{ENSEMBLE}_{name}"', f"max_batch_size: {batch}"]
    if engines:
        head.append('platform: "tensorrt_plan"')
        head.append(f'default_model_filename: "{_plan(engines[0])}"')
        for engine in engines:
            for sm in engine.sm:
                value = f'{{ key: "{sm // 10}.{sm % 10}" value: "{_plan(engine)}" }}'
                head.append(f"cc_model_filenames {value}")
    else:
        head.append('backend: "onnxruntime"')
    kind = "KIND_GPU" if config.device == "gpu" else "KIND_CPU"
    warm = "\n".join(
        f'    inputs {{ key: "{t.name}" value {{ data_type: {DTYPES[t.dtype]} '
        f"dims: [ {_dims(t, tile)} ] zero_data: true }} }}"
        for t in graph.inputs
    )
    return "\n".join(
        [
            *head,
            *_tensors("input", graph.inputs),
            *_tensors("output", graph.outputs),
            f"dynamic_batching {{ max_queue_delay_microseconds: {config.delay_us} }}",
            f"instance_group [ {{ kind: {kind} count: {config.instances} }} ]",
            f'model_warmup [ {{\n    name: "zeros"\n    batch_size: 1\n{warm}\n  }} ]',
            "",
        ]
    )


def ensemble_config(manifest: Manifest, names: list[str], batch: int) -> str:
    """config.pbtxt of the ensemble: what a graph makes and another takes has one name.

    What no step takes, such as a MEM's estimates, is left out: Triton refuses unused tensors.
    """
    graphs = {name: manifest.graphs[name] for name in names}
    takes = {name: _in_ensemble(name, graph.inputs) for name, graph in graphs.items()}
    gives = {name: _in_ensemble(name, graph.outputs) for name, graph in graphs.items()}
    made = {tensor for mapping in gives.values() for tensor in mapping.values()}
    used = {"sr", *(tensor for mapping in takes.values() for tensor in mapping.values())}
    inputs: dict[str, Tensor] = {}
    steps = []
    for name, graph in graphs.items():
        outside = (t for t in graph.inputs if takes[name][t.name] not in made)
        inputs |= {takes[name][t.name]: t for t in outside}
        kept = {key: tensor for key, tensor in gives[name].items() if tensor in used}
        lines = [f'      model_name: "{ENSEMBLE}_{name}"', "      model_version: -1"]
        for field, mapping in (("input_map", takes[name]), ("output_map", kept)):
            lines += [f'      {field} {{ key: "{k}" value: "{v}" }}' for k, v in mapping.items()]
        steps.append("    {\n" + "\n".join(lines) + "\n    }")
    (sr,) = graphs["decoder"].outputs
    return "\n".join(
        [
            f'name: "{ENSEMBLE}"',
            'platform: "ensemble"',
            f"max_batch_size: {batch}",
            *_tensors("input", inputs.values(), list(inputs)),
            *_tensors("output", [sr], ["sr"]),
            "ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}",
            "",
        ]
    )


def _in_ensemble(name: str, tensors: Iterable[Tensor]) -> dict[str, str]:
    """A graph's tensors -> their names in the ensemble."""
    return {t.name: RENAMED.get((name, t.name), t.name) for t in tensors}


def _tensors(field: str, tensors: Iterable[Tensor], names: list[str] | None = None) -> list[str]:
    """The batch axis is not written: Triton puts it before."""
    lines = []
    for i, tensor in enumerate(tensors):
        name = names[i] if names else tensor.name
        dims = ", ".join(str(-1 if isinstance(s, str) else s) for s in tensor.shape[1:])
        if len(tensor.shape) == 1:  # one number for each image
            shape = "dims: [ 1 ] reshape { shape: [ ] }"
        else:
            shape = f"dims: [ {dims} ]"
        lines.append(f'{field} [ {{ name: "{name}" data_type: {DTYPES[tensor.dtype]} {shape} }} ]')
    return lines


def _dims(tensor: Tensor, tile_px: int) -> str:
    return ", ".join(map(str, tensor.sized(1, tile_px, tile_px)[1:]))
