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
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from rcod_runtime.errors import ExportError

MIN_ELEMENTS = 256  # below it a Cast node costs more than the bytes it saves


def export_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    dynamic_shapes: Mapping[str, Mapping[int, Any]],
    opset: int,
    path: Path,
) -> None:
    """Export with torch's dynamo exporter, store weights as fp16 where that loses nothing, check.

    Args:
        inputs: example inputs by name; names and order are the graph's.
        dynamic_shapes: input name -> {axis: torch.export.Dim}.

    Raises:
        ExportError: the exporter or the ONNX checker refuses the graph.
    """
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple(dict(dynamic_shapes[name]) for name in inputs),
                opset_version=opset,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        assert program is not None
        model = program.model_proto
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as exc:
        raise ExportError(f"{path.name}: the ONNX exporter refused the graph: {exc}") from exc
    _strip_metadata(model)
    store_as_fp16(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as exc:
        raise ExportError(f"{path.name}: the ONNX checker refused the graph: {exc}") from exc
    path.write_bytes(model.SerializeToString(deterministic=True))


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


def _strip_metadata(model: onnx.ModelProto) -> None:
    """Drop stack traces and source paths: they name the exporting machine and vary with it."""
    del model.metadata_props[:]
    graph = model.graph
    del graph.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
        value.doc_string = ""


def store_as_fp16(model: onnx.ModelProto) -> int:
    """Store fp32 weights that fp16 holds exactly as fp16 + Cast; returns how many.

    Arithmetic stays fp32 and the values stay the same bit by bit (merged checkpoints are rounded to
    fp16); runtimes fold the Cast when they load the graph. Halves the file.
    """
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if values.size < MIN_ELEMENTS or not np.array_equal(halves.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(halves, f"{name}.fp16"))
        casts.append(
            helper.make_node("Cast", [f"{name}.fp16"], [name], f"{name}.cast", to=TensorProto.FLOAT)
        )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return len(casts)
