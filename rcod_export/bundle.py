"""A merged checkpoint to a bundle: exported, compared with PyTorch, written whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from rcod_export.card import write_card
from rcod_export.graphs import DecoderGraph, DenoiserGraph, EncoderGraph
from rcod_export.onnx_file import export_onnx
from rcod_export.parity import (
    MAX_LEVELS_PSNR_DB,
    MIN_SAMPLE_PSNR_DB,
    limit_of,
    measure,
    psnr_u8,
    run_onnx,
)
from rcod_runtime import Upscaler
from rcod_runtime.errors import ExportError, OutputError, ParityError
from rcod_runtime.image_io import read_image, write_image
from rcod_runtime.manifest import (
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
    sha256_file,
)
from rcod_runtime.manifest import Tensor as TensorSpec
from rcod_train.checkpoint import CheckpointInfo, load_merged
from rcod_train.files import written_whole
from rcod_train.network import Parts, predict_eps
from rcod_train.schedule import one_step

log = logging.getLogger(__name__)

DEFAULT_SAMPLE = Path(__file__).with_name("sample.png")
SAMPLE_REALISM = "neutral"


@dataclass(frozen=True)
class ExportConfig:
    """Choices of one export; they go into the manifest."""

    opset: int = 20
    tile_px: int = 512
    overlap_px: int = 64
    sample: Path = DEFAULT_SAMPLE


@dataclass(frozen=True)
class _Exported:
    """A graph on its way into the manifest: module, example inputs, axes that may vary."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, Any]]
    shapes: dict[str, tuple[tuple[int | str, ...], Any]]  # tensor -> (shape, layout)


def build_bundle(checkpoint: Path, out: Path, config: ExportConfig) -> Manifest:
    """Export, check and write a bundle; an existing bundle at ``out`` is replaced at the end.

    Raises:
        CheckpointError: the checkpoint can't be read.
        ExportError: a graph can't be exported.
        ParityError: a graph differs from PyTorch beyond its limit, or levels don't differ.
        OutputError: ``out`` can't be written, or holds something that is not a bundle.
    """
    if out.exists() and not (out / "manifest.json").is_file():
        raise OutputError(f"{out}: exists and is not a bundle. Choose another -o.")
    parts, info = load_merged(checkpoint)
    reference = copy.deepcopy(parts)  # the denoiser's graph takes its U-Net over
    with _written_whole(out) as folder:
        (folder / "onnx").mkdir()
        graphs, parity = {}, []
        for spec in _graph_specs(parts, info):
            log.info("%s: exporting", spec.name)
            graphs[spec.name] = _export(spec, folder, config.opset)
            parity += list(_compare(spec.name, folder / graphs[spec.name].file, reference, info))
        manifest = Manifest(
            version=1,
            identity=_identity(info),
            levels=tuple(Level(**dataclasses.asdict(level)) for level in info.levels),
            metric=MetricRange(m_min=info.m_min, m_max=info.m_max, k=info.k),
            image=_image_contract(parts, config),
            graphs=graphs,
            engines=(),
            sample=None,
            evidence=Evidence(parity=tuple(parity), sample_psnr_db=None),
        )
        manifest = _with_sample(manifest, folder, reference, info, config.sample)
        write_card(folder / "MODEL_CARD.md", manifest, info.training)
    return manifest


# -- graphs -----------------------------------------------------------------------------------


