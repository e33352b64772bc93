"""Arrays that lie on the GPU: in and out on the caller's stream, without the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.backends.trt.arrays import DeviceArray
from rcod_runtime.chain import ImageFeed, to_pixels
from rcod_runtime.errors import BackendError, UsageError
from rcod_runtime.levels import choice_weights
from tests.runtime.fakes import GAINS, make_bundle
from tests.runtime.simulated.arrays import ByDlpack, ByOldDlpack, OnGpu, Ordered
from tests.runtime.simulated.cudart import SimulatedGpu, released
from tests.runtime.simulated.streams import Stream
from tests.runtime.simulated.tensorrt import TILE_PX, add_engines, install

SHAPE = (2, 3, TILE_PX, TILE_PX)
INTERFACES = [OnGpu, Ordered, ByDlpack, ByOldDlpack]
DEVICES = ["cuda:0", "cuda:1"]  # the thread's current GPU stays the first one


@contextlib.contextmanager
def new_stream(gpu: SimulatedGpu) -> Iterator[Stream]:
    stream = gpu.cudaStreamCreateWithFlags(1)[1]
    yield stream
    gpu.cudaStreamSynchronize(stream)
    gpu.cudaStreamDestroy(stream)


def random(seed: int, shape: tuple[int, ...], limit: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-limit, limit, shape).astype(np.float32)


def expected(image: np.ndarray, gain: float) -> np.ndarray:
    """What the graphs of the fake bundle compute."""
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
    blurred = sum(
        weights[i, j] * padded[:, :, i : i + TILE_PX, j : j + TILE_PX]
        for i in range(3)
        for j in range(3)
    )
    return np.clip(blurred * gain, -1, 1)


def assert_given_back_once(arrays: list[Any]) -> None:
    for array in arrays:
        if isinstance(array, ByDlpack):
            assert [lent.returned for lent in array.lent] == [1]


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("device", DEVICES)
def test_arrays_go_in_and_out_on_the_callers_stream(
    monkeypatch: pytest.MonkeyPatch, engines: Path, interface: Any, seed: int, device: str
) -> None:
    gpu = SimulatedGpu(seed=seed)
    install(monkeypatch, gpu)
    with Upscaler(engines, device=device) as upscaler, new_stream(gpu) as stream:
        thumbnail = random(seed, (1, 3, 16, 16))
        images = random(seed, (3, *SHAPE))
        used, outs = [], []
        for image, realism in zip(images, ("fidelity", "realism", "adaptive"), strict=True):
            arrays = [interface(gpu, stream, x) for x in (image, thumbnail, np.zeros_like(image))]
            assert upscaler.enqueue(*arrays, realism, stream) is arrays[2]
            used += arrays
            outs.append(arrays[2])  # all are enqueued before anybody waits
        gpu.cudaStreamSynchronize(stream)
        results = [out.values for out in outs]
    # m_l of the fake is the image's mean, about 0 here: the last level.
    for image, result, gain in zip(images, results, (GAINS[0], GAINS[2], GAINS[2]), strict=True):
        assert np.abs(result - expected(image, gain)).max() < 1e-5
    assert_given_back_once(used)
    assert gpu.owner == int(device[-1]) and gpu.current == 0


@pytest.mark.parametrize("interface", [Ordered, ByDlpack, ByOldDlpack])
@pytest.mark.parametrize("seed", range(10))
def test_arrays_of_other_streams_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, engines: Path, interface: Any, seed: int
) -> None:
    gpu = SimulatedGpu(seed=seed)
    install(monkeypatch, gpu)
    image = random(seed, SHAPE)
    with (
        Upscaler(engines, backend="tensorrt") as upscaler,
        new_stream(gpu) as stream,
        new_stream(gpu) as first,
        new_stream(gpu) as second,
        new_stream(gpu) as third,
    ):
        out = interface(gpu, third, np.zeros(SHAPE, np.float32))
        thumbnail = interface(gpu, second, random(seed, (1, 3, 16, 16)))
        upscaler.enqueue(interface(gpu, first, image), thumbnail, out, "realism", int(stream))
        gpu.cudaStreamSynchronize(stream)
        assert np.abs(out.values - expected(image, GAINS[2])).max() < 1e-5


@pytest.mark.parametrize("handle", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_the_default_stream_is_a_stream_too(
    gpu: SimulatedGpu, engines: Path, handle: int, device: str
) -> None:
    image, default = random(1, SHAPE), gpu.scheduler.default
    with Upscaler(engines, device=device) as upscaler:
        arrays = [ByDlpack(gpu, default, x) for x in (image, random(1, (1, 3, 16, 16)))]
        out = upscaler.enqueue(*arrays, realism="realism", stream=handle)
        assert out.__cuda_array_interface__["stream"] == 1  # as 0 it may not be given
        gpu.cudaStreamSynchronize(handle)
        assert np.abs(values_of(gpu, out) - expected(image, GAINS[2])).max() < 1e-5


# The array that enqueue makes: test_device_made.py.


def values_of(gpu: SimulatedGpu, array: DeviceArray) -> np.ndarray:
    interface = array.__cuda_array_interface__
    assert (interface["typestr"], interface["strides"]) == ("<f4", None)
    nbytes = 4 * int(np.prod(interface["shape"]))
    raw = gpu.memory.view(interface["data"][0], nbytes)
    return raw.copy().view(np.float32).reshape(interface["shape"])


def enqueue_one(gpu: SimulatedGpu, upscaler: Upscaler, stream: Stream) -> DeviceArray:
    arrays = [OnGpu(gpu, stream, random(3, shape)) for shape in (SHAPE, (1, 3, 16, 16))]
    made = upscaler.enqueue(*arrays, realism="realism", stream=stream)
    assert isinstance(made, DeviceArray)
    return made


# A bundle with a guide, which looks at the photo itself.


@pytest.fixture(scope="session")
def guided_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "guided"
    make_bundle(folder, guided=True)
    add_engines(folder)
    return folder


@pytest.mark.parametrize("interface", [OnGpu, ByDlpack])
@pytest.mark.parametrize("realism", ["fidelity", 0.3, "adaptive"])
def test_with_a_guide_the_result_is_the_cpus_bit_for_bit(
    gpu: SimulatedGpu, guided_engines: Path, interface: Any, realism: str | float
) -> None:
    image, thumbnail = random(1, SHAPE), random(1, (1, 3, 16, 16))
    windows = [0.5 + random(seed, (1, 3, *size)) for seed, size in enumerate([(24, 40), (512, 16)])]
    with (
        Upscaler(guided_engines, backend="onnxruntime") as host,
        Upscaler(guided_engines, backend="tensorrt") as upscaler,
        new_stream(gpu) as stream,
    ):
        outs, used = [], []
        for window in (*windows, windows[0]):
            used += [interface(gpu, stream, x) for x in (image, thumbnail, window)]
            arrays = {"realism": realism, "stream": stream, "window": used[-1]}
            outs.append(upscaler.enqueue(*used[-3:-1], **arrays))
        gpu.cudaStreamSynchronize(stream)
        for window, out in zip((*windows, windows[0]), outs, strict=True):
            feed = ImageFeed(2, (TILE_PX, TILE_PX), thumbnail, window)
            (outputs,) = host._chain.run(feed, choice_weights(realism, host.manifest), [image])
            np.testing.assert_array_equal(to_pixels(values_of(gpu, out)), outputs.pixels)
    assert_given_back_once(used)
    assert not np.array_equal(values_of(gpu, outs[0]), values_of(gpu, outs[1]))


def test_with_a_guide_whole_photos_are_the_cpus_bit_for_bit(
    gpu: SimulatedGpu, guided_engines: Path, photo: Callable[..., np.ndarray]
) -> None:
    with (
        Upscaler(guided_engines, backend="onnxruntime") as host,
        Upscaler(guided_engines, backend="tensorrt") as upscaler,
    ):
        for seed, realism in enumerate(("realism", "adaptive", 0.2)):
            lq = photo(24, 40, seed=seed)
            found = upscaler(lq, realism)
            np.testing.assert_array_equal(found, host(lq, realism, tile_px=TILE_PX, batch=4))


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (None, "window: this bundle has a guide, which looks at the photo's centre"),
        (
            (1, 3, 16, 516),
            r"window: expected \(1, 3, 1, 1\) to \(1, 3, 512, 512\), found \(1, 3, 16, 516\)",
        ),
        ((3, 16, 16), r"window: .* found \(3, 16, 16\)"),
    ],
)
def test_a_window_that_the_guide_cannot_look_at_is_refused(
    gpu: SimulatedGpu, guided_engines: Path, shape: Any, match: str
) -> None:
    with Upscaler(guided_engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        arrays = [ByDlpack(gpu, stream, random(1, x)) for x in (SHAPE, (1, 3, 16, 16))]
        window = None if shape is None else ByDlpack(gpu, stream, random(1, shape))
        with pytest.raises(UsageError, match=match):
            upscaler.enqueue(*arrays, stream=stream, window=window)
        assert_given_back_once([] if window is None else [*arrays, window])


def test_a_window_without_a_guide_is_refused(gpu: SimulatedGpu, engines: Path) -> None:
    with (
        Upscaler(engines, backend="tensorrt") as upscaler,
        pytest.raises(UsageError, match="window: this bundle has no guide"),
    ):
        upscaler.enqueue(None, None, window=np.zeros((1, 3, 16, 16), np.float32))


# What can be wrong.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": (5, 3, 64, 64)}, "5 tiles; the engines are built for 1 to 4.*--batch 1 5"),
        ({"shape": (1, 3, 32, 32)}, r"expected \(1, 3, 64, 64\) <f4, found \(1, 3, 32, 32\)"),
        ({"typestr": "<f2"}, "found .* <f2"),
        ({"strides": (4, 8, 16, 32)}, "expected C order"),
        ({"stream": 0}, "image: its stream is 0, which is ambiguous"),
    ],
)
def test_arrays_by_the_interface_that_cannot_be_used_say_why(
    gpu: SimulatedGpu, engines: Path, change: dict[str, Any], match: str
) -> None:
    class Array:
        __cuda_array_interface__ = {
            "shape": (1, 3, 64, 64), "typestr": "<f4", "data": (256, False), "version": 3, **change
        }  # fmt: skip

    with Upscaler(engines, backend="tensorrt") as upscaler:
        with pytest.raises(UsageError, match=match):
            upscaler.enqueue(Array(), Array(), Array())
        with pytest.raises(UsageError, match="image: .*array on the GPU.*found ndarray in.* host"):
            upscaler.enqueue(np.zeros((1, 3, 64, 64), np.float32), Array(), Array())
        with pytest.raises(UsageError, match="image: .* __dlpack__ or __cuda.*found NoneType"):
            upscaler.enqueue(None, Array(), Array())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": (2, 16, 1)}, r"out: expected \(2, 3, 64, 64\) <f4, found .* <f2"),
        ({"dtype": (4, 16, 1)}, "out: expected .* found .* bfloat16"),
        ({"dtype": (2, 32, 2)}, "out: .* <f4 in lanes of 2"),
        ({"ndim": 3}, r"out: .* found \(2, 3, 64\) <f4"),
        ({"strides": (12288, 1, 192, 3)}, "out: expected C order, found strides .*Copy it"),
        ({"flags": 1}, "out: expected a writeable array"),
        ({"version": (2, 0)}, "out: expected DLPack 1.x or older, found 2.0"),
        ({"device": (2, 1)}, 'out: expected .* on cuda:0, found one on cuda:1.*device="cuda:1"'),
        ({"device": (1, 0)}, "out: expected an array on the GPU.* in the memory of the host"),
        ({"device": (10, 0)}, "out: .*on a device of DLPack's type 10"),
    ],
)
def test_arrays_by_dlpack_that_cannot_be_used_say_why_and_are_given_back(
    gpu: SimulatedGpu, engines: Path, change: dict[str, Any], match: str
) -> None:
    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        arrays = [ByDlpack(gpu, stream, random(1, shape)) for shape in (SHAPE, (1, 3, 16, 16))]
        arrays.append(ByDlpack(gpu, stream, random(1, SHAPE), **change))
        with pytest.raises(UsageError, match=match):
            upscaler.enqueue(*arrays, "realism", stream)
        assert_given_back_once(arrays)


def test_strides_of_axes_with_one_entry_do_not_count(gpu: SimulatedGpu, engines: Path) -> None:
    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        image = random(1, (1, 3, 64, 64))
        arrays = [
            ByDlpack(gpu, stream, image, strides=(1, 4096, 64, 1)),
            ByDlpack(gpu, stream, random(1, (1, 3, 16, 16)), strides=(0, 256, 16, 1)),
        ]
        made = upscaler.enqueue(*arrays, realism="realism", stream=stream)
        gpu.cudaStreamSynchronize(stream)
        assert np.abs(values_of(gpu, made) - expected(image, GAINS[2])).max() < 1e-5


def test_a_library_that_does_not_export_is_quoted(gpu: SimulatedGpu, engines: Path) -> None:
    class Tracked(ByDlpack):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("Can't export tensors that require gradient")

    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        array = Tracked(gpu, stream, random(1, SHAPE))
        with pytest.raises(UsageError, match="image: Tracked does not export it: .* gradient"):
            upscaler.enqueue(array, array, stream=stream)


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
@pytest.mark.parametrize("base", [OnGpu, ByDlpack])
def test_a_library_that_does_not_say_where_an_array_lies_is_quoted(
    gpu: SimulatedGpu, engines: Path, base: Any, error: type[Exception]
) -> None:
    """As torch, of a tensor that requires gradients or has a dtype without a name."""

    class Tracked(base):
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise error("Can't get __cuda_array_interface__ on Variable that requires grad.")

    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        array = Tracked(gpu, stream, random(1, SHAPE))
        match = r"image: Tracked does not export it .*requires grad.*give tensor\.detach\(\)"
        with pytest.raises(UsageError, match=match):
            upscaler.enqueue(array, array, stream=stream)


def test_an_array_without_a_version_may_be_read_only_by_its_other_interface(
    gpu: SimulatedGpu, engines: Path
) -> None:
    class Immutable(ByOldDlpack):
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return {"shape": self.shape, "typestr": "<f4", "data": (256, True), "version": 3}

    with Upscaler(engines, backend="tensorrt") as upscaler, new_stream(gpu) as stream:
        arrays = [ByDlpack(gpu, stream, random(1, shape)) for shape in (SHAPE, (1, 3, 16, 16))]
        out = Immutable(gpu, stream, random(1, SHAPE))
        with pytest.raises(UsageError, match="out: expected a writeable array"):
            upscaler.enqueue(*arrays, out, stream=stream)
        assert_given_back_once([*arrays, out])


def test_what_stands_for_no_stream_is_refused(gpu: SimulatedGpu, engines: Path) -> None:
    with (
        Upscaler(engines, backend="tensorrt") as upscaler,
        pytest.raises(UsageError, match="stream: expected .*found object.*stream.cuda_stream"),
    ):
        upscaler.enqueue(None, None, stream=object())


def test_arrays_on_the_gpu_need_engines(host: Upscaler) -> None:
    with pytest.raises(UsageError, match="need the bundle's engines, onnxruntime"):
        host.enqueue(None, None, None)


def test_every_call_that_fails_gives_back_what_was_borrowed(
    monkeypatch: pytest.MonkeyPatch, engines: Path
) -> None:
    image, thumbnail = random(1, SHAPE), random(1, (1, 3, 16, 16))
    number, name, first = 0, "", None
    while first is None:
        gpu = SimulatedGpu()
        install(monkeypatch, gpu)
        with Upscaler(engines, backend="tensorrt") as upscaler:
            stream = gpu.scheduler.default
            arrays = [ByDlpack(gpu, stream, x) for x in (image, thumbnail)]
            gpu.fail_at = len(gpu.calls) + number
            try:
                first = upscaler.enqueue(*arrays, realism="realism", stream=stream)
            except BackendError as exc:
                name = gpu.calls[gpu.fail_at]
                assert name in str(exc)
            gpu.fail_at = None
            if name in ("cudaGetDevice", "cudaSetDevice"):  # perhaps before anything was borrowed
                arrays = [array for array in arrays if array.lent]
            assert_given_back_once(arrays)
            arrays = [ByDlpack(gpu, stream, x) for x in (image, thumbnail)]
            made = upscaler.enqueue(*arrays, realism="realism", stream=stream)
            gpu.cudaStreamSynchronize(0)
            assert np.abs(values_of(gpu, made) - expected(image, GAINS[2])).max() < 1e-5
            del made
        if first is None:
            inputs = {"device memory": 4}
            assert gpu.leaks() == inputs or released(gpu) == inputs, name  # it takes its time
        number += 1
    assert number > 15
