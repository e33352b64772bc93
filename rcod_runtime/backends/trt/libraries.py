"""The libraries of a target, and what this machine is to an engine."""

from __future__ import annotations

import importlib
import platform
from typing import Any

from rcod_runtime.errors import BackendError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL_LINES = {
    "tensorrt": 'pip install "rcod[tensorrt]"',
    "tensorrt-rtx": 'pip install "rcod[tensorrt-rtx]"',
}


def load_tensorrt(target: str) -> Any:
    """The module of a target: tensorrt (10, 11) or tensorrt_rtx.

    Raises:
        BackendError: not installed, or its libraries can't be loaded; says the pip line.
    """
    return _load(MODULES[target], target)


def load_cuda(target: str = "tensorrt") -> Any:
    """The module cuda.bindings.runtime, which loads without a driver.

    Raises:
        BackendError: not installed; says the pip line.
    """
    return _load("cuda.bindings.runtime", target)


def _load(module: str, target: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as exc:
        raise BackendError(
            f"target {target}: the package {module} is missing or can't be loaded ({exc}). "
            f"{INSTALL_LINES[target]}"
        ) from exc


def operating_system() -> str:
    """The platform an engine is tied to, e.g. linux-x86_64."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def gpu_count(runtime: Any) -> int:
    """GPUs that answer.

    Raises:
        BackendError: no driver, or no GPU; says what CUDA says.
    """
    error, count = runtime.cudaGetDeviceCount()
    if int(error) != 0 or count == 0:
        raise BackendError(f"no GPU answers here ({error.name}){_about_driver(runtime, error)}")
    return int(count)


def _about_driver(runtime: Any, error: Any) -> str:
    """What is wrong with the driver, and what to do; empty where CUDA doesn't blame that."""
    if error.name != "cudaErrorInsufficientDriver":  # CUDA says it of a missing one too
        return ""
    (_, found), (_, expected) = runtime.cudaDriverGetVersion(), runtime.cudaRuntimeGetVersion()
    if not found:
        return ": no NVIDIA driver is installed"
    return (
        f": the driver is of CUDA {_version(found)}, older than cuda-bindings expects, "
        f"{_version(expected)}. Update the driver (TensorRT-RTX needs that), or pip uninstall "
        "tensorrt tensorrt-cu13 tensorrt-cu13-bindings tensorrt-cu13-libs, then "
        'pip install "tensorrt-cu12>=10.3,<12" "cuda-bindings<13"'
    )


def _version(number: int) -> str:
    """CUDA's 12040 is 12.4."""
    return f"{number // 1000}.{number % 1000 // 10}"


def gpu_name(runtime: Any, index: int) -> str:
    """A GPU's name, e.g. NVIDIA GeForce RTX 4090.

    Raises:
        BackendError: it doesn't say its name.
    """
    error, properties = runtime.cudaGetDeviceProperties(index)
    if int(error) != 0:
        raise BackendError(f"cuda:{index}: does not say its name ({error.name})")
    name: bytes = properties.name
    return name.decode(errors="replace")


def sm_of(runtime: Any, index: int) -> int:
    """Compute capability of a GPU, e.g. 89.

    Raises:
        BackendError: no such GPU.
    """
    count = gpu_count(runtime)
    if index >= count:
        raise BackendError(f"cuda:{index}: no such GPU, {count} answered, counted from 0")
    names = runtime.cudaDeviceAttr
    parts = []
    for name in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        error, value = runtime.cudaDeviceGetAttribute(getattr(names, name), index)
        if int(error) != 0:
            raise BackendError(f"cuda:{index}: does not say its compute capability ({error.name})")
        parts.append(int(value))
    return 10 * parts[0] + parts[1]
