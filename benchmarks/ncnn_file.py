"""Weights in ncnn's format (.param and .bin) as an OpenVINO model, so that peers run on our engine.

A .param file lists layers with named tensors; the .bin holds their numbers in the same order. Only
the layers that the compared networks have are known; another one is an error, never left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.errors import BenchmarkError

MAGIC = "7767517"
HALF_FLAG, FLOAT_FLAG = 0x01306B47, 0
BINARY = {0: "add", 1: "subtract", 2: "multiply"}
NEAREST, LEAKY, SUM = 1, 2, 1

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """One line of a .param file. ``options``: numbers by their key, arrays as tuples."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: dict[int, Any]

    def option(self, key: int, default: Any = 0) -> Any:
        return self.options.get(key, default)


def read_layers(path: Path) -> list[Layer]:
    """The layers of a .param file.

    Raises:
        BenchmarkError: it is no .param file.
    """
    lines = path.read_text(encoding="ascii").splitlines()
    if not lines or lines[0].strip() != MAGIC:
        raise BenchmarkError(f"{path}: expected {MAGIC} in its first line, found no ncnn network.")
    layers = []
    for line in filter(str.strip, lines[2:]):
        kind, name, ins, outs, *rest = line.split()
        tensors, options = rest[: int(ins) + int(outs)], rest[int(ins) + int(outs) :]
        parsed = dict(_option(text) for text in options)
        layers.append(
            Layer(kind, name, tuple(tensors[: int(ins)]), tuple(tensors[int(ins) :]), parsed)
        )
    return layers


def _option(text: str) -> tuple[int, Any]:
    key, _, value = text.partition("=")
    number = int(key)
    if number <= -23300:  # an array: its length first
        return -23300 - number, tuple(float(item) for item in value.split(",")[1:])
    return number, float(value) if "." in value or "e" in value else int(value)


class _Numbers:
    """The .bin file, read from front to end."""

    def __init__(self, path: Path) -> None:
        self._path, self._data, self._at = path, path.read_bytes(), 0

    def floats(self, count: int) -> Floats:
        return self._take(count, np.dtype("<f4")).astype(np.float32)

    def weights(self, count: int) -> Floats:
        """fp16 or fp32, as the flag before them says; fp16 is padded to whole words."""
        flag = int(self._take(1, np.dtype("<u4"))[0])
        if flag == FLOAT_FLAG:
            return self.floats(count)
        if flag != HALF_FLAG:
            raise BenchmarkError(f"{self._path}: expected fp16 or fp32 weights, found {flag:#x}.")
        return self._take(count + count % 2, np.dtype("<f2"))[:count].astype(np.float32)

    def _take(self, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        size = count * dtype.itemsize
        if self._at + size > len(self._data):
            raise BenchmarkError(f"{self._path}: ends before the weights of its network do.")
        values = np.frombuffer(self._data, dtype, count, self._at)
        self._at += size
        return values

    def check_end(self) -> None:
        if self._at != len(self._data):
            left = len(self._data) - self._at
            raise BenchmarkError(f"{self._path}: {left} bytes are left over after all layers.")


def read_network(param: Path) -> Any:
    """An openvino.Model: "image" (1, 3, H, W) in 0..1, RGB -> "sr", with the sizes left open.

    Raises:
        BenchmarkError: a layer is unknown, or the weights don't fit the layers.
    """
    import openvino
    from openvino import opset13 as ops

    numbers = _Numbers(param.with_suffix(".bin"))
    image = ops.parameter([1, 3, -1, -1], np.float32, "image")
    tensors: dict[str, Any] = {}
    for layer in read_layers(param):
        if layer.kind == "Input":
            tensors[layer.outputs[0]] = image
            continue
        inputs = [tensors[name] for name in layer.inputs]
        if layer.kind == "Split":
            tensors.update(dict.fromkeys(layer.outputs, inputs[0]))
            continue
        tensors[layer.outputs[0]] = last = _node(layer, inputs, numbers, param, ops)
    numbers.check_end()
    image.output(0).set_names({"image"})
    last.output(0).set_names({"sr"})
    return openvino.Model([last], [image], param.stem)


def _node(layer: Layer, x: list[Any], numbers: _Numbers, param: Path, ops: Any) -> Any:
    if layer.kind == "Convolution":
        return _convolution(layer, x[0], numbers, ops)
    if layer.kind == "MemoryData":
        width, height, channels = (layer.option(key) for key in (0, 1, 2))
        count = int(width * height * channels)
        return ops.constant(numbers.floats(count).reshape(1, channels, height, width))
    if layer.kind == "Concat":
        return ops.concat(x, 1)
    if layer.kind == "BinaryOp" and layer.option(0) in BINARY:
        b = ops.constant(np.float32(layer.option(2))) if layer.option(1) else x[1]
        return getattr(ops, BINARY[layer.option(0)])(x[0], b)
    if layer.kind == "Eltwise" and layer.option(0) == SUM:
        factors = layer.option(1, ()) or (1.0,) * len(x)
        parts = [
            part if factor == 1 else ops.multiply(part, ops.constant(np.float32(factor)))
            for part, factor in zip(x, factors, strict=True)
        ]
        return ops.add(*parts)
    if layer.kind == "Interp" and layer.option(0) == NEAREST:
        scales = np.array([layer.option(1), layer.option(2)], np.float32)
        return ops.interpolate(
            x[0], scales, mode="nearest", shape_calculation_mode="scales",
            axes=np.array([2, 3]), coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )  # fmt: skip
    if layer.kind == "Sigmoid":
        return ops.sigmoid(x[0])
    if layer.kind == "Swish":
        return ops.swish(x[0])
    if layer.kind == "PixelShuffle":
        return ops.depth_to_space(x[0], "depth_first", layer.option(0))
    raise BenchmarkError(f"{param}: {layer.name}: a {layer.kind} like this one is not known here.")


def _convolution(layer: Layer, x: Any, numbers: _Numbers, ops: Any) -> Any:
    channels, side, pad = layer.option(0), layer.option(1), layer.option(4)
    values = numbers.weights(layer.option(6))
    weights = ops.constant(values.reshape(channels, -1, side, side))
    y = ops.convolution(x, weights, [1, 1], [pad, pad], [pad, pad], [1, 1])
    if layer.option(5):
        y = ops.add(y, ops.constant(numbers.floats(channels).reshape(1, channels, 1, 1)))
    activation, settings = layer.option(9), layer.option(10, ())
    if activation == LEAKY:
        return ops.prelu(y, ops.constant(np.array([settings[0]], np.float32)))
    if activation:
        raise BenchmarkError(f"{layer.name}: activation {activation} is not known here.")
    return y
