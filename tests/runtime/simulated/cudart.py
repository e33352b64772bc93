"""Stands in for the module cuda.bindings.runtime: the functions that the runtime calls."""

from __future__ import annotations

import contextlib
import enum
import gc
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from tests.runtime.simulated.memory import DeviceMemory, PinnedMemory, Violation
from tests.runtime.simulated.streams import Event, Graph, Scheduler, Stream

Handle = Stream | int  # CUDA takes both
RUNTIME_VERSION = 13050

# They may wait for the GPU: where a capture forbids them they are refused, and it is lost.
WAITING = ("cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", "cudaEventSynchronize")


class Error(enum.IntEnum):
    """Values are CUDA's own."""

    cudaSuccess = 0  # noqa: N815
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class CopyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815
    cudaMemcpyDeviceToDevice = 3  # noqa: N815


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0  # noqa: N815
    cudaStreamCaptureModeThreadLocal = 1  # noqa: N815
    cudaStreamCaptureModeRelaxed = 2  # noqa: N815


class _Thread(threading.local):
    """``gpu``: the thread's current one. ``mode``: what captures forbid to the thread."""

    gpu = 0
    mode = CaptureMode.cudaStreamCaptureModeGlobal


# Calls whose errors cudaGetLastError gives until somebody asks it.
LASTING = (
    "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphGetNodes", "cudaGraphInstantiate",
    "cudaGraphDestroy", "cudaGraphLaunch",
)  # fmt: skip


