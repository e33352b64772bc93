"""The simulated device itself: what it must catch, and what it stands in for."""

from __future__ import annotations

import inspect
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from rcod_runtime.backends.trt.logger import shared_logger
from tests.runtime.simulated.cudart import CaptureMode, CopyKind, Error, SimulatedGpu
from tests.runtime.simulated.memory import Violation
from tests.runtime.simulated.streams import Scheduler, Stream
from tests.runtime.simulated.tensorrt import (
    DType,
    EngineContext,
    Mode,
    RuntimeCache,
    RuntimeConfig,
    SimulatedEngine,
    tensorrt_module,
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


def test_each_thread_has_its_current_gpu() -> None:
    gpu = SimulatedGpu()
    found: list[object] = []
    gpu.cudaSetDevice(1)
    thread = threading.Thread(target=lambda: found.append(gpu.cudaGetDevice()))
    thread.start()
    thread.join()
    assert found == [(Error.cudaSuccess, 0)]
    assert gpu.cudaGetDevice() == (Error.cudaSuccess, 1)


def test_one_seed_is_one_order_of_the_streams() -> None:
    shuffle = random.Random(0).shuffle

    def run() -> str:
        scheduler = Scheduler(seed=1)
        ran: list[str] = []
        for name in "abcd":
            stream = Stream()
            scheduler.streams.add(stream)
            for _ in range(5):
                scheduler.enqueue(stream, lambda name=name: ran.append(name))
        scheduler.run_until(lambda: len(ran) == 20, "all")
        return "".join(ran)

    orders = set()
    for _ in range(20):
        holes = [Stream() for _ in range(4)]  # so that the next ones lie anywhere
        shuffle(holes)
        while holes:
            holes.pop()
        orders.add(run())
    assert len(orders) == 1


@pytest.mark.parametrize(
    "name", ["cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", "cudaEventSynchronize"]
)
def test_what_may_wait_for_the_gpu_breaks_a_capture_of_its_thread(name: str) -> None:
    gpu = SimulatedGpu()
    stream = gpu.cudaStreamCreateWithFlags(1)[1]
    event = gpu.cudaEventCreateWithFlags(2)[1]
    given = {"cudaFree": gpu.memory.allocate(8), "cudaFreeHost": gpu.pinned.allocate(8)}
    argument = given.get(name, event if name == "cudaEventSynchronize" else 8)
    call, held = getattr(gpu.module(), name), gpu.leaks()
    found: list[Error] = []
    gpu.cudaStreamBeginCapture(stream, 1)
    assert call(argument)[0] == Error.cudaErrorStreamCaptureUnsupported
    assert gpu.leaks() == held
    assert gpu.cudaStreamEndCapture(stream)[0] == Error.cudaErrorStreamCaptureInvalidated
    gpu.cudaStreamBeginCapture(stream, 1)
    thread = threading.Thread(target=lambda: found.append(call(argument)[0]))
    thread.start()
    thread.join()
    assert found == [Error.cudaSuccess]
    assert gpu.cudaStreamEndCapture(stream)[0] == Error.cudaSuccess


@pytest.mark.parametrize("mode", CaptureMode)
@pytest.mark.parametrize("own", [True, False])
def test_what_another_librarys_capture_forbids_depends_on_the_threads_mode(
    mode: CaptureMode, own: bool
) -> None:
    gpu = SimulatedGpu()
    module, found = gpu.module(), []

    def allocate() -> None:
        exchange = module.cudaThreadExchangeStreamCaptureMode
        before = exchange(mode)[1]
        found.append((before, module.cudaMalloc(8)[0], exchange(before)[1]))

    with gpu.foreign_capture() as graph:
        if own:
            allocate()
        else:
            thread = threading.Thread(target=allocate)
            thread.start()
            thread.join()
    allowed = mode == CaptureMode.cudaStreamCaptureModeRelaxed or (
        mode == CaptureMode.cudaStreamCaptureModeThreadLocal and not own
    )
    error = Error.cudaSuccess if allowed else Error.cudaErrorStreamCaptureUnsupported
    assert found == [(CaptureMode.cudaStreamCaptureModeGlobal, error, mode)]
    assert graph.broken is not allowed


def bound_context(gpu: SimulatedGpu, engines: Path) -> EngineContext:
    """Of an encoder, with all that it needs to run."""
    trt = tensorrt_module(gpu)
    runtime = trt.Runtime(shared_logger(trt))
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(next(engines.rglob("encoder.engine")).read_bytes())
    context = engine.create_execution_context("user managed")
    nbytes = engine.device_memory_size_v2
    context.set_device_memory(gpu.memory.allocate(nbytes), nbytes)
    for name, (low, _, _) in engine.profile.items():
        assert context.set_input_shape(name, tuple(low))
    for name in engine.modes:
        assert context.set_tensor_address(name, gpu.memory.allocate(1 << 16))
    return context


def test_a_capture_before_a_run_with_the_same_shapes_is_caught(engines: Path) -> None:
    gpu = SimulatedGpu()
    context = bound_context(gpu, engines)
    stream = gpu.cudaStreamCreateWithFlags(1)[1]

    def capture() -> None:
        gpu.cudaStreamBeginCapture(stream, 1)
        try:
            assert context.execute_async_v3(stream)
        finally:
            gpu.cudaStreamEndCapture(stream)

    for batch in (1, 2):
        (image,) = context.shapes
        assert context.set_input_shape(image, (batch, *context.shapes[image][1:]))
        with pytest.raises(Violation, match="captured before a run with its shapes"):
            capture()
        assert context.execute_async_v3(stream)
        capture()


def test_an_arena_has_one_run_at_a_time_on_each_gpu(engines: Path) -> None:
    addresses = set()
    for _ in range(2):
        context = bound_context(SimulatedGpu(), engines)
        assert context.arena is not None
        addresses.add(context.arena)
        context.engine.begin(context.arena)
        with pytest.raises(Violation, match="encoder runs in the arena that encoder is using"):
            context.engine.begin(context.arena)
    assert len(addresses) == 1


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
    for mode in CaptureMode:
        assert int(getattr(real.cudaStreamCaptureMode, mode.name)) == mode


def test_tensorrt_has_what_the_device_stands_in_for() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason='needs pip install "rcod[tensorrt-rtx]"')
    stands_in = {
        "ICudaEngine": SimulatedEngine,
        "IExecutionContext": EngineContext,
        "IRuntimeConfig": RuntimeConfig,
        "IRuntimeCache": RuntimeCache,
    }
    own = {"begin", "finish", "output_shape"}  # of the simulation
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
    assert real.Runtime(shared_logger(real)).engine_host_code_allowed is False
