"""What TensorRT says: whose message it ends in, and that nobody's logger is gone when it speaks."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.backends.trt.engine import LoadedEngine
from rcod_runtime.backends.trt.logger import LINES_KEPT, shared_logger
from rcod_runtime.errors import BackendError, EngineMismatch, RcodError
from tests.runtime.simulated.cudart import SimulatedGpu, released
from tests.runtime.simulated.memory import Violation
from tests.runtime.simulated.tensorrt import Logger, Severity, tensorrt_module

Photo = Callable[..., np.ndarray]


def fail_at_first_run(gpu: SimulatedGpu, upscaler: Upscaler, lq: np.ndarray) -> None:
    """Of the first engine, with the next image."""
    upscaler(lq, batch=1)
    before = len(gpu.calls)
    upscaler(lq, batch=1)
    gpu.fail_at = len(gpu.calls) + gpu.calls[before:].index("execute_async_v3")


def test_what_is_said_after_the_first_upscaler_is_gone_is_heard(
    gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    first = Upscaler(engines, backend="tensorrt")
    with Upscaler(engines, backend="tensorrt") as second:
        first.close()
        del first
        gc.collect()
        fail_at_first_run(gpu, second, photo())
        with pytest.raises(BackendError, match="was refused.\n    ERROR: enqueue was made to fail"):
            second(photo(), batch=1)


def test_the_device_catches_a_logger_that_is_gone() -> None:
    class Other(Logger):
        def log(self, severity: Severity, message: str) -> None:
            raise AssertionError(message)

    trt = tensorrt_module(SimulatedGpu())
    first, second = trt.Runtime(Other()), trt.Runtime(Other())
    second.engine_host_code_allowed = False
    with pytest.raises(AssertionError, match="magic tag"):
        second.deserialize_cuda_engine(b"")  # said to the first one's
    del first
    gc.collect()
    with pytest.raises(Violation, match="said to a logger that is gone: the magic tag"):
        second.deserialize_cuda_engine(b"")


def test_a_message_ends_in_what_was_said_of_its_own_call(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    """Neither in what another Upscaler was told in this thread, nor in what another thread was."""
    logger = shared_logger(tensorrt_module(gpu))
    require = LoadedEngine._require

    def required(engine: LoadedEngine, good: bool, call: str) -> None:
        thread = threading.Thread(target=logger.log, args=(Severity.ERROR, "another thread's"))
        thread.start()
        thread.join()
        require(engine, good, call)

    monkeypatch.setattr(LoadedEngine, "_require", required)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        logger.log(Severity.ERROR, "another Upscaler's")
        fail_at_first_run(gpu, upscaler, photo())
        with pytest.raises(BackendError, match="enqueue was made to fail") as error:
            upscaler(photo(), batch=1)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(
    ("said", "error", "cure"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 9)", BackendError, "has no memory for it"),
        ("Error Code 1: Cuda Runtime (out of memory)", BackendError, "has no memory for it"),
        ("CUDA driver version is insufficient for", BackendError, "Update the driver"),
        (
            "magicTag == kEXPECTED_MAGIC_TAG failed",
            EngineMismatch,
            "engines BUNDLE --target tensorrt --force",
        ),
    ],
)
def test_of_an_engine_that_is_refused_the_log_says_what_to_do(
    gpu: SimulatedGpu, engines: Path, said: str, error: type[RcodError], cure: str
) -> None:
    """Building it again is no cure where the GPU is full, and without --force nothing is built."""
    gpu.refusal = said
    with pytest.raises(error) as refused:
        Upscaler(engines, backend="tensorrt")
    first, log, last = str(refused.value).splitlines()
    assert first.endswith("tensorrt 10.9.0 refuses it, and says:")
    assert log == f"    ERROR: {said}" and cure in last
    assert ("rcod-export" in last) is (error is EngineMismatch)
    assert released(gpu) == {}


def test_of_what_is_said_the_last_warnings_are_kept() -> None:
    logger = shared_logger(tensorrt_module(SimulatedGpu()))
    logger.forget()
    for number in range(100):
        logger.log(Severity.WARNING, f"number {number}")
        logger.log(Severity.INFO, "of no interest")
    lines = [f"    WARNING: number {n}" for n in range(100 - LINES_KEPT, 100)]
    assert logger.tail().splitlines() == ["", *lines]


def test_threads_share_the_first_logger() -> None:
    made: list[object] = []

    class Slow(Logger):
        def __init__(self) -> None:
            made.append(self)
            time.sleep(0.1)

    trt: Any = ModuleType("tensorrt")
    trt.ILogger, found = Slow, []
    threads = [threading.Thread(target=lambda: found.append(shared_logger(trt))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and all(logger is made[0] for logger in found)


TWO_RUNTIMES = """
import gc, importlib
from rcod_runtime.backends.trt.logger import shared_logger
trt = importlib.import_module("tensorrt_rtx")
held = [trt.Runtime(shared_logger(trt)) for _ in range(2)]
del held[0]
gc.collect()
filling = [bytes(n) for n in range(16, 200, 8) for _ in range(200)]
# Of what speaks to the first logger, the one thing that needs no GPU.
registry = trt.get_builder_plugin_registry(trt.EngineCapability.STANDARD)
try:
    registry.load_library("/none.so")
except RuntimeError:
    pass
print("heard:", shared_logger(trt).tail())
"""


def test_tensorrt_speaks_on_when_the_first_runtime_is_gone() -> None:
    """In a process of its own: it would crash."""
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "rcod[tensorrt-rtx]"')
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNTIMES], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Unable to load library: /none.so" in done.stdout
