"""A merged checkpoint to a bundle: exported, compared with PyTorch, written whole or not at all."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx

from rcod_export.card import CARD, write_card
from rcod_export.magnitude import checked_magnitudes
from rcod_export.onnx_file import export_onnx
from rcod_export.output import check_replaceable, written_output
from rcod_export.parity import check_levels_differ, check_sample, compare
from rcod_export.quantize import QUANTIZED, calibration_photos, quantize
from rcod_export.reference import Case, parity_cases, photo_cases, whole_images
from rcod_export.specs import GraphSpec, graph_specs, latent_step
from rcod_runtime import Upscaler
from rcod_runtime.colour import SAMPLE_COLOUR_MATCH
from rcod_runtime.errors import BundleError, UsageError
from rcod_runtime.image_io import read_image, write_image
from rcod_runtime.levels import default_level
from rcod_runtime.manifest import (
    MANIFEST_FILE,
    Evidence,
    Graph,
    Identity,
    ImageContract,
    Level,
    Manifest,
    MetricRange,
    Parity,
    Precision,
    Sample,
    read_manifest_bytes,
    sha256_file,
)
from rcod_runtime.manifest import Tensor as TensorSpec
from rcod_runtime.schema import parse_json
from rcod_runtime.selftest import MAX_SAMPLE_PIXELS
from rcod_runtime.signature import SIGNATURE_FILE
from rcod_train.adapter_files import are_adapters, load_adapters
from rcod_train.checkpoint import CheckpointInfo, CheckpointLevel, load_merged
from rcod_train.network import Parts
from rcod_train.schedule import alpha_sigma

log = logging.getLogger(__name__)

Photo = npt.NDArray[np.uint8]  # (H, W, 3)

CONTENT = {MANIFEST_FILE, SIGNATURE_FILE, CARD, "onnx", "sample", "engines"}  # of a bundle
DEFAULT_SAMPLE = Path(__file__).with_name("sample.png")
SCALE = 4
COMPARED_PX = 64  # sides of what is compared as a whole image, before it is upscaled
COMPATIBLE_OPSET = 20  # TensorRT 10.3 reads it
BF16_OPSET = 23  # convolutions have bf16 since 22; 23 has GroupNormalization and Attention too
# ONNX Runtime's CPU provider has no bf16 convolution.
SAMPLE_BACKEND = {
    Precision.FP32: "onnxruntime",
    Precision.FP16: "onnxruntime",
    Precision.BF16: "openvino",
    Precision.INT8: "onnxruntime",
}
# Of the sample's image between backends and processors: an activation that one rounds up and the
# other down is a whole step of its range in int8.
MAX_SAMPLE_DIFF_U8 = {**dict.fromkeys(Precision, 2), Precision.INT8: 24}


@dataclass(frozen=True)
class ExportConfig:
    """Choices of one export; they go into the manifest.

    ``opset`` None is the one that most runtimes read, or the first that knows the precision;
    ``timesteps`` moves the checkpoint's levels, one for each; empty: as trained. ``fold_level``
    leaves one of them, as part of the denoiser. ``calibration``: photos whose values give the
    ranges of int8. ``base`` and ``clip`` are the models that adapters are merged with: folders or
    hub ids.
    """

    precision: Precision = Precision.FP32
    opset: int | None = None
    timesteps: tuple[int, ...] = ()
    fold_level: str | None = None
    calibration: Path | None = None
    tile_px: int = 512
    overlap_px: int = 64
    sample: Path = DEFAULT_SAMPLE
    base: str | None = None
    clip: str | None = None


def opset_of(config: ExportConfig) -> int:
    """The opset to export.

    Raises:
        UsageError: it does not know the precision, or is not the one of int8.
    """
    if config.precision is Precision.INT8 and config.opset not in (None, COMPATIBLE_OPSET):
        raise UsageError(f"--precision int8: expected --opset {COMPATIBLE_OPSET}.")
    lowest = BF16_OPSET if config.precision is Precision.BF16 else COMPATIBLE_OPSET
    opset = lowest if config.opset is None else config.opset
    if opset < lowest:
        raise UsageError(
            f"opset {opset}: it has no {config.precision.value} convolutions. Use --opset {lowest}."
        )
    return opset


def build_bundle(checkpoint: Path, out: Path, config: ExportConfig) -> Manifest:
    """Export, check and write a bundle; an existing bundle at ``out`` is replaced at the end.

    Args:
        checkpoint: a merged one, or adapters, which need ``config.base`` and ``config.clip``.

    Raises:
        CheckpointError: the checkpoint can't be read.
        ExportError: a graph can't be exported.
        ParityError: a graph differs from PyTorch beyond its limit, or levels don't differ; or
            fp16 can't hold a value.
        OutputError: ``out`` can't be written, or holds something else than a bundle.
        UsageError: a choice that can't be had, such as a level that the checkpoint has not.
    """
    check_replaceable(out, "bundle", _is_bundle(out), CONTENT)
    if (out / SIGNATURE_FILE).exists():
        log.warning("%s: its signature will go with it; sign the new bundle", out)
    if (config.precision is Precision.INT8) != (config.calibration is not None):
        raise UsageError(
            "--precision int8 needs --calibration, a folder of photos as they are going to be "
            "upscaled; no other precision takes one."
        )
    opset = opset_of(config)
    # The manifest's rules, before anything is loaded.
    if not (0 < config.tile_px <= 4096 and 0 <= config.overlap_px <= config.tile_px // 2):
        raise UsageError(
            f"--tile {config.tile_px} --overlap {config.overlap_px}: expected a tile of at most "
            "4096 px and an overlap of at most half of it."
        )
    parts, info = _loaded(checkpoint, config)
    if config.timesteps:
        info = moved_levels(info, config.timesteps)
    if config.fold_level is not None:
        parts, info = _folded(parts, info, config.fold_level)
    contract = _image_contract(parts, config)
    photos = _calibration_photos(info, contract, config)
    lq = _sample_photo(config.sample)
    log.info("reference: PyTorch in fp32")
    with checked_magnitudes(config.precision):
        references = References(
            list(parity_cases(parts, info)),
            list(photo_cases(parts, info, _centre(lq), contract.scale)),
            [
                dataclasses.replace(case, expected={})
                for photo in photos
                for case in photo_cases(parts, info, photo, contract.scale, decoded=False)
            ],
        )
    images = whole_images(references.sample)
    check_levels_differ(images)  # PyTorch's, before the export takes its minutes
    with written_output(out) as folder:
        (folder / "onnx").mkdir()
        graphs: dict[str, Graph] = {}
        parity: list[Parity] = []
        for graph, name, rows in _exported(parts, info, references, folder, config, opset):
            graphs[name] = graph
            parity += rows
        del parts, references  # the runtime below loads the graphs
        manifest = Manifest(
            version=1,
            identity=_identity(info),
            levels=tuple(Level(**dataclasses.asdict(level)) for level in info.levels),
            metric=MetricRange(m_min=info.m_min, m_max=info.m_max, k=info.k),
            image=contract,
            graphs=graphs,
            engines=(),
            sample=None,
            evidence=Evidence(parity=tuple(parity), sample_psnr_db=None),
        )
        manifest = _with_sample(manifest, folder, images, config)
        write_card(folder / CARD, manifest, info.training)
    return manifest


def _is_bundle(folder: Path) -> bool:
    """By its manifest, which may be of another version: other things have a manifest.json too."""
    with suppress(BundleError, ValueError):
        manifest = parse_json(read_manifest_bytes(folder / MANIFEST_FILE).decode())
        return isinstance(manifest, dict) and {"identity", "levels", "graphs"} <= manifest.keys()
    return False


def _loaded(checkpoint: Path, config: ExportConfig) -> tuple[Parts, CheckpointInfo]:
    models = (config.base, config.clip)
    if not are_adapters(checkpoint):
        if models != (None, None):
            raise UsageError(f"{checkpoint}: a merged checkpoint takes no --base and no --clip.")
        return load_merged(checkpoint)
    if config.base is None or config.clip is None:
        raise UsageError(
            f"{checkpoint}: adapters, which are merged with the models they were trained on. Give "
            "--base and --clip, or the merged checkpoint beside this folder."
        )
    return load_adapters(checkpoint, config.base, config.clip)


def moved_levels(info: CheckpointInfo, timesteps: tuple[int, ...]) -> CheckpointInfo:
    """The same levels at other timesteps, with their constants of Eq. 3.

    The U-Net knows the timestep as a number, so those between the trained ones are levels too.

    Raises:
        UsageError: not one for each level, not ascending, or outside 1..999.
    """
    found = " ".join(map(str, timesteps))
    if len(timesteps) != len(info.levels):
        names = ", ".join(level.name for level in info.levels)
        raise UsageError(f"--timesteps {found}: expected one for each of {names}.")
    if list(timesteps) != sorted(set(timesteps)) or not 0 < timesteps[0] <= timesteps[-1] < 1000:
        raise UsageError(f"--timesteps {found}: expected ascending integers in 1..999.")
    levels = []
    for level, t in zip(info.levels, timesteps, strict=True):
        follows = math.isclose(level.alpha, alpha_sigma(level.timestep)[0], abs_tol=1e-5)
        # Published code has one pair of constants for every t.
        alpha, sigma = alpha_sigma(t) if follows else (level.alpha, level.sigma)
        levels.append(CheckpointLevel(level.name, t, alpha, sigma))
    return dataclasses.replace(info, levels=tuple(levels))


def _folded(parts: Parts, info: CheckpointInfo, name: str) -> tuple[Parts, CheckpointInfo]:
    """The checkpoint with one level; nothing is left to choose, so the MEM goes."""
    levels = tuple(level for level in info.levels if level.name == name)
    if not levels:
        names = ", ".join(level.name for level in info.levels)
        raise UsageError(f"--fold-level {name}: expected one of {names}.")
    return dataclasses.replace(parts, mem=None), dataclasses.replace(info, levels=levels)


@dataclass(frozen=True)
class References:
    """What PyTorch computes: for graphs one by one, for the sample's centre, and for the photos
    that int8 takes its ranges from."""

    graphs: list[Case]
    sample: list[Case]
    calibration: list[Case]


def _calibration_photos(
    info: CheckpointInfo, contract: ImageContract, config: ExportConfig
) -> list[Photo]:
    if config.calibration is None:
        return []
    if info.family != "nano":
        raise UsageError(
            f"--precision int8: expected a nano checkpoint, found {info.family}, of which no int8 "
            "graph has been measured. Use fp32 or bf16 on a CPU."
        )
    multiple = contract.size_multiple // math.gcd(contract.size_multiple, contract.scale)
    return list(calibration_photos(config.calibration, multiple))


def _exported(
    parts: Parts,
    info: CheckpointInfo,
    references: References,
    folder: Path,
    config: ExportConfig,
    opset: int,
) -> Iterator[tuple[Graph, str, list[Parity]]]:
    """The graphs, written and compared with their cases, one after another."""
    integer = config.precision is Precision.INT8
    c = int(parts.vae.config.latent_channels)
    for spec in graph_specs(parts, info, Precision.FP32 if integer else config.precision, SCALE):
        log.info("%s: exporting", spec.name)
        graph = _export(spec, folder, opset)
        path = folder / graph.file
        rows = list(compare(_of(references.graphs, spec.name), path, spec.precision, c))
        if integer and spec.name in QUANTIZED:
            log.info("%s: calibrating", spec.name)
            feeds = [case.feeds for case in _of(references.calibration, spec.name)]
            graph = _quantized(graph, path, quantize(path, feeds))
            rows = list(compare(_of(references.sample, spec.name), path, Precision.INT8, c))
        yield graph, spec.name, rows


def _of(cases: list[Case], graph: str) -> list[Case]:
    return [case for case in cases if case.graph == graph]


def _export(spec: GraphSpec, folder: Path, opset: int) -> Graph:
    path = folder / "onnx" / f"{spec.name}.onnx"
    data_files = export_onnx(spec.module, spec.inputs, spec.outputs, spec.dynamic, opset, path)
    graph = onnx.load(path, load_external_data=False).graph

    def tensors(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype="float32",
                shape=spec.shapes[value.name][0],
                layout=spec.shapes[value.name][1],
            )
            for value in values
        )

    halves = any(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer)
    return Graph(
        file=f"onnx/{spec.name}.onnx",
        **_content(path, data_files),
        opset=opset,
        precision=spec.precision,
        weights=Precision.FP16 if halves else spec.precision,
        inputs=tensors(graph.input),
        outputs=tensors(graph.output),
    )


def _quantized(graph: Graph, path: Path, data_files: tuple[str, ...]) -> Graph:
    int8 = Precision.INT8
    return dataclasses.replace(graph, **_content(path, data_files), precision=int8, weights=int8)


def _content(path: Path, data_files: tuple[str, ...]) -> dict[str, Any]:
    return {
        "data_files": {f"onnx/{name}": sha256_file(path.with_name(name)) for name in data_files},
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
    }


# -- manifest ---------------------------------------------------------------------------------


def _identity(info: CheckpointInfo) -> Identity:
    return Identity(
        name=info.name,
        family=cast(Any, info.family),  # the manifest checks it
        summary=info.summary,
        licence=info.licence,
        sources=info.sources,
    )


def _image_contract(parts: Parts, config: ExportConfig) -> ImageContract:
    multiple = parts.vae.factor * latent_step(parts)
    if config.tile_px % multiple:
        raise UsageError(f"--tile {config.tile_px}: expected a multiple of {multiple}.")
    return ImageContract(
        scale=SCALE,
        channels=3,
        value_min=-1.0,
        value_max=1.0,
        size_multiple=multiple,
        tile_px=config.tile_px,
        overlap_px=config.overlap_px,
        tokens_px=parts.vpim.tokens_px,
    )


def _sample_photo(path: Path) -> Photo:
    pixels = read_image(path).pixels
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise UsageError(f"{path}: expected an 8-bit RGB photo as the sample.")
    height, width = pixels.shape[:2]
    if min(height, width) < COMPARED_PX:
        raise UsageError(
            f"{path}: expected at least {COMPARED_PX} px a side in the sample, found {width} x "
            f"{height}."
        )
    if height * width > MAX_SAMPLE_PIXELS:
        raise UsageError(
            f"{path}: expected at most {MAX_SAMPLE_PIXELS} pixels in the sample, which every "
            f"self-test upscales, found {width} x {height}. Take a part of it."
        )
    return cast(Photo, pixels)


def _centre(photo: Photo) -> Photo:
    """What of the sample all levels are compared on: a quarter of the work at full size."""
    top, left = (max(0, side - COMPARED_PX) // 2 for side in photo.shape[:2])
    return np.ascontiguousarray(photo[top : top + COMPARED_PX, left : left + COMPARED_PX])


def _with_sample(
    manifest: Manifest,
    folder: Path,
    reference: dict[str, Photo],
    config: ExportConfig,
) -> Manifest:
    """Run the sample through the shipping runtime, hold it against PyTorch, add it."""
    (folder / "sample").mkdir()
    lq_path, sr_path = folder / "sample" / "lq.png", folder / "sample" / "sr.png"
    shutil.copyfile(config.sample, lq_path)
    _write(manifest, folder)
    lq = _sample_photo(lq_path)
    names = [level.name for level in manifest.levels]
    realism = default_level(manifest.levels)
    multiple, scale = manifest.image.size_multiple, manifest.image.scale
    compared = _centre(lq)
    whole_px = -(-max(compared.shape[:2]) * scale // multiple) * multiple  # one tile, as PyTorch
    with Upscaler(folder, backend=SAMPLE_BACKEND[config.precision], precision="fp32") as upscaler:
        whole: Any = {"colour_match": "none", "tile_px": whole_px, "overlap_px": 0}
        results = {name: cast(Photo, upscaler(compared, name, **whole)) for name in names}
        tiles: Any = {"colour_match": SAMPLE_COLOUR_MATCH, "tile_px": manifest.image.tile_px}
        sr = cast(Photo, upscaler(lq, realism, **tiles))
    check_levels_differ(results)
    psnr_db = check_sample(reference, results, config.precision)
    write_image(sr_path, sr)
    manifest = dataclasses.replace(
        manifest,
        sample=Sample(
            lq="sample/lq.png",
            sr="sample/sr.png",
            realism=realism,
            lq_sha256=sha256_file(lq_path),
            sr_sha256=sha256_file(sr_path),
            max_abs_diff_u8=MAX_SAMPLE_DIFF_U8[config.precision],
        ),
        evidence=dataclasses.replace(manifest.evidence, sample_psnr_db=psnr_db),
    )
    _write(manifest, folder)
    return manifest


def _write(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
