"""Stands in for the module tensorrt: engines are ONNX graphs that ONNX Runtime runs on the CPU."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import struct
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from rcod_export.engines import EngineConfig, planned_engine
from rcod_runtime.backends.trt.libraries import MODULES
from rcod_runtime.chain import STAGES
from rcod_runtime.manifest import MANIFEST_FILE, Engine, Manifest, read_manifest, sha256_file
from tests.runtime.simulated.cudart import SimulatedGpu
from tests.runtime.simulated.memory import POISON, Violation
from tests.runtime.simulated.streams import Stream

MAGIC = b"simulated engine"
VERSION = "10.9.0"
SCRATCH_BYTES = 1000
TILE_PX = 64  # photos of 24x40 make 96x160: two rows of three tiles


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class Mode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class DType(enum.Enum):
    FLOAT = 1
    HALF = 2


class Logger:
    """Base of a logger, as tensorrt.ILogger."""

    Severity = Severity


class RuntimeCache:
    """What TensorRT-RTX compiled on this machine: here names of engines and their shapes."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(MAGIC):
            return False
        self.kernels = data[len(MAGIC) :].decode().split()
        return True

    def serialize(self) -> bytes | None:
        return MAGIC + " ".join(self.kernels).encode()


class RuntimeConfig:
    """Of TensorRT-RTX's contexts."""

    strategy = "static"
    dynamic_shapes_kernel_specialization_strategy = "lazy"
    cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> None:
        self.cache = cache


class EngineContext:
    """Of one engine. Its activations are its caller's memory.

    ``ran``: once at least since its shapes were set, as TensorRT asks for before a capture.
    ``needs``: what its maker has to keep for as long as it runs, and until it is gone.
    """

    def __init__(
        self, gpu: SimulatedGpu, engine: SimulatedEngine, config: RuntimeConfig | None
    ) -> None:
        self.gpu, self.engine = gpu, engine
        # TensorRT's bindings hold none of them for the context.
        self.needs = [] if config is None else [weakref.ref(config), weakref.ref(config.cache)]
        self.cache = None if config is None else weakref.proxy(config.cache)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.arena: tuple[int, int] | None = None
        self.ran = False
        gpu.contexts += 1

    def __del__(self) -> None:
        self.gpu.contexts -= 1
        self.gpu.orphaned |= any(needed() is None for needed in self.needs)

    def set_device_memory(self, address: int, size: int) -> None:
        if size < self.engine.device_memory_size_v2:
            raise Violation(f"an arena of {size} bytes, {self.engine.device_memory_size_v2} needed")
        self.gpu.memory.view(address, size, aligned=True)
        self.arena = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profile[name]
        fits = len(shape) == len(low) and all(
            a <= n <= b for a, n, b in zip(low, shape, high, strict=True)
        )
        if self.gpu.fails("set_input_shape") or not fits:
            self.engine.runtime.say(f"{name} {shape}: outside {low} to {high}")
            return False
        self.shapes[name], self.ran = tuple(shape), False
        return True

    def infer_shapes(self) -> list[str]:
        given = () if self.gpu.fails("infer_shapes") else self.shapes
        return sorted(set(self.engine.profile) - set(given))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.output_shape(name, self.shapes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.gpu.memory.view(address, 1, aligned=True)
        if self.gpu.fails("set_tensor_address") or name not in self.engine.modes:
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: Stream) -> bool:
        self.gpu.check_device("execute_async_v3")
        if any(needed() is None for needed in self.needs):
            raise Violation(f"{self.engine.name} runs without its configuration or cache")
        if self.gpu.fails("execute_async_v3"):
            self.engine.runtime.say("enqueue was made to fail")
            return False
        if stream.capture is not None and self.engine.name in self.gpu.not_captured:
            stream.capture.broken = self.gpu.last_error = True
        if self.gpu.last_error:  # its own, or one that nobody took
            self.engine.runtime.say("an error of CUDA is pending")
            return False
        if (
            self.arena is None
            or set(self.shapes) != set(self.engine.profile)
            or set(self.addresses) != set(self.engine.modes)
        ):
            self.engine.runtime.say("enqueue before all was bound")
            return False
        if stream.capture is not None and not self.ran:
            raise Violation(f"{self.engine.name} is captured before a run with its shapes")
        self.ran = True
        kernel = self.engine.name + str(sorted(self.shapes.items())).replace(" ", "")
        if self.cache is not None and kernel not in self.cache.kernels:
            self.cache.kernels.append(kernel)
            self.gpu.compiled.append(self.engine.name)
        shapes, addresses, arena = dict(self.shapes), dict(self.addresses), self.arena
        # Two pieces of work, so that another stream's can come between and be caught.
        self.gpu.scheduler.enqueue(stream, lambda: self.engine.begin(arena))
        self.gpu.scheduler.enqueue(stream, lambda: self.engine.finish(shapes, addresses, arena))
        return True


