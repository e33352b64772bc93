"""OpenVINO on the CPU: the fast default."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import openvino as ov
from openvino.frontend import FrontEndManager

from rcod_runtime.backends import LARGE_GRAPH_BYTES, Array, Shapes
from rcod_runtime.backends.pages import forget_pages
from rcod_runtime.backends.winograd import use_winograd
from rcod_runtime.errors import BackendError
from rcod_runtime.processor import read_processor

# Variants for one shape each that are kept of a graph; of a large one, whose weights each of them
# packs anew, one.
MAX_COMPILED = 4
# Of a graph for any shape. What OpenVINO keeps of shapes that it has run makes attention wrong for
# all others where the first one had a single token, and it grows by 11 MB with each size of nano.
OF_ANY_SHAPE = {"CPU_RUNTIME_CACHE_CAPACITY": 0}
MAX_CHECKED = 256  # shapes of which a graph keeps in mind that they are what the manifest says


def _meet_numpy() -> None:
    """Every way in which this module hands arrays to OpenVINO and takes them back, once.

    Its bindings look up numpy at first use, within C++'s guard of a static variable: a thread that
    waits there holds Python's lock, which the one inside has to get back, and both wait for good.
    An import is one thread's.
    """
    for values in (np.zeros(1, np.float16), np.zeros(1, np.float32), np.zeros(1, np.int64)):
        ov.op.Constant(values, shared_memory=True).data  # noqa: B018
        ov.op.Constant(values).data  # noqa: B018
        ov.Tensor(values, shared_memory=True).data  # noqa: B018


_meet_numpy()


@functools.cache
def shared_core() -> ov.Core:
    """The one Core of this process; it lives as long as the process.

    A Core's CPU plugin puts a signal stack of its own under the thread that loads it. Two Cores
    that end in the order they began leave that thread with a freed one, and the next signal
    (Ctrl-C) kills the process.
    """
    return ov.Core()


def has_native_bf16() -> bool:
    """Whether the processor multiplies bf16 (AVX512_BF16, AMX)."""
    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoBackend:
    """Compiles each graph for each shape it is bound to.

    Precision is always set: what OpenVINO would choose by itself is not written anywhere.
    ``uses_winograd``: whether wide convolutions are computed with fewer products.
    """

    name = "openvino"
    takes_any_size = True

    def __init__(self, precision: str, threads: int) -> None:
        self.version = str(ov.get_version())
        self.precision = precision
        self._core = shared_core()
        self._config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Pinned threads stay where they are put when other work takes that processor, and two
            # Upscalers of one thread each are put on the same one: half as fast.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        }
        if threads:
            self._config["INFERENCE_NUM_THREADS"] = threads
        self.uses_winograd = precision == "fp32" and read_processor().gains_from_winograd

    def load(self, path: Path) -> OpenVinoSession:
        try:
            # The ONNX reader by name: Core.read_model would ask all readers, TensorFlow's too, to
            # make something of a file that this one refuses.
            reader = FrontEndManager().load_by_framework("onnx")
            model = reader.convert(reader.load(path))
            if self.precision == "fp32":
                _keep_stored_weights(model)
            return self.session(model, path)
        except Exception as exc:  # its readers' exceptions share no base class
            raise BackendError(f"{path}: OpenVINO {self.version} refused it: {exc}") from exc

    def session(self, model: ov.Model, path: Path) -> OpenVinoSession:
        """Of a model that was read from ``path``; its inputs and outputs have names."""
        return OpenVinoSession(self._core, self._config, model, path, self.uses_winograd)


def _keep_stored_weights(model: ov.Model) -> None:
    """fp16 weights of the file stay so until they are packed for the processor, in fp32.

    Otherwise a compiled model holds a copy in fp32 beside the packed one: 10.3 in the place of
    5.6 GB for Stable Diffusion 2.1, 19 s to compile in the place of 5 s, for a pass that is 4 %
    shorter (AVX2). This is the mark that OpenVINO's own compression of weights leaves.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Convert":
            stored = node.input_value(0).get_node()
            if stored.get_type_name() == "Constant" and stored.get_element_type() == ov.Type.f16:
                node.get_rt_info()["decompression_0"] = ""


