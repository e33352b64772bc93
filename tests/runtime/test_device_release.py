"""Memory of the GPU that nobody closes: given back with its last holder, whoever captures."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.backends.trt.arrays import DeviceArray
from rcod_runtime.backends.trt.cuda import Cuda
from rcod_runtime.backends.trt.engine import LoadedEngine
from rcod_runtime.errors import BackendError
from tests.runtime.simulated.cudart import SimulatedGpu, released
from tests.runtime.simulated.tensorrt import TILE_PX

Photo = Callable[..., np.ndarray]


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What finalizers raised."""
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    monkeypatch.setattr(sys, "excepthook", lambda *error: raised.append(error))
    return raised


def in_thread(work: Callable[[], object], own: bool) -> None:
    """Do it in this thread or in another one."""
    if own:
        work()
        return
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_dropped_upscaler_gives_back_everything(
    gpu: SimulatedGpu, engines: Path, photo: Photo, unraisable: list[Any], own: bool, device: str
) -> None:
    held = [Upscaler(engines, device=device)]
    held[0](photo())
    assert gpu.leaks()["executable graphs"] == 1
    in_thread(held.clear, own)
    assert released(gpu) == {}
    assert unraisable == [] and gpu.current == 0


def test_one_in_a_cycle_of_references_is_left_to_the_garbage_collector(
    gpu: SimulatedGpu, engines: Path, photo: Photo, unraisable: list[Any]
) -> None:
    upscaler: Any = Upscaler(engines, backend="tensorrt")
    upscaler(photo())
    upscaler.itself = upscaler
    del upscaler
    gc.collect()
    assert gpu.leaks() == {} and unraisable == []


def test_what_was_closed_is_given_back_once(
    gpu: SimulatedGpu, engines: Path, photo: Photo, unraisable: list[Any]
) -> None:
    upscaler = Upscaler(engines, backend="tensorrt")
    upscaler(photo())
    upscaler.close()
    assert released(gpu) == {}
    calls = len(gpu.calls)
    upscaler.close()
    del upscaler
    gc.collect()
    assert len(gpu.calls) == calls and unraisable == []


def test_what_could_not_be_closed_is_given_back_when_it_is_dropped(
    gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    upscaler = Upscaler(engines, backend="tensorrt")
    upscaler(photo())
    gpu.fail_at = len(gpu.calls)
    with pytest.raises(BackendError, match="cudaGetDevice"):
        upscaler.close()
    gpu.fail_at = None
    del upscaler
    assert released(gpu) == {}


def test_a_dropped_upscaler_whose_release_fails_raises_nothing_and_gives_back_the_rest(
    gpu: SimulatedGpu, engines: Path, photo: Photo, unraisable: list[Any]
) -> None:
    lost = 0

    def work() -> None:
        upscaler = Upscaler(engines, backend="tensorrt")
        upscaler(photo(16, 24), batch=1)
        gpu.fail_at = len(gpu.calls) + number
        del upscaler
        gc.collect()

    names: list[str] = []
    for number in range(1000):
        work()
        if gpu.fail_at is None or gpu.fail_at >= len(gpu.calls):
            break
        names.append(gpu.calls[gpu.fail_at])
        gpu.fail_at = None
        if gpu.memory.live != lost:  # the thread could not be made ready for it
            lost = gpu.memory.live
            assert number < 3, names
    assert len(names) > 20 and {"cudaStreamSynchronize", "cudaGraphExecDestroy"} < set(names)
    assert unraisable == []


def test_a_forks_child_gives_nothing_back(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, engines: Path, unraisable: list[Any]
) -> None:
    """Nothing there is its own."""
    upscaler = Upscaler(engines, backend="tensorrt")
    calls, process = len(gpu.calls), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    del upscaler
    gc.collect()
    assert len(gpu.calls) == calls and unraisable == []


def test_one_dropped_during_a_capture_of_its_thread_is_given_back_after_it(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo
) -> None:
    """As the garbage collector may: freeing memory would break the capture."""
    enqueue = LoadedEngine.enqueue

    def enqueue_and_collect(engine: LoadedEngine, stream: Any) -> None:
        if stream.handle.capture is not None:
            before = gpu.leaks()
            held.clear()
            assert gpu.leaks() == before
        enqueue(engine, stream)

    lq = photo(16, 40)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        memory = gpu.memory.live
        held = [Upscaler(engines, backend="tensorrt")]
        monkeypatch.setattr(LoadedEngine, "enqueue", enqueue_and_collect)
        np.testing.assert_array_equal(upscaler(lq, batch=1), host(lq, tile_px=TILE_PX))
        assert held == [] and gpu.replays > 0
        assert gpu.memory.live == memory
    assert released(gpu) == {}


# While another library captures.


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("release", ["drop", "close"])
def test_another_librarys_capture_goes_on_while_an_upscaler_is_given_back(
    gpu: SimulatedGpu, engines: Path, photo: Photo, own: bool, release: str
) -> None:
    held = [Upscaler(engines, backend="tensorrt")]
    held[0](photo())
    with gpu.foreign_capture() as graph:
        in_thread(held.clear if release == "drop" else held[0].close, own)
        assert gpu.memory.live == gpu.pinned.live == 0
    assert not graph.broken
    assert released(gpu) == {}


def make_array(gpu: SimulatedGpu) -> DeviceArray:
    cuda = Cuda(gpu.module(), 0)
    with cuda.guard():
        return DeviceArray(cuda, (1, 3, 64, 64), 1)


@pytest.mark.parametrize("own", [True, False])
def test_another_librarys_capture_goes_on_while_a_new_array_is_given_back(
    gpu: SimulatedGpu, own: bool
) -> None:
    held = [make_array(gpu)]
    with gpu.foreign_capture() as graph:
        in_thread(held.clear, own)
        assert gpu.memory.live == len(gpu.events) == 0
    assert not graph.broken


def test_another_threads_capture_goes_on_while_a_new_array_is_made(gpu: SimulatedGpu) -> None:
    held: list[DeviceArray] = []
    with gpu.foreign_capture() as graph:
        in_thread(lambda: held.append(make_array(gpu)), own=False)
        assert gpu.memory.live == 1
    assert not graph.broken
    held.clear()
    assert gpu.leaks() == {}


def test_a_new_array_is_not_made_in_a_thread_that_captures(gpu: SimulatedGpu) -> None:
    """A graph would write into it after its last holder is gone."""
    with gpu.foreign_capture(), pytest.raises(BackendError, match="cudaErrorStreamCaptureUnsupp"):
        make_array(gpu)
    assert gpu.leaks() == {}