@functools.cache
def _session(onnx: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


@functools.cache
def _output_shapes(
    onnx: bytes, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> dict[str, tuple[int, ...]]:
    session = _session(onnx)
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes}
    names = [tensor.name for tensor in session.get_outputs()]
    return {n: v.shape for n, v in zip(names, session.run(names, feeds), strict=True)}


class SimulatedEngine:
    """A deserialised engine."""

    def __init__(
        self, gpu: SimulatedGpu, runtime: Any, header: dict[str, Any], onnx: bytes
    ) -> None:
        self.gpu, self.runtime = gpu, runtime
        self.name = header["graph"]
        self.profile = header["profile"]
        self.dtypes = header.get("dtypes", {})
        self.device_memory_size_v2 = SCRATCH_BYTES + len(onnx) % 7 * 100
        self.stretched = header.get("stretched", {})  # outputs: by so much on their last axis
        self._onnx, self._session = onnx, _session(onnx)
        inputs = {tensor.name: Mode.INPUT for tensor in self._session.get_inputs()}
        outputs = {tensor.name: Mode.OUTPUT for tensor in self._session.get_outputs()}
        self.modes = inputs | outputs
        self.num_io_tensors = len(self.modes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.modes)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return self.modes[name]

    def get_tensor_dtype(self, name: str) -> DType:
        return DType[self.dtypes.get(name, "FLOAT")]

    def output_shape(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        found = _output_shapes(self._onnx, tuple(sorted(shapes.items())))[name]
        return (*found[:-1], found[-1] + self.stretched.get(name, 0))

    def create_execution_context(self, how: str | RuntimeConfig) -> EngineContext | None:
        strategy = how.strategy if isinstance(how, RuntimeConfig) else how
        assert strategy == "user managed"
        if isinstance(how, RuntimeConfig):  # graphs must not hold what only stands in
            wanted = "eager" if self.name in STAGES else "none"
            assert how.dynamic_shapes_kernel_specialization_strategy == wanted
        if self.gpu.fails("create_execution_context"):
            return None
        return EngineContext(self.gpu, self, None if isinstance(how, str) else how)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def begin(self, arena: tuple[int, int]) -> None:
        other = self.gpu.busy.get(arena[0])
        if other is not None:
            raise Violation(f"{self.name} runs in the arena that {other} is using")
        self.gpu.busy[arena[0]] = self.name
        self.gpu.memory.view(*arena)[:] = POISON  # nothing of another engine survives in it

    def finish(
        self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], arena: tuple[int, int]
    ) -> None:
        feeds = {}
        for name, shape in shapes.items():
            nbytes = 4 * int(np.prod(shape))
            view = self.gpu.memory.view(addresses[name], nbytes, aligned=True)
            feeds[name] = view.copy().view(np.float32).reshape(shape)
        names = [name for name, mode in self.modes.items() if mode is Mode.OUTPUT]
        for name, values in zip(names, self._session.run(names, feeds), strict=True):
            view = self.gpu.memory.view(addresses[name], values.nbytes, aligned=True)
            view[:] = np.ascontiguousarray(values, np.float32).view(np.uint8).ravel()
        del self.gpu.busy[arena[0]]
        self.gpu.launched[self.name] = self.gpu.launched.get(self.name, 0) + 1


def tensorrt_module(gpu: SimulatedGpu, version: str = VERSION) -> types.ModuleType:
    """What ``import tensorrt`` gives."""

    runtimes: weakref.WeakSet[Any] = weakref.WeakSet()

    class Runtime:
        """All say what they have to say to the first one's logger, which its bindings hold for that
        one alone."""

        registered: weakref.ref[Any] | None = None

        def __init__(self, logger: Any) -> None:
            if not runtimes:
                Runtime.registered = weakref.ref(logger)
            runtimes.add(self)
            self.logger = logger
            self.engine_host_code_allowed = True  # so that a test sees who turns it off

        def say(self, message: str) -> None:
            logger = None if Runtime.registered is None else Runtime.registered()
            if logger is None:
                raise Violation(f"said to a logger that is gone: {message}")
            logger.log(Severity.ERROR, message)

        def deserialize_cuda_engine(self, data: bytes) -> SimulatedEngine | None:
            assert self.engine_host_code_allowed is False
            failed = gpu.fails("deserialize_cuda_engine") or not data.startswith(MAGIC)
            if failed or gpu.refusal:
                self.say(gpu.refusal or "the magic tag does not match")
                return None
            (length,) = struct.unpack_from("<I", data, len(MAGIC))
            start = len(MAGIC) + 4
            header = json.loads(data[start : start + length])
            return SimulatedEngine(gpu, self, header, data[start + length :])

    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    module.ILogger = Logger  # type: ignore[attr-defined]
    module.Runtime = Runtime  # type: ignore[attr-defined]
    module.TensorIOMode = Mode  # type: ignore[attr-defined]
    module.DataType = DType  # type: ignore[attr-defined]
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(  # type: ignore[attr-defined]
        USER_MANAGED="user managed"
    )
    module.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(  # type: ignore[attr-defined]
        LAZY="lazy", EAGER="eager", NONE="none"
    )
    return module


def install(monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, version: str = VERSION) -> None:
    """Put a GPU into this process, and the libraries that drive it."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu.module())
    for name in MODULES.values():
        monkeypatch.setitem(sys.modules, name, tensorrt_module(gpu, version))


def add_engines(
    bundle: Path,
    tile_px: int = TILE_PX,
    batch: tuple[int, int] = (1, 4),
    target: str = "tensorrt",
    change: Callable[[Engine, dict[str, Any]], Engine] = lambda engine, header: engine,
) -> Manifest:
    """Give a bundle engines that this module loads, beside those that it has for other sizes.

    Args:
        change: called with every entry and the header of its file, to spoil one of the two.
    """
    manifest = read_manifest(bundle / MANIFEST_FILE)
    config = EngineConfig(target=target, sms=(89,), tile_px=tile_px, batch=batch)
    engines = []
    for name, graph in manifest.graphs.items():
        entry = planned_engine(manifest, name, graph, config, VERSION)
        header: dict[str, Any] = {"graph": name, "profile": entry.profile}
        entry = change(entry, header)
        text = json.dumps(header).encode()
        content = (bundle / graph.file).read_bytes()
        path = bundle / entry.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(MAGIC + struct.pack("<I", len(text)) + text + content)
        engines.append(
            dataclasses.replace(entry, sha256=sha256_file(path), bytes=path.stat().st_size)
        )
    files = {engine.file for engine in engines}
    engines += [engine for engine in manifest.engines if engine.file not in files]
    engines.sort(key=lambda engine: engine.file)
    manifest = dataclasses.replace(manifest, engines=tuple(engines))
    (bundle / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
