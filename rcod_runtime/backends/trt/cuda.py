"""CUDA's runtime API, every return checked, every resource with one owner that releases it.

Every object here belongs to one device; callers hold ``Cuda.guard()`` around what they do with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rcod_runtime.backends import Array
from rcod_runtime.errors import BackendError

log = logging.getLogger(__name__)

FLOAT_BYTES = 4


class Cuda:
    """One GPU, through the module cuda.bindings.runtime."""

    def __init__(self, runtime: Any, index: int) -> None:
        self.runtime, self.index = runtime, index

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function; returns what comes after its error code: nothing, a value, or a tuple.

        Raises:
            BackendError: any code but success; names the call and CUDA's error.
        """
        error, *values = getattr(self.runtime, name)(*arguments)
        if int(error) != 0:
            raise BackendError(
                f"cuda:{self.index}: {name} gave {error.name}. "
                "Check the GPU with nvidia-smi: memory, driver, other processes."
            )
        return values[0] if len(values) == 1 else tuple(values)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Make this GPU the thread's current one, and the former one afterwards."""
        before = self.call("cudaGetDevice")
        self.call("cudaSetDevice", self.index)
        try:
            yield
        finally:
            try:
                self.call("cudaSetDevice", before)
            except BackendError as exc:  # as where the former GPU has no memory for a context
                stays = f"cuda:{self.index} stays this thread's GPU, not cuda:{before}"
                log.warning("%s: %s", stays, str(exc))

    @contextlib.contextmanager
    def capture_mode(self, kind: str) -> Iterator[None]:
        """How far captures of CUDA graphs bind this thread; kind is ``ThreadLocal`` or ``Relaxed``.

        Where another library captures in CUDA's global mode, as torch does, no thread may allocate,
        free or wait, and its capture is lost where one tries. ThreadLocal allows it to all threads
        but the one that captures, Relaxed to that too.
        """
        mode = getattr(self.runtime.cudaStreamCaptureMode, f"cudaStreamCaptureMode{kind}")
        before = self.call("cudaThreadExchangeStreamCaptureMode", mode)
        try:
            yield
        finally:
            self.call("cudaThreadExchangeStreamCaptureMode", before)

    def copy(self, target: int, source: int, nbytes: int, kind: str, stream: Stream) -> None:
        """Enqueue a copy; kind is ``HostToDevice``, ``DeviceToHost`` or ``DeviceToDevice``."""
        self.call(
            "cudaMemcpyAsync",
            target,
            source,
            nbytes,
            getattr(self.runtime.cudaMemcpyKind, f"cudaMemcpy{kind}"),
            stream.handle,
        )


class _Owned:
    """A handle that is released once."""

    def __init__(self, cuda: Cuda, release: str, handle: Any) -> None:
        self._cuda, self._release, self.handle = cuda, release, handle

    def close(self) -> None:
        """Release it. Twice is harmless."""
        handle, self.handle = self.handle, None
        if handle is not None:
            self._cuda.call(self._release, handle)


