"""PyTorch module -> checked ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from rcod_runtime.errors import ExportError

MIN_ELEMENTS = 256  # below it a Cast node costs more than the bytes it saves
MAX_INLINE_BYTES = 256 * 2**20  # more weights go into a file beside; protobuf ends at 2 GB


def export_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    dynamic_shapes: Mapping[str, Mapping[int, Any]],
    opset: int,
    path: Path,
) -> tuple[str, ...]:
    """Export with torch's dynamo exporter, write as ``write_onnx`` does.

    Args:
        inputs: example arguments of the module's forward; names and order are the graph's.
        dynamic_shapes: input name -> {axis: torch.export.Dim}.

    Raises:
        ExportError: the exporter or the ONNX checker refuses the graph.
    """
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                kwargs=dict(inputs),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes={name: dict(dynamic_shapes[name]) for name in inputs},
                opset_version=opset,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        assert program is not None
        model = program.model
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as exc:
        raise ExportError(f"{path.name}: the ONNX exporter refused the graph: {exc}") from exc
    return write_onnx(model, path)


def write_onnx(model: ir.Model, path: Path) -> tuple[str, ...]:
    """Store weights as fp16 where that loses nothing, write, check.

    Returns:
        Names of files beside ``path`` that hold weights (external data), none for small graphs.

    Raises:
        ExportError: the ONNX checker refuses the graph.
    """
    _strip_metadata(model)
    store_as_fp16(model)
    data_files = _write(model, path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ExportError(f"{path.name}: the ONNX checker refused the graph: {exc}") from exc
    return data_files


def _write(model: ir.Model, path: Path) -> tuple[str, ...]:
    weights = [value.const_value for value in model.graph.initializers.values()]
    if sum(tensor.nbytes for tensor in weights if tensor is not None) <= MAX_INLINE_BYTES:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        return ()
    data = f"{path.name}.data"
    ir.save(model, path, external_data=data)
    return (data,)


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints its progress and warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip_metadata(model: ir.Model) -> None:
    """Drop stack traces and source paths: they name the exporting machine and vary with it."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
    graph.metadata_props.clear()
    model.metadata_props.clear()


def store_as_fp16(model: ir.Model) -> int:
    """Store fp32 weights that fp16 holds exactly as fp16 + Cast; returns how many.

    Arithmetic stays fp32 and the values stay the same bit by bit (merged checkpoints are rounded to
    fp16); runtimes fold the Cast when they load the graph. Halves the file.
    """
    graph = model.graph
    casts = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_ELEMENTS:
            continue
        values = tensor.numpy()
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), values):
            continue
        stored = ir.Value(
            name=f"{name}.fp16",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.Tensor(halves, name=f"{name}.fp16"),
        )
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        result = cast.outputs[0]
        result.name, result.shape, result.type = name, value.shape, value.type
        ir.convenience.replace_all_uses_with(value, result)
        del graph.initializers[name]
        graph.register_initializer(stored)
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)
    return len(casts)
