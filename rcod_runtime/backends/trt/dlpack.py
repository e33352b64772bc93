"""DLPack capsules, read and made with ctypes: arrays of torch, CuPy and JAX without importing them.

The structures: https://dmlc.github.io/dlpack/latest/c_api.html
Who calls what: https://dmlc.github.io/dlpack/latest/python_spec.html
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from rcod_runtime.errors import UsageError

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
VERSION = (1, 0)  # the newest that is read here; later minor ones only add
READ_ONLY = 1  # in the flags of a versioned tensor
MAX_AXES = 64
FLOAT, BFLOAT = 2, 4  # DLDataTypeCode
_KINDS = {0: "i", 1: "u", FLOAT: "f", 5: "c", 6: "b"}  # of them, in NumPy's letters


class DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    """``strides`` count elements; NULL is C order."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManagedTensor(ctypes.Structure):
    """In capsules named ``dltensor``."""

    _fields_ = [
        ("dl_tensor", DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class DLManagedTensorVersioned(ctypes.Structure):
    """In capsules named ``dltensor_versioned``. What is before ``flags`` stays as it is."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    ]


# (name of a capsule, its name when somebody has taken what is in it, what is in it)
_CAPSULES: tuple[tuple[bytes, bytes, Any], ...] = (
    (b"dltensor_versioned", b"used_dltensor_versioned", DLManagedTensorVersioned),
    (b"dltensor", b"used_dltensor", DLManagedTensor),
)

# They hold the GIL: capsules are Python objects, and deleters may count references.
_python = ctypes.PYFUNCTYPE
_is_valid = _python(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_get_pointer = _python(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_set_name = _python(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)
_Deleter = _python(None, ctypes.c_void_p)


class Borrowed:
    """What a capsule describes; ``close`` gives it back to its library, once.

    ``device`` is (DLDeviceType, index), ``typestr`` NumPy's, ``strides`` in bytes or None; ``what``
    names it in errors.

    Raises:
        UsageError: no capsule of DLPack, one that was taken before, or a version not known here.
            What was taken is given back.
    """

    def __init__(self, capsule: Any, what: str) -> None:
        found = next((names for names in _CAPSULES if _is_valid(capsule, names[0])), None)
        if found is None:
            raise UsageError(
                f"{what}: expected __dlpack__ to give a new capsule, dltensor or "
                f"dltensor_versioned; found {capsule!r}."
            )
        name, used, kind = found
        self._what = what
        self._pointer: int | None = _get_pointer(capsule, name)
        _set_name(capsule, used)  # from here on nobody but us calls the deleter
        self._managed = kind.from_address(self._pointer)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the tensor back. Twice is harmless."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None and self._managed.deleter:
            _Deleter(self._managed.deleter)(pointer)

    def _read(self) -> None:
        managed = self._managed
        versioned = isinstance(managed, DLManagedTensorVersioned)
        if versioned and managed.major != VERSION[0]:
            raise UsageError(
                f"{self._what}: expected DLPack {VERSION[0]}.x or older, found "
                f"{managed.major}.{managed.minor}. Give it by __cuda_array_interface__."
            )
        tensor = managed.dl_tensor
        if not 0 <= tensor.ndim <= MAX_AXES:
            raise UsageError(
                f"{self._what}: expected at most {MAX_AXES} axes, found {tensor.ndim}."
            )
        itemsize = tensor.dtype.bits * tensor.dtype.lanes // 8
        self.device = (int(tensor.device.device_type), int(tensor.device.device_id))
        self.typestr = _typestr(tensor.dtype)
        self.shape = tuple(tensor.shape[: tensor.ndim])
        self.strides = (
            tuple(n * itemsize for n in tensor.strides[: tensor.ndim]) if tensor.strides else None
        )
        self.address = int(tensor.data or 0) + int(tensor.byte_offset)
        self.read_only = versioned and bool(managed.flags & READ_ONLY)


def _typestr(dtype: DLDataType) -> str:
    kind, each = _KINDS.get(dtype.code), f" in lanes of {dtype.lanes}" if dtype.lanes != 1 else ""
    if kind is None or dtype.bits % 8:
        name = "bfloat" if dtype.code == BFLOAT else f"type {dtype.code} of bits "
        return f"{name}{dtype.bits}{each}"
    return f"{'<' if dtype.bits > 8 else '|'}{kind}{dtype.bits // 8}{each}"


class _Addressed:
    """Memory of the GPU as NumPy is told of it: an address, which it passes on and never reads."""

    def __init__(self, owner: object, address: int, shape: tuple[int, ...]) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "shape": shape, "typestr": "<f4", "data": (address, False), "version": 3
        }  # fmt: skip


def make_capsule(
    owner: object,
    address: int,
    shape: tuple[int, ...],
    index: int,
    max_version: tuple[int, int] | None,
) -> Any:
    """A capsule of a float32 array in C order on GPU ``index``, which keeps ``owner`` alive.

    NumPy makes it, as of an array of the host, and the device is written into it. So capsule and
    deleter are its compiled ones, which hold without the GIL, with an error pending and while the
    interpreter ends; Python functions in their place would not.
    """
    array = np.asarray(_Addressed(owner, address, shape))
    try:
        capsule = array.__dlpack__(max_version=max_version)
    except TypeError:  # NumPy before 2.1; every consumer must take the older one too
        capsule = array.__dlpack__()
    for name, _, kind in _CAPSULES:
        if _is_valid(capsule, name):
            managed = kind.from_address(_get_pointer(capsule, name))
            managed.dl_tensor.device = DLDevice(CUDA, index)
            return capsule
    raise AssertionError(f"NumPy gave {capsule!r}")
