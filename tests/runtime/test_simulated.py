"""The simulated device itself: what it must catch, and what it stands in for."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from rcod_runtime.backends.trt.engine import make_logger
from tests.runtime.simulated.cudart import CopyKind, Error, SimulatedGpu
from tests.runtime.simulated.memory import Violation
from tests.runtime.simulated.tensorrt import (
    DType,
    EngineContext,
    Mode,
    RuntimeCache,
    RuntimeConfig,
    SimulatedEngine,
)


def test_the_device_catches_what_a_gpu_would_not_forgive() -> None:
    gpu = SimulatedGpu()
    address = gpu.memory.allocate(1024)
    assert np.isnan(gpu.memory.view(address, 4).view(np.float32)[0])
    for wrong, nbytes in [(address, 1025), (address - 1, 4), (address + 2048, 4)]:
        with pytest.raises(Violation):
            gpu.memory.view(wrong, nbytes)
    with pytest.raises(Violation, match="aligned"):
        gpu.memory.view(address + 4, 4, aligned=True)
    gpu.memory.free(address)
    with pytest.raises(Violation, match="freed"):
        gpu.memory.view(address, 4)
    with pytest.raises(Violation, match="no live block"):
        gpu.memory.free(address)


def parameters(documentation: str) -> int:
    """Of a function whose documentation begins with its signature."""
    inside = documentation.strip().split("\n")[0].split("(", 1)[1].rsplit(")", 1)[0]
    return len(inside.split(",")) if inside else 0


def test_cuda_has_what_the_device_stands_in_for() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason='needs pip install "rcod[tensorrt]"')
    module = SimulatedGpu().module()
    for name, value in vars(module).items():
        if not name.startswith("cuda"):
            continue
        assert hasattr(real, name), name
        if inspect.isfunction(value):
            simulated = getattr(SimulatedGpu, name)
            count = simulated.__code__.co_argcount - 1
            assert parameters(getattr(real, name).__doc__) == count, name
        elif isinstance(value, int):
            assert int(getattr(real, name)) == value, name
    for kind in CopyKind:
        assert int(getattr(real.cudaMemcpyKind, kind.name)) == kind
    for error in Error:
        assert int(getattr(real.cudaError_t, error.name)) == error
    attributes = real.cudaDeviceAttr
    assert int(attributes.cudaDevAttrComputeCapabilityMajor) == 75
    assert int(attributes.cudaDevAttrComputeCapabilityMinor) == 76
    mode = real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert int(mode) == 1


def test_tensorrt_has_what_the_device_stands_in_for() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason='needs pip install "rcod[tensorrt-rtx]"')
    stands_in = {
        "ICudaEngine": SimulatedEngine,
        "IExecutionContext": EngineContext,
        "IRuntimeConfig": RuntimeConfig,
        "IRuntimeCache": RuntimeCache,
    }
    own = {"begin", "finish", "busy"}  # of the simulation
    for name, simulated in stands_in.items():
        for attribute, value in vars(simulated).items():
            if callable(value) and not attribute.startswith("_") and attribute not in own:
                assert hasattr(getattr(real, name), attribute), f"{name}.{attribute}"
    assert hasattr(real.ICudaEngine, "device_memory_size_v2")
    assert hasattr(real.ICudaEngine, "num_io_tensors")
    assert real.TensorIOMode.INPUT.name == Mode.INPUT.name
    assert real.DataType.FLOAT.name == DType.FLOAT.name
    assert real.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert real.ILogger.Severity.WARNING < real.ILogger.Severity.INFO
    assert real.Runtime(make_logger(real)).engine_host_code_allowed is False