def _graph_specs(parts: Parts, info: CheckpointInfo) -> Iterator[_Exported]:
    c, side = int(parts.vae.config.latent_channels), parts.vpim.tokens_px
    factor, n = parts.vae.factor, len(info.levels)
    step = 2 ** (len(parts.unet.config.block_out_channels) - 1)  # of the latent's sides
    batch, h, w = Dim("batch", min=1, max=64), Dim("h", min=1, max=128), Dim("w", min=1, max=128)
    latent = {0: batch, 2: step * h, 3: step * w}
    image = {0: batch, 2: factor * step * h, 3: factor * step * w}
    with torch.no_grad():
        tokens = parts.vpim(torch.zeros(2, 3, side, side))
    latent_shape: tuple[int | str, ...] = ("batch", c, f"height/{factor}", f"width/{factor}")
    image_shape: tuple[int | str, ...] = ("batch", 3, "height", "width")
    token_shape: tuple[int | str, ...] = ("batch", *tokens.shape[1:])
    z, small = (
        torch.randn(2, c, 4 * step, 6 * step),
        torch.rand(2, 3, 4 * step * factor, 6 * step * factor),
    )

    encoder_outputs: tuple[str, ...] = ("z_lq",)
    encoder_shapes = {"image": (image_shape, "NCHW"), "z_lq": (latent_shape, "NCHW")}
    if parts.mem is not None:
        encoder_outputs = ("z_lq", "m_l")
        encoder_shapes["m_l"] = (("batch",), "N")
    yield _Exported(
        "encoder",
        EncoderGraph(parts.vae, parts.mem),
        {"image": small},
        encoder_outputs,
        {"image": image},
        encoder_shapes,
    )
    yield _Exported(
        "vpim",
        parts.vpim,
        {"image": torch.zeros(2, 3, side, side)},
        ("tokens",),
        {"image": {0: batch}},
        {"image": (("batch", 3, side, side), "NCHW"), "tokens": (token_shape, "NLC")},
    )
    yield _Exported(
        "denoiser", DenoiserGraph(parts.unet, info.levels),
        {"z_lq": z, "tokens": tokens, "level": torch.full((2, n), 1.0 / n)}, ("z_sr",),
        {"z_lq": latent, "tokens": {0: batch}, "level": {0: batch}},
        {
            "z_lq": (latent_shape, "NCHW"),
            "tokens": (token_shape, "NLC"),
            "level": (("batch", n), "NK"),
            "z_sr": (latent_shape, "NCHW"),
        },
    )  # fmt: skip
    yield _Exported(
        "decoder",
        DecoderGraph(parts.vae),
        {"z_sr": z},
        ("image",),
        {"z_sr": latent},
        {"z_sr": (latent_shape, "NCHW"), "image": (image_shape, "NCHW")},
    )


def _export(spec: _Exported, folder: Path, opset: int) -> Graph:
    path = folder / "onnx" / f"{spec.name}.onnx"
    export_onnx(spec.module, spec.inputs, spec.outputs, spec.dynamic, opset, path)
    model = onnx.load(path)

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

    halves = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    return Graph(
        file=f"onnx/{spec.name}.onnx",
        data_files={},
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        opset=opset,
        precision=Precision.FP32,
        weights=Precision.FP16 if halves else Precision.FP32,
        inputs=tensors(model.graph.input),
        outputs=tensors(model.graph.output),
    )


def _compare(name: str, path: Path, reference: Parts, info: CheckpointInfo) -> Iterator[Parity]:
    """ONNX Runtime against the checkpoint's plain modules, on inputs the export did not see."""
    generator = torch.Generator().manual_seed(1)
    c, side = int(reference.vae.config.latent_channels), reference.vpim.tokens_px
    factor = reference.vae.factor
    step = 2 ** (len(reference.unet.config.block_out_channels) - 1)
    h, w = 6 * step, 8 * step
    image = torch.rand(3, 3, h * factor, w * factor, generator=generator) * 2 - 1
    thumbnail = torch.rand(3, 3, side, side, generator=generator) * 2 - 1
    z = torch.randn(3, c, h, w, generator=generator)

    def onnx_outputs(feeds: Mapping[str, Tensor]) -> dict[str, Any]:
        return run_onnx(path, {key: value.numpy() for key, value in feeds.items()})

    with torch.no_grad():
        if name == "encoder":
            found = onnx_outputs({"image": image})
            z_lq = reference.vae.encode(image)
            yield measure(name, None, z_lq.numpy(), found["z_lq"], limit_of(name))
            if reference.mem is not None:
                m_l = reference.mem(z_lq).numpy()
                yield measure("encoder", "m_l", m_l, found["m_l"], limit_of(name))
        elif name == "vpim":
            found = onnx_outputs({"image": thumbnail})
            tokens = reference.vpim(thumbnail)
            yield measure(name, None, tokens.numpy(), found["tokens"], limit_of(name))
        elif name == "decoder":
            found = onnx_outputs({"z_sr": z})
            decoded = reference.vae.decode(z).clamp(-1, 1)
            yield measure(name, None, decoded.numpy(), found["image"], limit_of(name))
        else:
            tokens = reference.vpim(thumbnail)
            for index, level in enumerate(info.levels):
                one_hot = torch.eye(len(info.levels))[index].expand(3, -1).contiguous()
                found = onnx_outputs({"z_lq": z, "tokens": tokens, "level": one_hot})
                z_sr = denoise(reference, z, tokens, info, index)
                limit = limit_of(name, level.sigma / level.alpha)
                yield measure(name, level.name, z_sr.numpy(), found["z_sr"], limit)


