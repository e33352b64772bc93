"""C code and Python share pixels without copies."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.picture import draw_picture
from examples.c_callable import UPSCALE_T, c_function
from rcod_runtime import Upscaler

HEIGHT, WIDTH = 24, 40
SR_BYTES = HEIGHT * WIDTH * 48


@pytest.fixture(scope="module")
def upscaler() -> Upscaler:
    return Upscaler(device="cpu")


CALLS = 6  # at once, each with room of its own for its result


@pytest.fixture
def c_memory() -> Iterator[tuple[int, int]]:
    """Addresses from malloc: a photo's pixels, and room for the results."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    lq, sr = libc.malloc(HEIGHT * WIDTH * 3), libc.malloc(CALLS * SR_BYTES)
    ctypes.memmove(lq, draw_picture(HEIGHT, WIDTH).tobytes(), HEIGHT * WIDTH * 3)
    yield lq, sr
    libc.free(lq)
    libc.free(sr)


def called(function: object, lq: int, sr: int, height: int = HEIGHT, realism: float = 0.5) -> int:
    """Through the bare address, as C calls it."""
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    code: int = UPSCALE_T(address)(lq, height, WIDTH, realism, sr)
    return code


def test_c_gets_the_pixels_where_it_wants_them(
    upscaler: Upscaler, c_memory: tuple[int, int]
) -> None:
    function = c_function(upscaler)
    expected = upscaler(draw_picture(HEIGHT, WIDTH), 0.5)
    lq, sr = c_memory
    assert called(function, lq, sr) == 0
    assert ctypes.string_at(sr, SR_BYTES) == expected.tobytes()
    ctypes.memset(sr, 0, CALLS * SR_BYTES)
    results = [sr + i * SR_BYTES for i in range(CALLS)]
    with ThreadPoolExecutor(3) as pool:  # threads that C made look the same from here
        codes = list(pool.map(lambda result: called(function, lq, result), results))
    assert codes == [0] * CALLS
    for result in results:
        assert ctypes.string_at(result, SR_BYTES) == expected.tobytes()


def test_errors_come_to_c_as_numbers(
    upscaler: Upscaler, c_memory: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    function = c_function(upscaler)
    with caplog.at_level(logging.ERROR):
        assert called(function, *c_memory, realism=float("nan")) == 2
        assert called(function, 0, c_memory[1]) == called(function, c_memory[0], 0) == 2
        assert called(function, *c_memory, height=-1) == called(function, *c_memory, height=0) == 2
    for name in ("lq", "sr"):
        assert f"UsageError: {name}: expected pixels, found NULL" in caplog.text
    for height in (-1, 0):
        assert f"UsageError: {height} x {WIDTH} px: expected at least 1 x 1" in caplog.text
    assert "UsageError: realism nan: expected a number in [0, 1]" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_python_program_comes_to_c_as_a_number_too(
    upscaler: Upscaler, c_memory: tuple[int, int], error: type[BaseException]
) -> None:
    """Raised through C, it would leave the result undefined."""

    class Interrupted(SimpleNamespace):
        def __call__(self, *_: object, **__: object) -> None:
            raise error

    function = c_function(Interrupted(manifest=upscaler.manifest))  # type: ignore[arg-type]
    assert called(function, *c_memory) == 1


def test_photos_of_many_shapes_leave_nothing_behind(
    upscaler: Upscaler, c_memory: tuple[int, int]
) -> None:
    """A ctypes type for each shape would never be freed."""

    class Black(SimpleNamespace):
        def __call__(self, source: np.ndarray, realism: float, out: np.ndarray) -> None:
            assert out.shape == (4 * source.shape[0], 4 * source.shape[1], 3)
            out[...] = 0

    function = c_function(Black(manifest=upscaler.manifest))  # type: ignore[arg-type]
    assert called(function, *c_memory) == 0
    before = len(ctypes.Array.__subclasses__())
    assert all(called(function, *c_memory, height=height) == 0 for height in range(1, HEIGHT))
    gc.collect()
    assert len(ctypes.Array.__subclasses__()) <= before


def test_a_buffer_is_read_and_written_in_place(upscaler: Upscaler) -> None:
    """As the README has it; mmap stands for any object with the buffer protocol."""
    photo = draw_picture(HEIGHT, WIDTH)
    source, target = mmap.mmap(-1, photo.nbytes), mmap.mmap(-1, 16 * photo.nbytes)
    source[:] = photo.tobytes()
    lq = np.frombuffer(source, np.uint8).reshape(HEIGHT, WIDTH, 3)
    out = np.frombuffer(target, np.uint8).reshape(4 * HEIGHT, 4 * WIDTH, 3)
    assert upscaler(lq, out=out) is out
    assert target[:] == upscaler(photo).tobytes()