class SimulatedGpu:
    """A machine with GPUs of one kind.

    ``driver`` is the newest CUDA that its driver knows, 0 where none is installed; the runtime is
    13.5.
    ``fail_at``: the number of the call, counted from 0, that answers with an error; ``calls`` are
    the names: all of CUDA's, and those of TensorRT's that say whether they did it.
    ``launched``: how often each engine ran, ``replays`` of graphs; ``busy``: arenas in use, by
    their address.
    """

    def __init__(
        self, sm: int = 89, count: int = 2, seed: int = 0, driver: int = RUNTIME_VERSION
    ) -> None:
        self.sm, self.count, self.driver = sm, count, driver
        self.name = b"Simulated GPU"
        self._thread = _Thread()
        self.owner: int | None = None  # the GPU that everything was made on
        self.memory, self.pinned, self.scheduler = DeviceMemory(), PinnedMemory(), Scheduler(seed)
        self.events: set[Event] = set()
        self.graphs: set[Graph] = set()
        self.executables: set[Graph] = set()
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.replays = 0
        self.launched: dict[str, int] = {}
        self.busy: dict[int, str] = {}
        self.contexts = 0
        self.orphaned = False  # a context outlived what it needs
        self.not_captured: set[str] = set()  # engines that TensorRT can't run in a capture
        self.refusal = ""  # what TensorRT says of every engine, which it then refuses
        self.last_error = False  # as cudaGetLastError gives it, once
        self.compiled: list[str] = []  # engines that TensorRT-RTX finished for this GPU

    @property
    def current(self) -> int:
        """The GPU that is current in the calling thread."""
        return self._thread.gpu

    def leaks(self) -> dict[str, int]:
        """What is still held, by kind; empty when all is released."""
        held = {
            "device memory": self.memory.live,
            "pinned memory": self.pinned.live,
            "streams": len(self.scheduler.streams),
            "events": len(self.events),
            "graphs": len(self.graphs),
            "executable graphs": len(self.executables),
            "contexts": self.contexts,
            "contexts that outlived what they need": int(self.orphaned),
        }
        return {kind: count for kind, count in held.items() if count}

    def fails(self, name: str) -> bool:
        """Counts a call; whether it is the one that has to fail."""
        self.calls.append(name)
        return self.fail_at == len(self.calls) - 1

    def failing(self, work: Callable[[], None]) -> Iterator[str]:
        """Do ``work`` with its first call failing, with its second, until all failed once.

        Gives the name of each afterwards. ``work`` takes the error.
        """
        for number in itertools.count():
            self.fail_at = len(self.calls) + number
            work()
            failed = self.calls[self.fail_at :][:1]
            self.fail_at = None
            if not failed:
                return
            yield failed[0]

    def module(self) -> types.ModuleType:
        """What ``import cuda.bindings.runtime`` gives."""
        module = types.ModuleType("cuda.bindings.runtime")
        functions = {name: getattr(self, name) for name in dir(self) if name.startswith("cuda")}
        for name, function in functions.items():
            setattr(module, name, self._counted(name, function))
        module.cudaMemcpyKind = CopyKind  # type: ignore[attr-defined]
        module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]
        module.cudaEventDisableTiming = 2  # type: ignore[attr-defined]
        module.cudaStreamCaptureMode = CaptureMode  # type: ignore[attr-defined]
        module.cudaDeviceAttr = types.SimpleNamespace(  # type: ignore[attr-defined]
            cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
        )
        return module

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        free_of_device = {
            "cudaGetDevice", "cudaSetDevice", "cudaGetDeviceCount", "cudaDeviceGetAttribute",
            "cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaGetDeviceProperties",
        }  # fmt: skip

        def call(*arguments: Any) -> Any:
            if name not in free_of_device:
                self.check_device(name)
            if self.fails(name):
                # What releases does so in any case: the error may be of work before it.
                if name.endswith("Destroy") or name.startswith("cudaFree"):
                    function(*arguments)
                if name == "cudaStreamEndCapture":  # it ends the capture in any case
                    arguments[0].capture = None
                self.last_error |= name in LASTING
                empty = {"cudaGraphGetNodes": 2}.get(name, 1)
                return (Error.cudaErrorMemoryAllocation, *([None] * empty))
            if name in WAITING and self._breaks_a_capture():
                return Error.cudaErrorStreamCaptureUnsupported, None
            return function(*arguments)

        return call

    def check_device(self, name: str) -> None:
        """Everything belongs to the GPU that was current when the first thing was made."""
        if self.owner is None:
            self.owner = self.current
        if self.current != self.owner:
            raise Violation(f"{name} with GPU {self.current} current, owned by GPU {self.owner}")

    def _breaks_a_capture(self) -> bool:
        """Of the calling thread, and in its global mode those that were begun in that mode too."""
        mode, free = self._thread.mode, CaptureMode.cudaStreamCaptureModeRelaxed
        if mode == free:
            return False
        captures = [stream.capture for stream in self.scheduler.streams if stream.capture]
        broken = [
            graph
            for graph in captures
            if (graph.thread == threading.get_ident() and graph.mode != free)
            or mode == graph.mode == CaptureMode.cudaStreamCaptureModeGlobal
        ]
        for graph in broken:
            graph.broken = True
        return bool(broken)

    @contextlib.contextmanager
    def foreign_capture(self) -> Iterator[Graph]:
        """Another library captures in this thread, in CUDA's global mode as torch does."""
        mode = CaptureMode.cudaStreamCaptureModeGlobal
        graph = Graph(thread=threading.get_ident(), mode=mode)
        stream = Stream(capture=graph)
        self.scheduler.streams.add(stream)
        try:
            yield graph
        finally:
            self.scheduler.streams.remove(stream)

    # Devices.

    def cudaDriverGetVersion(self) -> Any:  # noqa: N802
        return Error.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self) -> Any:  # noqa: N802
        return Error.cudaSuccess, RUNTIME_VERSION

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        if self.driver // 1000 < RUNTIME_VERSION // 1000:  # of no driver as well
            return Error.cudaErrorInsufficientDriver, None
        if self.count == 0:
            return Error.cudaErrorNoDevice, None
        return Error.cudaSuccess, self.count

    def cudaGetDevice(self) -> Any:  # noqa: N802
        return Error.cudaSuccess, self.current

    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        self._thread.gpu = device
        return (Error.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:  # noqa: N802
        return Error.cudaSuccess, {75: self.sm // 10, 76: self.sm % 10}[attribute]

    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        return Error.cudaSuccess, types.SimpleNamespace(name=self.name)

    # Memory.

    def cudaMalloc(self, nbytes: int) -> Any:  # noqa: N802
        return Error.cudaSuccess, self.memory.allocate(nbytes)

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        self.memory.free(address)
        return (Error.cudaSuccess,)

    def cudaMallocHost(self, nbytes: int) -> Any:  # noqa: N802
        return Error.cudaSuccess, self.pinned.allocate(nbytes)

    def cudaFreeHost(self, address: int) -> Any:  # noqa: N802
        self.pinned.free(address)
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, nbytes: int, kind: CopyKind, stream: Stream
    ) -> Any:
        to_device = kind != CopyKind.cudaMemcpyDeviceToHost
        from_device = kind != CopyKind.cudaMemcpyHostToDevice

        def copy() -> None:
            into = (
                self.memory.view(target, nbytes) if to_device else self.pinned.view(target, nbytes)
            )
            out = (
                self.memory.view(source, nbytes)
                if from_device
                else self.pinned.view(source, nbytes)
            )
            into[:] = out

        self.scheduler.enqueue(self._live(stream), copy)
        return (Error.cudaSuccess,)

    # Streams and events.

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        assert flags == 1, "a stream that waits for the default one"
        stream = Stream()
        self.scheduler.streams.add(stream)
        return Error.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Stream) -> Any:  # noqa: N802
        self.scheduler.streams.remove(self._live(stream))
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Handle) -> Any:  # noqa: N802
        self.scheduler.drain(self._live(stream))
        return (Error.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: Handle, event: Event, flags: int) -> Any:  # noqa: N802
        stream = self._live(stream)
        if stream.capture is not None:
            raise Violation("a captured stream waits for an event from outside")
        stream.queue.append((event, event.records))
        return (Error.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        event = Event(timing=flags == 0)
        self.events.add(event)
        return Error.cudaSuccess, event

    def cudaEventDestroy(self, event: Event) -> Any:  # noqa: N802
        self.events.remove(event)
        return (Error.cudaSuccess,)

    def cudaEventRecord(self, event: Event, stream: Handle) -> Any:  # noqa: N802
        event.records += 1

        def reach() -> None:
            event.reached += 1
            event.tick = self.scheduler.ticks

        self.scheduler.enqueue(self._live(stream), reach)
        return (Error.cudaSuccess,)

    def cudaEventSynchronize(self, event: Event) -> Any:  # noqa: N802
        self.scheduler.run_until(lambda: event.reached == event.records, "an event")
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: Event, end: Event) -> Any:  # noqa: N802
        if not (start.timing and end.timing and start.reached and end.reached):
            return Error.cudaErrorInvalidValue, None
        return Error.cudaSuccess, float(end.tick - start.tick)

    # Graphs.

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> Any:  # noqa: N802
        assert mode == 1, "a capture that other threads can break"
        stream.capture = Graph(thread=threading.get_ident(), mode=mode)
        return (Error.cudaSuccess,)

    def cudaThreadExchangeStreamCaptureMode(self, mode: CaptureMode) -> Any:  # noqa: N802
        before, self._thread.mode = self._thread.mode, CaptureMode(mode)
        return Error.cudaSuccess, before

    def cudaGetLastError(self) -> Any:  # noqa: N802
        self.last_error = False
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Stream) -> Any:  # noqa: N802
        graph, stream.capture = stream.capture, None
        if graph is None:
            return Error.cudaErrorInvalidValue, None
        if graph.broken:
            self.last_error = True
            return Error.cudaErrorStreamCaptureInvalidated, None
        self.graphs.add(graph)
        return Error.cudaSuccess, graph

    def cudaGraphGetNodes(self, graph: Graph, count: int = 0) -> Any:  # noqa: N802
        return Error.cudaSuccess, [], len(graph.work)

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Any:  # noqa: N802
        executable = Graph(list(graph.work))
        self.executables.add(executable)
        return Error.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: Graph) -> Any:  # noqa: N802
        self.graphs.remove(graph)
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, executable: Graph, stream: Stream) -> Any:  # noqa: N802
        if executable not in self.executables:
            raise Violation("a graph is launched that was released")
        self.replays += 1
        for work in executable.work:
            self.scheduler.enqueue(self._live(stream), work)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: Graph) -> Any:  # noqa: N802
        self.executables.remove(executable)
        return (Error.cudaSuccess,)

    def _live(self, stream: Handle) -> Stream:
        scheduler = self.scheduler
        if isinstance(stream, int):
            known = {int(s): s for s in scheduler.streams} | dict.fromkeys(
                (0, 1), scheduler.default
            )
            if stream not in known:
                raise Violation(f"{stream:#x} is the handle of no stream")
            return known[stream]
        if stream not in scheduler.streams and stream is not scheduler.default:
            raise Violation("a stream is used that was released")
        return stream


def released(gpu: SimulatedGpu) -> dict[str, int]:
    """What is still held when nobody uses it any more."""
    if gpu.leaks():
        gc.collect()  # contexts are Python objects
    return gpu.leaks()
