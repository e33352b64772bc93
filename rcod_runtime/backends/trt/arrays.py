"""Arrays on the GPU: other libraries' by DLPack or __cuda_array_interface__, and our own as both.

The interfaces: https://data-apis.org/array-api/latest/API_specification/generated/
array_api.array.__dlpack__.html and
https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from rcod_runtime.arrays import DLPACK_ERRORS
from rcod_runtime.backends.trt.cuda import (
    FLOAT_BYTES,
    Cuda,
    DeviceBuffer,
    Event,
    Stream,
    release_with,
)
from rcod_runtime.backends.trt.dlpack import (
    CPU,
    CUDA,
    CUDA_HOST,
    CUDA_MANAGED,
    VERSION,
    Borrowed,
    make_capsule,
)
from rcod_runtime.errors import UsageError

LEGACY_STREAM = 1  # CUDA's own handle of the default stream; as 0 the standard does not take it
NO_SYNC = -1  # in the place of a stream: the consumer sees to the order itself


@dataclass(frozen=True)
class DeviceView:
    """Where an array lies. ``strides`` are in bytes, None for C order."""

    name: str
    address: int
    shape: tuple[int, ...]
    typestr: str
    strides: tuple[int, ...] | None
    read_only: bool

    def check(self, shape: tuple[int, ...], writeable: bool = False) -> int:
        """The address, if it is a float32 array of this shape in C order.

        Raises:
            UsageError: another dtype, shape or memory order, or read-only.
        """
        if self.shape != shape or self.typestr != "<f4":
            raise UsageError(
                f"{self.name}: expected {shape} <f4, found {self.shape} {self.typestr}."
            )
        if self.strides is not None and not _is_c_order(shape, self.strides):
            raise UsageError(
                f"{self.name}: expected C order, found strides {self.strides}. Copy it first."
            )
        if writeable and self.read_only:
            raise UsageError(f"{self.name}: expected a writeable array, found a read-only one.")
        return self.address

    def check_between(self, low: tuple[int, ...], high: tuple[int, ...]) -> int:
        """The same for an array whose shape may vary, axis by axis.

        Raises:
            UsageError: a shape outside; and as ``check``.
        """
        good = len(self.shape) == len(low) and all(
            a <= n <= b for a, n, b in zip(low, self.shape, high, strict=True)
        )
        if not good:
            raise UsageError(f"{self.name}: expected {low} to {high}, found {self.shape}.")
        return self.check(self.shape)


def view_array(
    array: Any, name: str, stream: int, cuda: Cuda, keep: contextlib.ExitStack
) -> DeviceView:
    """Where an array lies on the GPU, ready for what is enqueued on ``stream`` from here on.

    By DLPack where it has that: then its library makes the stream wait for what writes the array.
    By the other interface it is made to wait here, for the stream that the array names. ``keep``
    gives back what is borrowed. The GPU is the thread's current one.

    Raises:
        UsageError: not on this GPU, or its library does not export it.
    """
    try:
        interface = getattr(array, "__cuda_array_interface__", None)
    except (*DLPACK_ERRORS, KeyError) as exc:  # torch's: gradients, or a dtype without a name
        raise UsageError(
            f"{name}: {type(array).__name__} does not export it ({exc}). Give a float32 array on "
            "the GPU; of a torch tensor with gradients give tensor.detach()."
        ) from exc
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        try:
            device = array.__dlpack_device__()
            _check_device(array, name, device, cuda.index)
            capsule = _export(array, stream)
        except DLPACK_ERRORS as exc:
            raise UsageError(f"{name}: {type(array).__name__} does not export it: {exc}") from exc
        borrowed = Borrowed(capsule, name)
        keep.callback(borrowed.close)
        _check_device(array, name, borrowed.device, cuda.index)
        # Capsules without a version can't say that an array is read-only, as JAX's are.
        read_only = borrowed.read_only or (interface is not None and bool(interface["data"][1]))
        return DeviceView(
            name, borrowed.address, borrowed.shape, borrowed.typestr, borrowed.strides, read_only
        )
    if interface is None:
        raise UsageError(
            f"{name}: expected an array on the GPU with __dlpack__ or __cuda_array_interface__, "
            f"found {type(array).__name__}."
        )
    _delay(cuda, stream, interface.get("stream"), name)
    address, read_only = interface["data"]
    strides = interface.get("strides")
    return DeviceView(
        name,
        int(address),
        tuple(interface["shape"]),
        interface["typestr"],
        None if strides is None else tuple(strides),
        bool(read_only),
    )


def _delay(cuda: Cuda, stream: int, writer: int | None, name: str) -> None:
    """Let ``stream`` wait for what is enqueued on ``writer``; None asks for nothing."""
    if writer == 0:
        raise UsageError(f"{name}: its stream is 0, which is ambiguous: expected 1, 2 or a handle.")
    if writer is None or writer == stream:
        return
    with contextlib.closing(Event(cuda)) as written:  # CUDA keeps it for who waits already
        written.record(writer)
        written.delay(stream)


def stream_handle(stream: Any) -> int:
    """CUDA's handle of a caller's stream as a number; 0 becomes the one that DLPack knows it by.

    Raises:
        UsageError: neither a number nor an object that stands for one.
    """
    try:
        return int(stream) or LEGACY_STREAM
    except (TypeError, ValueError):
        raise UsageError(
            f"stream: expected CUDA's handle of a stream, found {type(stream).__name__}. "
            "Of torch give stream.cuda_stream, of CuPy stream.ptr."
        ) from None


class DeviceArray:
    """A float32 array in C order on a GPU. Its memory is freed with its last holder.

    Takes part in DLPack (torch.from_dlpack, cupy.from_dlpack) and __cuda_array_interface__. It is
    valid on the ``stream`` that it was asked for on; a library that takes it on another one makes
    that wait. Freeing it waits for the GPU, as cudaFree does.
    """

    dtype = "float32"

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], stream: int) -> None:
        self.shape, self.stream, self.index, self._cuda = shape, stream, cuda.index, cuda
        # In a thread that captures it is refused: its graph would write into freed memory later.
        with cuda.capture_mode("ThreadLocal"), contextlib.ExitStack() as undo:
            buffer = DeviceBuffer(cuda, FLOAT_BYTES * math.prod(shape))
            undo.callback(buffer.close)
            self._written = Event(cuda)
            undo.callback(self._written.close)
            undo.callback(self._written.synchronize)
            self.address = buffer.address
            release_with(self, cuda, undo.pop_all())

    def mark_written(self, stream: Stream) -> None:
        """All that writes it is enqueued on ``stream`` now."""
        self._written.record(stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": "<f4",
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule, as the array API standard has it.

        Raises:
            BufferError: another device, a copy, or a stream that the standard excludes.
            BackendError: the stream can't be made to wait.
        """
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"it lies on device {self.__dlpack_device__()}, not on {dl_device}")
        if copy:
            raise BufferError("no copies are made here; copy what from_dlpack gives")
        if stream == 0:
            raise BufferError("stream 0 is ambiguous: 1 is the default stream, 2 the thread's")
        if stream != NO_SYNC:
            with self._cuda.guard():  # 1 and 2 are streams of the current GPU
                self._written.delay(LEGACY_STREAM if stream is None else stream)
        return make_capsule(self, self.address, self.shape, self.index, max_version)