class OpenVinoSession:
    """One graph, compiled for each common shape it was bound to, and once for all others.

    For its own shape nano is 2 % faster at 512 px and 20 % at 64, but compiling takes 2 s, as long
    as 40 images of 160x96: photos smaller than a tile, of any sizes, share what takes them all.
    """

    def __init__(
        self,
        core: ov.Core,
        config: dict[str, Any],
        model: ov.Model,
        path: Path,
        uses_winograd: bool,
    ) -> None:
        self._core, self._config, self._model, self._path = core, config, model, path
        self._uses_winograd = uses_winograd
        is_large = _weight_bytes(model) > LARGE_GRAPH_BYTES
        self._most = 1 if is_large else MAX_COMPILED
        self._names = [output.get_any_name() for output in model.outputs]
        self._requests: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        self._any_shape: Any = None
        self._checked: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._request: Any = None

    def bind(self, shapes: Shapes, outputs: Shapes | None = None, common: bool = True) -> None:
        key = tuple(sorted(shapes.items()))
        try:
            if common:
                if key not in self._requests:
                    self._make_room()
                    model = self._reshaped(shapes, outputs or {})
                    if self._uses_winograd:
                        use_winograd(model)
                    self._requests[key] = self._compiled(model)
                self._request = _latest(self._requests, key, self._most)
                return
            if key not in self._checked:
                self._reshaped(shapes, outputs or {})
                self._checked[key] = None
            _latest(self._checked, key, MAX_CHECKED)
            if self._any_shape is None:
                self._any_shape = self._compiled(self._model, OF_ANY_SHAPE)
        except (RuntimeError, MemoryError) as exc:
            raise BackendError(f"{self._path}: can't be compiled for {key}: {exc}") from exc
        self._request = self._any_shape

    def _compiled(self, model: ov.Model, more: Mapping[str, Any] = MappingProxyType({})) -> Any:
        config = {**self._config, **more}
        request = self._core.compile_model(model, "CPU", config).create_infer_request()
        # Its weights were packed. They stay where they are for as long as there is the model.
        nodes = (node for node in self._model.get_ops() if node.get_type_name() == "Constant")
        forget_pages(self._path, (node.data.ctypes.data for node in nodes))
        return request

    def _make_room(self) -> None:
        """The oldest variant goes before another one is compiled."""
        self._request = None
        while len(self._requests) >= self._most:
            self._requests.popitem(last=False)

    def _reshaped(self, shapes: Shapes, outputs: Shapes) -> ov.Model:
        model = self._model.clone()
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        self._check_outputs(model, outputs)
        return model

    def _check_outputs(self, model: ov.Model, expected: Shapes) -> None:
        """Before anything is allocated or computed: hostile shapes made OpenVINO write beyond its
        memory."""
        for name, output in zip(self._names, model.outputs, strict=True):
            found = output.get_partial_shape()
            if found.is_static and name in expected:
                shape = tuple(found.to_shape())
                if shape != expected[name]:
                    raise BackendError(
                        f"{self._path}: output {name}: expected float32 {expected[name]} by the "
                        f"manifest, found {shape}. The graph is not what the manifest says; export "
                        "the bundle again."
                    )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        inputs = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        try:
            results = self._request.infer(inputs, share_inputs=True, share_outputs=True)
        except RuntimeError as exc:
            raise BackendError(f"{self._path}: could not be run: {exc}") from exc
        return {name: results[index] for index, name in enumerate(self._names)}


def _weight_bytes(model: ov.Model) -> int:
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    return sum(int(op.get_byte_size()) for op in constants)


def _latest(kept: OrderedDict[tuple[object, ...], Any], key: tuple[object, ...], most: int) -> Any:
    """The value of ``key``, which is the last one to be dropped now; the oldest go."""
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]
