"""What a graph costs: nodes, parameters, multiply-accumulates, bytes, the time floor on a GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from rcod_runtime.errors import ExportError


@dataclass(frozen=True)
class Gpu:
    """Peak rates without sparsity, from the vendor's data sheets."""

    name: str
    fp16_tflops: float  # tensor cores, fp32 accumulation
    fp32_tflops: float
    gb_per_s: float
    source: str


GPUS = (
    Gpu("RTX 4090", 165.2, 82.6, 1008, "NVIDIA Ada GPU architecture white paper, appendix A"),
    Gpu("RTX 5090", 209.5, 104.8, 1792, "NVIDIA RTX Blackwell GPU architecture white paper"),
    Gpu("L4", 121.0, 30.3, 300, "NVIDIA L4 data sheet, half of the rate with sparsity"),
    Gpu("A100 80GB", 312.0, 19.5, 2039, "NVIDIA A100 data sheet, SXM"),
)


@dataclass(frozen=True)
class Cost:
    """Of one call at fixed shapes. ``weight_bytes`` as stored, ``io_bytes`` of inputs, outputs."""

    nodes: dict[str, int]
    parameters: int
    macs: int
    weight_bytes: int
    io_bytes: int

    def floor_s(self, gpu: Gpu, half: bool) -> float:
        """Nothing is faster than arithmetic at peak, or weights and images once from memory."""
        rate = gpu.fp16_tflops if half else gpu.fp32_tflops
        arithmetic = 2 * self.macs / (rate * 1e12)
        traffic = (self.weight_bytes + self.io_bytes) / (gpu.gb_per_s * 1e9)
        return max(arithmetic, traffic)


def measure_cost(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
    """Cost of an ONNX file with these input shapes. OpenVINO infers the shapes inside.

    Raises:
        ExportError: the graph can't be read, or does not take these shapes.
    """
    from rcod_runtime.backends.openvino_backend import shared_core

    model = onnx.load(path)
    weights = model.graph.initializer
    try:
        shaped = shared_core().read_model(path)
        shaped.reshape({name: list(shape) for name, shape in shapes.items()})
        ends = [*shaped.inputs, *shaped.outputs]
        macs = sum(_macs(op) for op in shaped.get_ordered_ops())
        io_bytes = sum(math.prod(end.shape) * end.element_type.size for end in ends)
    except RuntimeError as exc:
        raise ExportError(f"{path}: no shapes for inputs {dict(shapes)}: {exc}") from exc
    return Cost(
        nodes=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        parameters=sum(math.prod(tensor.dims) for tensor in weights),
        macs=macs,
        weight_bytes=sum(numpy_helper.to_array(tensor).nbytes for tensor in weights),
        io_bytes=io_bytes,
    )


def _macs(op: Any) -> int:
    kind: str = op.get_type_name()
    if kind not in ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention"):
        return 0
    ends = op.input_value(0), op.input_value(1), op.output(0)
    a, b, output = (tuple(int(side) for side in end.shape) for end in ends)
    if kind == "Convolution":  # b: (out, in, kh, kw)
        return math.prod(output) * math.prod(b[1:])
    if kind == "GroupConvolution":  # b: (groups, out, in, kh, kw)
        return math.prod(output) * math.prod(b[2:])
    if kind == "MatMul":
        return math.prod(output) * int(a[-2 if op.get_attributes()["transpose_a"] else -1])
    return 2 * math.prod(a) * int(b[-2])  # q k^T, and its product with v
