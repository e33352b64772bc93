"""One engine of a bundle: checked, deserialised, and its execution context."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcod_runtime.backends.trt.cuda import FLOAT_BYTES, Stream
from rcod_runtime.errors import BackendError, EngineMismatch, HashMismatch
from rcod_runtime.files import read_bounded
from rcod_runtime.manifest import Engine, Graph


def anew(entry: Engine) -> str:
    """What builds the set of an engine again."""
    sms = f" --sm {' '.join(map(str, entry.sm))}" if entry.target == "tensorrt-rtx" else ""
    return (
        f"Build all anew: rcod-export engines BUNDLE --target {entry.target}{sms} --force (and "
        "the set's own --tile)"
    )


class LoadedEngine:
    """An engine and its one context, whose activation memory is the caller's.

    Args:
        trt: module tensorrt or tensorrt_rtx.
        runtime: its Runtime.
        logger: what shared_logger gave.
        path: the engine's file.
        entry: its entry in the manifest.
        graph: the graph it was built from.

    Raises:
        HashMismatch: the file is not the one that was built.
        BackendError: the GPU has no memory for it, or the driver is too old.
        EngineMismatch: TensorRT refuses it, or its inputs and outputs are not the graph's.
    """

    def __init__(
        self, trt: Any, runtime: Any, logger: Any, path: Path, entry: Engine, graph: Graph
    ) -> None:
        self.name, self._path, self._logger = entry.graph, path, logger
        self._anew = anew(entry)
        # Hashed and loaded from the same bytes: an engine is a program.
        try:
            data = read_bounded(path, entry.bytes)
        except OSError as exc:
            raise HashMismatch(
                f"{path}: expected a file of {entry.bytes} bytes, found {exc.strerror or exc}. "
                "Build it again: rcod-export engines"
            ) from exc
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise HashMismatch(
                f"{path}: changed after it was built. Engines are programs: it was not loaded. "
                "Build it again: rcod-export engines"
            )
        logger.forget()
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            what = f"{path}: {entry.target} {trt.__version__} refuses it"
            raise _refusal(what, logger.tail(), self._anew)
        # In the order in which Python drops them where nobody closes, at the end of the process: a
        # context needs its configuration and cache, and TensorRT keeps neither for it.
        self._context: Any = None
        self._config: Any = None
        self._cache: Any = None
        self._engine = engine
        self._graph = graph
        self._check_tensors(trt)
        self.scratch_bytes = int(engine.device_memory_size_v2)

    def open_context(self, trt: Any, cache: Any, captured: bool) -> None:
        """Make the context; ``cache`` is TensorRT-RTX's runtime cache, otherwise None.
        ``captured``: CUDA graphs will hold its runs."""
        self._logger.forget()
        user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if cache is not None:
            self._config, self._cache = self._engine.create_runtime_config(), cache
            self._config.set_execution_context_allocation_strategy(user_managed)
            self._config.set_runtime_cache(cache)
            # By default kernels stand in while those for a new shape are compiled. A CUDA graph
            # would keep them, and what they compute is rounded otherwise: here a shape's are there
            # when it has run once, or, for photos of any size, are the same for all.
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            strategy = strategies.EAGER if captured else strategies.NONE
            self._config.dynamic_shapes_kernel_specialization_strategy = strategy
            self._context = self._engine.create_execution_context(self._config)
        else:
            self._context = self._engine.create_execution_context(user_managed)
        self._require(self._context is not None, "create_execution_context")

    def new_cache(self) -> Any:
        """An empty runtime cache (TensorRT-RTX only)."""
        return self._engine.create_runtime_config().create_runtime_cache()

    def use_memory(self, address: int, nbytes: int) -> None:
        """Where its activations go while it runs."""
        self._context.set_device_memory(address, nbytes)

    def bind_shapes(self, shapes: Mapping[str, tuple[int, ...]], sides: tuple[int, ...]) -> None:
        """Set the shapes of its inputs; ``sides`` are batch, height and width of the tiles.

        Raises:
            BackendError: a shape is outside the engine's profile.
            EngineMismatch: an output is not of the manifest's shape, as its buffer is.
        """
        self._logger.forget()
        for name, shape in shapes.items():
            accepted = self._context.set_input_shape(name, shape)
            self._require(accepted, f"set_input_shape({name}, {shape})")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as exc:
            raise BackendError(
                f"{self._path}: infer_shapes was refused ({exc}).{self._logger.tail()}"
            ) from exc
        self._require(not missing, f"infer_shapes, {', '.join(missing)} not specified,")
        for output in self._graph.outputs:
            expected, found = output.sized(*sides), self._context.get_tensor_shape(output.name)
            if tuple(found) != expected:
                raise EngineMismatch(
                    f"{self._path}: output {output.name}: expected {expected} by the manifest, "
                    f"found {tuple(found)}. {self._anew}"
                )

    def bind_address(self, name: str, address: int) -> None:
        """Where an input or output lies on the device."""
        self._logger.forget()
        accepted = self._context.set_tensor_address(name, address)
        self._require(accepted, f"set_tensor_address({name})")

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one run."""
        self._logger.forget()
        self._require(self._context.execute_async_v3(stream.handle), "execute_async_v3")

    def is_capturable(self, stream: Stream) -> bool:
        """Whether a CUDA graph can hold it; versions that can't say can do it."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream.handle))

    def close(self) -> None:
        """Drop the context, then what it needs. Twice is harmless."""
        self._context = None
        self._config = self._cache = self._engine = None

    def _check_tensors(self, trt: Any) -> None:
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {
            mode: {name for name in names if engine.get_tensor_mode(name) == mode}
            for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        }
        for mode, tensors in (
            (trt.TensorIOMode.INPUT, self._graph.inputs),
            (trt.TensorIOMode.OUTPUT, self._graph.outputs),
        ):
            wanted = {tensor.name for tensor in tensors}
            if found[mode] != wanted:
                raise EngineMismatch(
                    f"{self._path}: {mode.name.lower()}s: expected {sorted(wanted)}, found "
                    f"{sorted(found[mode])}. {self._anew}"
                )
        for name in names:
            if engine.get_tensor_dtype(name) != trt.DataType.FLOAT:
                raise EngineMismatch(
                    f"{self._path}: {name}: expected float32, found "
                    f"{engine.get_tensor_dtype(name).name}. {self._anew}"
                )

    def _require(self, good: bool, call: str) -> None:
        if not good:
            raise BackendError(f"{self._path}: {call} was refused.{self._logger.tail()}")


def _refusal(what: str, said: str, cure: str) -> BackendError | EngineMismatch:
    """Of an engine, by what TensorRT said of it: building it again does not cure all of it."""
    what = f"{what}, and says:{said}\n" if said else f"{what}. "
    if re.search(r"out ?of ?memory", said, re.IGNORECASE):
        return BackendError(
            f"{what}The GPU has no memory for it: end what else runs there (nvidia-smi), or run "
            "on the CPU: --device cpu"
        )
    if re.search(r"\bdriver\b|CUDA initialization", said, re.IGNORECASE):
        return BackendError(f"{what}Update the driver, or run on the CPU: --device cpu")
    return EngineMismatch(f"{what}{cure}")


def float_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a float32 tensor."""
    nbytes = FLOAT_BYTES
    for side in shape:
        nbytes *= side
    return nbytes
