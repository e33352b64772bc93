"""The chain on a CPU: what runs at the same time, and what is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.backends import Array
from rcod_runtime.backends.openvino_backend import OpenVinoSession
from rcod_runtime.chain import HostChain, ImageFeed
from rcod_runtime.levels import choice_weights
from tests.runtime.fakes import TOKENS_PX

SIDE, TILES = 64, 4
WAIT_S = 30.0


@pytest.fixture
def chain(upscaler: Upscaler) -> HostChain:
    assert isinstance(upscaler._chain, HostChain)
    return upscaler._chain


def image_feed() -> ImageFeed:
    return ImageFeed(1, (SIDE, SIDE), np.zeros((1, 3, TOKENS_PX, TOKENS_PX), np.float32))


def tiles() -> Iterator[Array]:
    for i in range(TILES):
        yield np.full((1, 3, SIDE, SIDE), i / TILES, np.float32)


def test_the_graphs_run_while_the_last_tile_is_at_work_and_the_next_is_made(
    chain: HostChain, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = [threading.Event() for _ in range(TILES)]
    count, run = iter(started), chain._tile

    def announced(*args: object) -> tuple[Array, Array, Array]:
        next(count).set()
        return run(*args)  # type: ignore[arg-type]

    def made() -> Iterator[Array]:
        for i, tile in enumerate(tiles()):
            assert i == 0 or started[i - 1].wait(WAIT_S), "the tile before waits for this one"
            yield tile

    monkeypatch.setattr(chain, "_tile", announced)
    level = choice_weights("realism", upscaler.manifest)
    values = []
    with closing(chain.run(image_feed(), level, made())) as results:
        for i, outputs in enumerate(results):
            assert i == TILES - 1 or started[i + 1].wait(WAIT_S), "the next waits for its caller"
            values.append(outputs.pixels.mean())
    assert len(values) == TILES and values == sorted(values)


def test_a_run_that_is_left_leaves_no_thread_and_the_chain_goes_on(
    chain: HostChain, upscaler: Upscaler
) -> None:
    threads, level = threading.active_count(), choice_weights("realism", upscaler.manifest)
    with closing(chain.run(image_feed(), level, tiles())) as results:
        first = next(results).pixels
    assert threading.active_count() == threads
    again = list(chain.run(image_feed(), level, tiles()))
    assert len(again) == TILES and threading.active_count() == threads
    np.testing.assert_array_equal(again[0].pixels, first)


def test_photos_a_little_larger_than_a_tile_share_graphs_for_any_size(
    bundle: Path, photo: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_model = OpenVinoSession._compiled

    def counted(self: OpenVinoSession, model: object) -> object:
        compiled.append(self._path.stem)
        return compile_model(self, model)

    monkeypatch.setattr(OpenVinoSession, "_compiled", counted)
    with Upscaler(bundle, backend="openvino", precision="fp32") as upscaler:
        side = upscaler.manifest.image.tile_px // 4
        for height in range(side + 2, side + 9):
            upscaler(photo(height, height))
    assert len(compiled) == len(set(compiled)), "each once"


def test_after_warmup_no_size_compiles(
    bundle: Path, photo: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Upscaler(bundle, backend="openvino", precision="fp32") as upscaler:
        upscaler.warmup()
        monkeypatch.setattr(OpenVinoSession, "_compiled", lambda self, model: pytest.fail("late"))
        side = upscaler.manifest.image.tile_px // 4
        for height in (3, side, side + 5, 3 * side):
            upscaler(photo(height, height + 1))
            upscaler(photo(height, height))