def denoise(parts: Parts, z_lq: Tensor, tokens: Tensor, info: CheckpointInfo, index: int) -> Tensor:
    """The plain form: the U-Net called by its timestep, then Eq. 3."""
    level = info.levels[index]
    t = torch.full((len(z_lq),), level.timestep)
    return one_step(z_lq, predict_eps(parts.unet, z_lq, t, tokens), level.alpha, level.sigma)


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
    multiple = parts.vae.factor * 2 ** (len(parts.unet.config.block_out_channels) - 1)
    if config.tile_px % multiple:
        raise ExportError(f"tile size {config.tile_px} px: expected a multiple of {multiple}.")
    return ImageContract(
        scale=4,
        channels=3,
        value_min=-1.0,
        value_max=1.0,
        size_multiple=multiple,
        tile_px=config.tile_px,
        overlap_px=config.overlap_px,
        tokens_px=parts.vpim.tokens_px,
    )


def _with_sample(
    manifest: Manifest, folder: Path, reference: Parts, info: CheckpointInfo, photo: Path
) -> Manifest:
    """Run the sample through the shipping runtime and through PyTorch; add both to the bundle."""
    (folder / "sample").mkdir()
    lq_path, sr_path = folder / "sample" / "lq.png", folder / "sample" / "sr.png"
    shutil.copyfile(photo, lq_path)
    _write(manifest, folder)
    lq = read_image(lq_path).pixels
    results = {}
    multiple, scale = manifest.image.size_multiple, manifest.image.scale
    whole_px = -(-max(lq.shape[:2]) * scale // multiple) * multiple  # one tile, as PyTorch sees it
    with Upscaler(folder, backend="onnxruntime") as upscaler:
        for level in info.levels:
            results[level.name] = upscaler(
                lq, realism=level.name, colour_match="none", tile_px=whole_px, overlap_px=0
            )
        sr = upscaler(lq, realism=SAMPLE_REALISM)
    names = [level.name for level in info.levels]
    for a, b in zip(names, names[1:], strict=False):
        closeness = psnr_u8(results[a], results[b])
        if closeness > MAX_LEVELS_PSNR_DB:
            raise ParityError(
                f"levels {a} and {b} give nearly the same image ({closeness:.1f} dB, limit "
                f"{MAX_LEVELS_PSNR_DB}): the timestep does not reach the U-Net. Train longer, or "
                "check the level table."
            )
    worst = min(
        psnr_u8(_torch_image(reference, info, index, lq, manifest), results[name])
        for index, name in enumerate(names)
    )
    if worst < MIN_SAMPLE_PSNR_DB:
        raise ParityError(
            f"sample image: ONNX against PyTorch {worst:.1f} dB, expected at least "
            f"{MIN_SAMPLE_PSNR_DB}. The bundle was not written."
        )
    write_image(sr_path, sr)
    manifest = dataclasses.replace(
        manifest,
        sample=Sample(
            lq="sample/lq.png",
            sr="sample/sr.png",
            realism=SAMPLE_REALISM,
            lq_sha256=sha256_file(lq_path),
            sr_sha256=sha256_file(sr_path),
            max_abs_diff_u8=2,
        ),
        evidence=dataclasses.replace(manifest.evidence, sample_psnr_db=worst),
    )
    _write(manifest, folder)
    return manifest


@torch.no_grad()
def _torch_image(
    parts: Parts, info: CheckpointInfo, index: int, lq: Any, manifest: Manifest
) -> Any:
    """The pipeline of one tile in PyTorch: lq (h, w, 3) uint8 -> sr (4h, 4w, 3) uint8."""
    from rcod_runtime.resample import resize_for_tokens, upsample

    height, width = (side * manifest.image.scale for side in lq.shape[:2])

    def prepared(image: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] / 127.5 - 1.0

    image = prepared(upsample(lq, (height, width)))
    tokens = parts.vpim(prepared(resize_for_tokens(lq, manifest.image.tokens_px)))
    z_sr = denoise(parts, parts.vae.encode(image), tokens, info, index)
    sr = (parts.vae.decode(z_sr).clamp(-1, 1) + 1.0) * 127.5
    return sr[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def _write(manifest: Manifest, folder: Path) -> None:
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    try:
        with written_whole(out) as folder:
            yield folder
    except OSError as exc:
        raise OutputError(
            f"{out}: could not be written ({exc.strerror or exc}). Free space or choose another -o."
        ) from exc