class DeviceBuffer(_Owned):
    """Memory of the GPU, aligned to 256 bytes at least."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(cuda, "cudaFree", cuda.call("cudaMalloc", max(1, nbytes)))

    @property
    def address(self) -> int:
        return int(self.handle)


class PinnedBuffer(_Owned):
    """Host memory that the GPU copies from and to while the host goes on."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(cuda, "cudaFreeHost", cuda.call("cudaMallocHost", max(1, nbytes)))
        self._floats: Array = np.ctypeslib.as_array(
            (ctypes.c_float * (nbytes // FLOAT_BYTES)).from_address(self.address)
        )

    @property
    def address(self) -> int:
        return int(self.handle)

    def floats(self, shape: tuple[int, ...]) -> Array:
        """Its beginning as a float32 array: a view, valid while the buffer lives."""
        return self._floats[: math.prod(shape)].reshape(shape)


class Stream(_Owned):
    """A stream of its own that does not wait for the default one."""

    def __init__(self, cuda: Cuda) -> None:
        flags = cuda.runtime.cudaStreamNonBlocking
        super().__init__(
            cuda, "cudaStreamDestroy", cuda.call("cudaStreamCreateWithFlags", int(flags))
        )

    def wait(self, event: Event) -> None:
        """What is enqueued from here on waits for the event."""
        self._cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Wait for all that is enqueued."""
        self._cuda.call("cudaStreamSynchronize", self.handle)


class Event(_Owned):
    """A point in a stream."""

    def __init__(self, cuda: Cuda, timing: bool = False) -> None:
        flags = 0 if timing else int(cuda.runtime.cudaEventDisableTiming)
        super().__init__(cuda, "cudaEventDestroy", cuda.call("cudaEventCreateWithFlags", flags))

    def record(self, stream: Any) -> None:
        """In a Stream, or in a caller's stream: CUDA's handle of it."""
        self._cuda.call("cudaEventRecord", self.handle, getattr(stream, "handle", stream))

    def delay(self, stream: Any) -> None:
        """What a caller enqueues on its stream from here on waits for the event."""
        self._cuda.call("cudaStreamWaitEvent", stream, self.handle, 0)

    def synchronize(self) -> None:
        """Wait until it is reached."""
        self._cuda.call("cudaEventSynchronize", self.handle)

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds between two reached events that were made with timing."""
        return float(self._cuda.call("cudaEventElapsedTime", earlier.handle, self.handle))


class _Thread(threading.local):
    """``late``: what the thread releases after its capture; None where it captures nothing."""

    late: list[Callable[[], None]] | None = None


_thread = _Thread()


def after_capture(release: Callable[[], None]) -> None:
    """Call it now, or in a thread that captures, as soon as it is done.

    For finalizers: the garbage collector calls them in the middle of anything, and what frees
    memory breaks a capture of its thread.
    """
    if _thread.late is None:
        release()
    else:
        _thread.late.append(release)


def release(cuda: Cuda, resources: contextlib.ExitStack) -> None:
    """Release what a stack holds, in any thread and whoever captures. Twice is harmless.

    Raises:
        BackendError: a call failed; the rest is released. Where the GPU did not become current,
            nothing is, and it can be tried again.
    """
    with cuda.guard(), cuda.capture_mode("Relaxed"):
        resources.close()


def release_with(
    owner: object, cuda: Cuda, resources: contextlib.ExitStack
) -> weakref.finalize[..., object]:
    """``release`` when the owner is gone; not at the end of the process, which gives all back."""
    finalizer = weakref.finalize(owner, _release_unheard, cuda, resources, os.getpid())
    finalizer.atexit = False
    return finalizer


def _release_unheard(cuda: Cuda, resources: contextlib.ExitStack, process: int) -> None:
    """Nobody is left to hear of an error."""

    def unheard() -> None:
        with contextlib.suppress(BackendError):
            release(cuda, resources)

    if os.getpid() == process:  # else a fork's child: nothing there is its own
        after_capture(unheard)


@contextlib.contextmanager
def _nothing_released() -> Iterator[None]:
    """What ``after_capture`` is given in this thread meanwhile is called afterwards."""
    late: list[Callable[[], None]] = []
    _thread.late = late
    try:
        yield
    finally:
        _thread.late = None
        for release in late:
            release()


class CapturedGraph(_Owned):
    """Work captured from a stream, launched again at once.

    Raises:
        BackendError: the capture was refused or is empty. The stream is out of capture again.
    """

    def __init__(self, cuda: Cuda, stream: Stream, enqueue: Callable[[], None]) -> None:
        # Thread-local: what other threads of the process call must not break the capture.
        mode = cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with _nothing_released():
            cuda.call("cudaStreamBeginCapture", stream.handle, mode)
            try:
                enqueue()
            except BaseException:
                with contextlib.suppress(BackendError):
                    graph = cuda.call("cudaStreamEndCapture", stream.handle)
                    cuda.call("cudaGraphDestroy", graph)
                raise
            graph = cuda.call("cudaStreamEndCapture", stream.handle)
        with contextlib.ExitStack() as undo:
            with contextlib.closing(_Owned(cuda, "cudaGraphDestroy", graph)):
                _, count = cuda.call("cudaGraphGetNodes", graph)
                if count == 0:
                    raise BackendError(f"cuda:{cuda.index}: the captured CUDA graph is empty.")
                executable = cuda.call("cudaGraphInstantiate", graph, 0)
                super().__init__(cuda, "cudaGraphExecDestroy", executable)
                undo.callback(self.close)
            undo.pop_all()

    def launch(self, stream: Stream) -> None:
        self._cuda.call("cudaGraphLaunch", self.handle, stream.handle)


def drop_graphs(graphs: dict[bool, CapturedGraph | None]) -> None:
    """Release them, whatever fails, and forget them; None is one that can't be captured."""
    dropped = [graph for graph in graphs.values() if graph is not None]
    graphs.clear()
    with contextlib.ExitStack() as rest:
        for graph in dropped:
            rest.callback(graph.close)
