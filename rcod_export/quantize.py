"""Convolutions in 8 bits, for CPUs: ranges from photos, values of QuantizeLinear in the graph."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rcod_export.biases import correct_biases
from rcod_export.onnx_file import write_onnx
from rcod_runtime.errors import ExportError, UsageError
from rcod_runtime.image_io import READ_SUFFIXES, read_image

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
Photo = npt.NDArray[np.uint8]  # (H, W, 3)

QUANTIZED = ("encoder", "denoiser", "decoder")
MAX_PHOTOS = 64
MAX_SIDE_PX = 64  # of a photo's middle, before it is upscaled


def calibration_photos(folder: Path, multiple: int) -> Iterator[Photo]:
    """The middle of each photo of a folder, by name, at most ``MAX_PHOTOS``.

    Args:
        folder: photos as they are going to be upscaled.
        multiple: their sides are cut to it.

    Raises:
        UsageError: no folder, no photo in it, one that is too small or not in 8-bit RGB.
        ImageError: a file can't be decoded.
    """
    if not folder.is_dir():
        raise UsageError(f"--calibration {folder}: expected a folder of photos.")
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in READ_SUFFIXES)
    except OSError as exc:
        raise UsageError(f"--calibration {folder}: can't be read ({exc.strerror}).") from exc
    if not paths:
        raise UsageError(
            f"--calibration {folder}: no photo in it. Expected some twenty files as they are going "
            f"to be upscaled, of {', '.join(sorted(READ_SUFFIXES))}."
        )
    if len(paths) > MAX_PHOTOS:
        log.warning("--calibration %s: the first %d of %d photos", folder, MAX_PHOTOS, len(paths))
    for path in paths[:MAX_PHOTOS]:
        pixels = read_image(path).pixels
        sides = [min(side, MAX_SIDE_PX) // multiple * multiple for side in pixels.shape[:2]]
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,) or not all(sides):
            raise UsageError(
                f"{path}: expected an 8-bit RGB photo of at least {multiple} px a side to "
                f"calibrate on, found {pixels.shape} {pixels.dtype}. Take it out of the folder."
            )
        top, left = ((a - b) // 2 for a, b in zip(pixels.shape, sides, strict=False))
        yield np.ascontiguousarray(pixels[top : top + sides[0], left : left + sides[1]])


def quantize(path: Path, feeds: Sequence[Mapping[str, Array]]) -> tuple[str, ...]:
    """Replace an fp32 graph by one whose convolutions multiply 8 bits, where ``convolutions`` says.

    What goes into a convolution has one range, from the least and the greatest value over
    ``feeds``; weights have one for each output channel, in 7 bits: processors without VNNI add
    pairs of products in 16 bits. What comes out is fp32, which costs nothing: rounding it too would
    lose 3 dB. All else stays fp32. What rounding moves the mean of an output channel by is taken
    off its bias (empirical bias correction, Nagel et al. 2019), or Eq. 3 would make a shift of
    colours of it.

    Args:
        path: an fp32 graph.
        feeds: inputs of the graph by name.

    Returns:
        Names of files beside ``path`` that hold weights, as ``write_onnx``.

    Raises:
        ExportError: ONNX Runtime's quantizer or the ONNX checker refuses the graph, or there is no
            room for what they write meanwhile.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "quantized.onnx"
        try:
            _quantize(path, result, feeds)
            quantized = ir.load(result)
            for value in quantized.graph.initializers.values():
                if value.const_value is not None:  # as bytes, which is what a bundle's check counts
                    value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
        except ExportError:
            raise
        except OSError as exc:
            raise ExportError(
                f"{path.name}: could not be quantized in {folder} ({exc.strerror or exc}). Free "
                "space there, or set TMPDIR to another folder."
            ) from exc
        except Exception as exc:  # its exceptions share no base class
            raise ExportError(f"{path.name}: ONNX Runtime could not quantize it: {exc}") from exc
    for domain in set(quantized.opset_imports) - {""}:  # declared, not used
        del quantized.opset_imports[domain]
    quantized.producer_name = quantized.producer_version = None
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return write_onnx(quantized, path)


def _quantize(path: Path, result: Path, feeds: Sequence[Mapping[str, Array]]) -> None:
    from onnxruntime.quantization import quant_pre_process

    prepared = result.with_name("prepared.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)  # weights to fp32, shapes
    model = onnx.load(prepared)
    names = convolutions(model.graph)
    _round(prepared, result, feeds, names)
    found = quantized_convolutions(onnx.load(result).graph)
    if not names or found != names:  # a failed preparation is a line in its log, no more
        raise ExportError(
            f"{path.name}: expected {len(names)} convolutions with weights in 8 bits, ONNX "
            f"Runtime made {len(found)}. Its log says why; is there room in {result.parent}?"
        )
    correct_biases(model, onnx.load(result), names, feeds)
    onnx.save_model(model, prepared)
    _round(prepared, result, feeds, names)


def _round(
    prepared: Path, result: Path, feeds: Sequence[Mapping[str, Array]], names: list[str]
) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        prepared,
        result,
        _Feeds(feeds),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        nodes_to_quantize=names,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Conv"]},
    )


def convolutions(graph: onnx.GraphProto) -> list[str]:
    """Names of those that are to multiply 8 bits, in the order in which they run: they read an
    activation or an enlargement, and more convolutions follow.

    Those that read the image, the latent or a sum of blocks stay fp32: they are few, and flat areas
    there are all rounded to one side, which shifts colours. An enlarged sum doesn't, and is most of
    the decoder's work. The last ones make the image or what Eq. 3 enlarges.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    last = _last_convolutions(graph, made_by)
    return [
        node.name
        for node in graph.node
        if node.op_type == "Conv"
        and node.name not in last
        and _is_activated(made_by.get(node.input[0]), made_by)
    ]


def _last_convolutions(graph: onnx.GraphProto, made_by: Mapping[str, onnx.NodeProto]) -> set[str]:
    """Names of those from which an output of the graph is reached without another one."""
    names: set[str] = set()
    seen: set[str] = set()
    values = [output.name for output in graph.output]
    while values:
        value = values.pop()
        node = made_by.get(value)
        if value in seen or node is None:
            continue
        seen.add(value)
        if node.op_type == "Conv":
            names.add(node.name)
        else:
            values += node.input
    return names


def _is_activated(node: onnx.NodeProto | None, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    """ReLU, SiLU (x times its sigmoid) or an enlargement."""
    if node is None or node.op_type != "Mul":
        return node is not None and node.op_type in ("Relu", "Resize")
    factors = [made_by.get(name) for name in node.input]
    return any(
        factor is not None and factor.op_type == "Sigmoid" and factor.input[0] in node.input
        for factor in factors
    )


def quantized_convolutions(graph: onnx.GraphProto) -> list[str]:
    """Names of those whose weights are stored in 8 bits."""
    stored = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    weights = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    return [n.name for n in graph.node if n.op_type == "Conv" and n.input[1] in weights]


class _Feeds:
    """ONNX Runtime's CalibrationDataReader."""

    def __init__(self, feeds: Iterable[Mapping[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        feeds = next(self._feeds, None)
        return None if feeds is None else dict(feeds)
