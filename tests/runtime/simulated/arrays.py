"""Arrays of other libraries on the simulated GPU, and capsules of DLPack of which all can be wrong.

The structures are the runtime's own; that they are DLPack's is tested with NumPy's and torch's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from rcod_runtime.backends.trt.dlpack import (
    DLDataType,
    DLDevice,
    DLManagedTensor,
    DLManagedTensorVersioned,
)
from tests.runtime.simulated.cudart import SimulatedGpu
from tests.runtime.simulated.streams import Stream

_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
_NAMES = {True: b"dltensor_versioned", False: b"dltensor"}


class Lent:
    """One capsule, and how often what is in it was given back."""

    def __init__(
        self,
        address: int | None,
        shape: tuple[int, ...],
        versioned: bool = True,
        *,
        version: tuple[int, int] = (1, 0),
        device: tuple[int, int] = (2, 0),
        dtype: tuple[int, int, int] = (2, 32, 1),
        strides: tuple[int, ...] | None = None,
        ndim: int | None = None,
        byte_offset: int = 0,
        flags: int = 0,
        deleter: bool = True,
    ) -> None:
        self.returned = 0
        self._deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._take_back)
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        self._managed = DLManagedTensorVersioned() if versioned else DLManagedTensor()
        if versioned:
            (self._managed.major, self._managed.minor), self._managed.flags = version, flags
        if deleter:
            self._managed.deleter = ctypes.cast(self._deleter, ctypes.c_void_p)
        tensor = self._managed.dl_tensor
        tensor.data, tensor.device, tensor.dtype = address, DLDevice(*device), DLDataType(*dtype)
        tensor.ndim = len(shape) if ndim is None else ndim
        tensor.shape = ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64))
        if self._strides is not None:
            tensor.strides = ctypes.cast(self._strides, ctypes.POINTER(ctypes.c_int64))
        tensor.byte_offset = byte_offset
        self.capsule = _new_capsule(ctypes.addressof(self._managed), _NAMES[versioned], None)

    def _take_back(self, managed: int) -> None:
        assert managed == ctypes.addressof(self._managed)
        self.returned += 1


class OnGpu:
    """An array on the GPU, written when its stream gets there. By __cuda_array_interface__ only."""

    def __init__(self, gpu: SimulatedGpu, stream: Stream, values: np.ndarray) -> None:
        self.gpu, self.stream, self.shape = gpu, stream, values.shape
        self.address = gpu.memory.allocate(values.nbytes)
        raw = np.frombuffer(values.tobytes(), np.uint8)
        gpu.scheduler.enqueue(stream, lambda: self._view().__setitem__(slice(None), raw))

    def _view(self) -> np.ndarray:
        return self.gpu.memory.view(self.address, 4 * int(np.prod(self.shape)))

    @property
    def values(self) -> np.ndarray:
        return self._view().copy().view(np.float32).reshape(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "<f4", "data": (self.address, False), "version": 3}


class Ordered(OnGpu):
    """The same, and the interface names its stream."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**super().__cuda_array_interface__, "stream": int(self.stream)}


class ByDlpack:
    """The same by DLPack only, as torch: another stream waits for the array's own.

    ``change`` spoils its capsules, which ``lent`` lists.
    """

    versioned = True

    def __init__(
        self, gpu: SimulatedGpu, stream: Stream, values: np.ndarray, **change: Any
    ) -> None:
        self._on_gpu, self._change = OnGpu(gpu, stream, values), change
        self.gpu, self.stream, self.shape = gpu, stream, values.shape
        self.lent: list[Lent] = []

    @property
    def values(self) -> np.ndarray:
        return self._on_gpu.values

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.gpu.owner or 0

    def __dlpack__(self, *, stream: int, max_version: Any = None, copy: Any = None) -> Any:
        assert max_version == (1, 0) and copy is False
        return self._lend(stream)

    def _lend(self, stream: int) -> Any:
        assert stream > 0, "0 is ambiguous, and -1 would leave the order to us"
        event = self.gpu.cudaEventCreateWithFlags(2)[1]
        self.gpu.cudaEventRecord(event, self.stream)
        self.gpu.cudaStreamWaitEvent(stream, event, 0)
        self.gpu.cudaEventDestroy(event)
        change = {"device": self.__dlpack_device__(), **self._change}
        self.lent.append(Lent(self._on_gpu.address, self.shape, self.versioned, **change))
        return self.lent[-1].capsule


class ByOldDlpack(ByDlpack):
    """As libraries of before DLPack 1.0."""

    versioned = False

    def __dlpack__(self, *, stream: int) -> Any:  # type: ignore[override]
        return self._lend(stream)
