"""Arrays of other libraries on the GPU, by __cuda_array_interface__ (torch, CuPy, JAX, Numba).

The interface: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
"""

from __future__ import annotations

from typing import Any

from rcod_runtime.errors import UsageError


def device_address(array: Any, name: str, shape: tuple[int, ...], writeable: bool = False) -> int:
    """Address of a float32 array in C order on the GPU.

    Raises:
        UsageError: not on a GPU, or another dtype, shape or memory order; or read-only.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise UsageError(
            f"{name}: expected an array on the GPU with __cuda_array_interface__, found "
            f"{type(array).__name__}. For arrays of the host call the Upscaler itself."
        )
    found = tuple(interface["shape"])
    if found != shape or interface["typestr"] != "<f4":
        raise UsageError(f"{name}: expected {shape} <f4, found {found} {interface['typestr']}.")
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != _c_order(shape):
        raise UsageError(
            f"{name}: expected C order, found strides {tuple(strides)}. Copy it first."
        )
    address, read_only = interface["data"]
    if writeable and read_only:
        raise UsageError(f"{name}: expected a writeable array, found a read-only one.")
    return int(address)


def _c_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [4]
    for side in reversed(shape[1:]):
        strides.insert(0, strides[0] * side)
    return tuple(strides)
