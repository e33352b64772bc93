"""Who has the GPU, and what a progress callback may ask of its own Upscaler."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.errors import UsageError
from tests.runtime.simulated.cudart import SimulatedGpu, released
from tests.runtime.simulated.tensorrt import TILE_PX

Photo = Callable[..., np.ndarray]


def in_time(work: Callable[[], np.ndarray]) -> np.ndarray:
    """A thread that waits for itself fails the test, and does not stop all tests."""
    done: Future[np.ndarray] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as exc:
            done.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return done.result(timeout=60)


def test_one_that_is_closed_from_its_progress_callback_says_so_and_gives_back_all(
    gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    """As on a CPU, and nobody waits for itself."""
    upscaler = Upscaler(engines, backend="tensorrt")
    with pytest.raises(UsageError, match="closed while it ran"):
        in_time(lambda: upscaler(photo(), batch=1, progress=lambda *_: upscaler.close()))
    assert released(gpu) == {}
    upscaler.close()
    with pytest.raises(UsageError, match="is closed; make a new one"):
        upscaler(photo())


def test_one_that_is_closed_after_its_last_tile_gives_the_image(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo
) -> None:
    upscaler = Upscaler(engines, backend="tensorrt")

    def close(done: int, total: int) -> None:
        if done == total:
            upscaler.close()

    found = in_time(lambda: upscaler(photo(), batch=1, progress=close))
    np.testing.assert_array_equal(found, host(photo(), tile_px=TILE_PX))
    assert released(gpu) == {}


def test_what_waits_for_one_that_is_closed_meanwhile_says_so(
    gpu: SimulatedGpu, engines: Path, photo: Photo
) -> None:
    upscaler, errors = Upscaler(engines, backend="tensorrt"), []

    def enlarge() -> None:
        with pytest.raises(UsageError) as error:
            upscaler(photo())
        errors.append(str(error.value))

    other = threading.Thread(target=enlarge, daemon=True)

    def close(*_: int) -> None:
        if not other.ident:
            other.start()
            other.join(0.5)  # it waits for its turn
            upscaler.close()

    with pytest.raises(UsageError, match="closed while it ran"):
        in_time(lambda: upscaler(photo(), batch=1, progress=close))
    other.join()
    assert errors == ["this Upscaler is closed; make a new one."]
    assert released(gpu) == {}


def test_a_progress_callback_that_asks_for_another_image_is_refused(
    gpu: SimulatedGpu, engines: Path, host: Upscaler, photo: Photo
) -> None:
    refused = []

    def ask(*_: int) -> None:
        for work in (lambda: upscaler(photo()), lambda: upscaler.profile(runs=1)):
            with pytest.raises(UsageError, match="at work on an image in this thread"):
                work()
            refused.append(work)

    upscaler = Upscaler(engines, backend="tensorrt")
    found = in_time(lambda: upscaler(photo(), batch=2, progress=ask))
    np.testing.assert_array_equal(found, host(photo(), tile_px=TILE_PX, batch=2))
    assert len(refused) > 2
    upscaler.close()
    assert released(gpu) == {}
