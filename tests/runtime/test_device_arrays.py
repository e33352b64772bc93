"""Arrays that lie on the GPU: in and out on the caller's stream, without the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.errors import UsageError
from tests.runtime.fakes import GAINS
from tests.runtime.simulated.cudart import SimulatedGpu
from tests.runtime.simulated.streams import Stream
from tests.runtime.simulated.tensorrt import TILE_PX, install


class OnGpu:
    """An array of another library on the simulated GPU, written when its stream gets there."""

    def __init__(self, gpu: SimulatedGpu, stream: Stream, values: np.ndarray) -> None:
        self.gpu, self.shape = gpu, values.shape
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


@pytest.mark.parametrize("seed", range(10))
def test_arrays_on_the_gpu_go_in_and_out_on_the_callers_stream(
    monkeypatch: pytest.MonkeyPatch, engines: Path, seed: int
) -> None:
    gpu = SimulatedGpu(seed=seed)
    install(monkeypatch, gpu)
    rng = np.random.default_rng(seed)
    with Upscaler(engines, backend="tensorrt") as upscaler:
        stream = gpu.cudaStreamCreateWithFlags(1)[1]
        thumbnail = OnGpu(gpu, stream, rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32))
        images = rng.uniform(-0.5, 0.5, (3, 2, 3, TILE_PX, TILE_PX)).astype(np.float32)
        found = []
        for image, realism in zip(images, ("fidelity", "realism", "adaptive"), strict=True):
            out = OnGpu(gpu, stream, np.zeros_like(image))
            upscaler.enqueue(OnGpu(gpu, stream, image), thumbnail, out, realism, stream)
            found.append(out)  # all are enqueued before anybody waits
        gpu.cudaStreamSynchronize(stream)
        results = [out.values for out in found]
        gpu.cudaStreamDestroy(stream)
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    # m_l of the fake is the image's mean, about 0 here: the last level.
    for image, result, gain in zip(images, results, (GAINS[0], GAINS[2], GAINS[2]), strict=True):
        padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
        inner = (slice(None), slice(None))
        blurred = sum(
            weights[i, j] * padded[(*inner, slice(i, i + TILE_PX), slice(j, j + TILE_PX))]
            for i in range(3)
            for j in range(3)
        )
        assert np.abs(result - np.clip(blurred * gain, -1, 1)).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": (5, 3, 64, 64)}, "5 tiles; the engines are built for 1 to 4.*--batch 1 5"),
        ({"shape": (1, 3, 32, 32)}, r"expected \(1, 3, 64, 64\) <f4, found \(1, 3, 32, 32\)"),
        ({"typestr": "<f2"}, "found .* <f2"),
        ({"strides": (4, 8, 16, 32)}, "expected C order"),
    ],
)
def test_arrays_on_the_gpu_that_cannot_be_used_say_why(
    gpu: SimulatedGpu, engines: Path, change: dict[str, Any], match: str
) -> None:
    class Array:
        __cuda_array_interface__ = {
            "shape": (1, 3, 64, 64), "typestr": "<f4", "data": (256, False), "version": 3, **change
        }  # fmt: skip

    with Upscaler(engines, backend="tensorrt") as upscaler:
        with pytest.raises(UsageError, match=match):
            upscaler.enqueue(Array(), Array(), Array())
        with pytest.raises(UsageError, match="expected an array on the GPU.*found ndarray"):
            upscaler.enqueue(np.zeros((1, 3, 64, 64), np.float32), Array(), Array())


def test_arrays_on_the_gpu_need_engines(host: Upscaler) -> None:
    with pytest.raises(UsageError, match="need the bundle's engines, onnxruntime"):
        host.enqueue(None, None, None)