def _export(array: Any, stream: int) -> Any:
    try:
        return array.__dlpack__(stream=stream, max_version=VERSION, copy=False)
    except TypeError:  # of before DLPack 1.0
        return array.__dlpack__(stream=stream)


def _check_device(array: Any, name: str, device: tuple[int, int], index: int) -> None:
    kind, number = int(device[0]), int(device[1])
    if kind not in (CUDA, CUDA_MANAGED):
        host = kind in (CPU, CUDA_HOST)
        where = "in the memory of the host" if host else f"on a device of DLPack's type {kind}"
        raise UsageError(
            f"{name}: expected an array on the GPU cuda:{index}, found {type(array).__name__} "
            f"{where}." + (" For arrays of the host call the Upscaler itself." if host else "")
        )
    if number != index:
        raise UsageError(
            f"{name}: expected an array on cuda:{index}, found one on cuda:{number}. Copy it "
            f'there, or open the Upscaler with device="cuda:{number}".'
        )


def _is_c_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whatever the strides of axes with one entry are: nothing is multiplied by them."""
    expected = FLOAT_BYTES
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        if side != 1 and stride != expected:
            return False
        expected *= side
    return True


def batch_of(tiles: DeviceView, batches: tuple[int, int]) -> int:
    """How many tiles an array of the GPU holds; its other axes are checked with the rest."""
    batch = tiles.shape[0] if tiles.shape else 1
    low, high = batches
    if not low <= batch <= high:
        raise UsageError(
            f"image: {batch} tiles; the engines are built for {low} to {high}. Build others: "
            f"rcod-export engines BUNDLE --batch {min(low, batch)} {max(high, batch)}"
        )
    return batch
