"""The array on the GPU that enqueue makes: who may take it, and when it is freed."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.backends.trt.dlpack import CUDA, Borrowed
from rcod_runtime.backends.trt.engine import LoadedEngine
from tests.runtime.fakes import GAINS
from tests.runtime.simulated.arrays import OnGpu
from tests.runtime.simulated.cudart import SimulatedGpu, released
from tests.runtime.simulated.tensorrt import install
from tests.runtime.test_device_arrays import (
    DEVICES,
    SHAPE,
    enqueue_one,
    expected,
    new_stream,
    random,
    values_of,
)


@pytest.mark.parametrize("max_version", [None, (1, 0)])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("device", DEVICES)
def test_who_takes_the_new_array_on_another_stream_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, engines: Path, seed: int, max_version: Any, device: str
) -> None:
    gpu = SimulatedGpu(seed=seed)
    install(monkeypatch, gpu)
    with (
        Upscaler(engines, device=device) as upscaler,
        new_stream(gpu) as stream,
        new_stream(gpu) as other,
    ):
        made = enqueue_one(gpu, upscaler, stream)
        lies = CUDA, int(device[-1])
        assert made.__dlpack_device__() == lies
        taken = Borrowed(made.__dlpack__(stream=int(other), max_version=max_version), "it")
        assert (taken.device, taken.shape, taken.typestr) == (lies, SHAPE, "<f4")
        assert taken.address == made.__cuda_array_interface__["data"][0]
        gpu.cudaStreamSynchronize(other)
        found = values_of(gpu, made)
        assert np.abs(found - expected(random(3, SHAPE), GAINS[2])).max() < 1e-5
        taken.close()


@pytest.mark.parametrize("device", DEVICES)
def test_the_new_array_outlives_the_upscaler_and_is_freed_with_its_last_holder(
    gpu: SimulatedGpu, engines: Path, device: str
) -> None:
    with Upscaler(engines, device=device) as upscaler, new_stream(gpu) as stream:
        before = gpu.memory.live
        made = enqueue_one(gpu, upscaler, stream)
        made_too = enqueue_one(gpu, upscaler, stream)
        del made_too  # while it is still to be written
        gpu.cudaStreamSynchronize(stream)
        assert gpu.memory.live == before + 4 + 1  # the inputs, which the test keeps, and it
    taken = Borrowed(made.__dlpack__(stream=-1), "it")
    del made
    raw = gpu.memory.view(taken.address, 4).view(np.float32)
    assert np.isfinite(raw).all()
    taken.close()
    assert released(gpu) == {"device memory": 4}


def test_the_new_array_is_freed_by_whatever_thread_lets_go_of_it(
    gpu: SimulatedGpu, engines: Path
) -> None:
    with Upscaler(engines, device="cuda:1") as upscaler, new_stream(gpu) as stream:
        held = [enqueue_one(gpu, upscaler, stream)]
        before = gpu.memory.live
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert gpu.memory.live == before - 1


def test_what_is_let_go_of_during_a_capture_is_freed_after_it(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, engines: Path
) -> None:
    """As the garbage collector may: freeing memory would break the capture."""
    enqueue = LoadedEngine.enqueue

    def enqueue_and_collect(engine: LoadedEngine, stream: Any) -> None:
        if stream.handle.capture is not None:
            held.clear()
        enqueue(engine, stream)

    monkeypatch.setattr(LoadedEngine, "enqueue", enqueue_and_collect)
    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        before = gpu.memory.live
        held = [enqueue_one(gpu, upscaler, stream)]
        made = enqueue_one(gpu, upscaler, stream)
        assert held == [] and gpu.replays == 1
        assert gpu.memory.live == before + 4 + 1  # the inputs and what came second
        gpu.cudaStreamSynchronize(stream)
        assert np.abs(values_of(gpu, made) - expected(random(3, SHAPE), GAINS[2])).max() < 1e-5


def test_a_new_array_whose_release_fails_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, engines: Path
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    names = []
    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        for number in range(8):
            made = enqueue_one(gpu, upscaler, stream)
            gpu.cudaStreamSynchronize(stream)  # here nothing but the event waits for the GPU
            memory, events = gpu.memory.live, len(gpu.events)
            gpu.fail_at = len(gpu.calls) + number
            del made
            names.append(gpu.calls[gpu.fail_at])
            freed = memory - gpu.memory.live, events - len(gpu.events)
            # It is freed, but for where the thread can't be made ready for that.
            assert freed == ((0, 0) if number < 3 else (1, 1)), names
    assert names == [
        "cudaGetDevice", "cudaSetDevice", "cudaThreadExchangeStreamCaptureMode",
        "cudaEventSynchronize", "cudaEventDestroy", "cudaFree",
        "cudaThreadExchangeStreamCaptureMode", "cudaSetDevice",
    ]  # fmt: skip
    assert raised == []


def test_the_new_array_goes_in_again(gpu: SimulatedGpu, engines: Path) -> None:
    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        made = enqueue_one(gpu, upscaler, stream)
        thumbnail = OnGpu(gpu, stream, random(3, (1, 3, 16, 16)))
        count = sys.getrefcount(made)
        again = upscaler.enqueue(made, thumbnail, made, "realism", stream)
        assert again is made and sys.getrefcount(made) == count + 1
        gpu.cudaStreamSynchronize(stream)
        once = expected(random(3, SHAPE), GAINS[2])
        assert np.abs(values_of(gpu, made) - expected(once, GAINS[2])).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stream": 0}, "ambiguous"),
        ({"dl_device": (1, 0)}, r"it lies on device \(2, 0\), not on \(1, 0\)"),
        ({"copy": True}, "no copies"),
    ],
)
def test_what_the_new_array_cannot_do_is_a_buffer_error(
    gpu: SimulatedGpu, engines: Path, options: dict[str, Any], match: str
) -> None:
    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        made = enqueue_one(gpu, upscaler, stream)
        with pytest.raises(BufferError, match=match):
            made.__dlpack__(**options)
