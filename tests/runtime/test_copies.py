"""What an image takes beside its input and its result."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.colour import ColourMatch

Photo = Callable[..., np.ndarray]


def at_once(_: object, work: Callable[..., object], *given: object) -> Future[object]:
    done: Future[object] = Future()
    done.set_result(work(*given))
    return done


@pytest.mark.parametrize(
    ("scale", "channels", "method", "most"),
    [
        (1, 3, "consistent", 4),
        (2.37, 4, "adain", 4),
        (4, 1, "wavelet", 4),
        (4, 3, "consistent", 26),
    ],
)
def test_no_copy_in_floats_of_input_or_result_is_made(
    upscaler: Upscaler,
    photo: Photo,
    scale: float,
    channels: int,
    method: ColourMatch,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``most``: bytes for a pixel of the input; a result of four times its side has 48."""
    monkeypatch.setattr("rcod_runtime.parallel.WIDE", 1)  # as few rows at once as of a wide image
    monkeypatch.setattr("rcod_runtime.parallel.MAX_THREADS", 1)  # which meet or don't
    monkeypatch.setattr("rcod_runtime.chain._begun", at_once)  # nor do a tile and the next one

    def extra_bytes(height: int) -> int:
        lq = np.tile(photo(60, 64, channels), (height // 60, 1, 1))
        shape = (round(height * scale), round(64 * scale), channels)
        out = np.empty(shape, np.uint8)
        rgb_bytes = 0 if channels == 3 else 3 * shape[0] * shape[1]  # what the tiles go into
        tracemalloc.start()
        try:
            upscaler(lq, scale=scale, out=out, colour_match=method)
            return tracemalloc.get_traced_memory()[1] - rgb_bytes
        finally:
            tracemalloc.stop()

    for height in (240, 840):  # what is bound, and what is kept for other images
        extra_bytes(height)
    small, large = extra_bytes(240), extra_bytes(840)
    assert large - small < most * 64 * (840 - 240), f"{small} bytes, then {large}"
