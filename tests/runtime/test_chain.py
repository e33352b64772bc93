"""The chain on a CPU: what runs at the same time, and what is left behind."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.backends import Array
from rcod_runtime.backends.openvino_backend import OpenVinoSession
from rcod_runtime.chain import HostChain, ImageFeed
from rcod_runtime.errors import BackendError, UsageError
from rcod_runtime.levels import choice_weights
from rcod_runtime.parallel import Turns
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
            assert i < 2 or started[i - 1].wait(WAIT_S), "the tile before waits for this one"
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
    assert threading.active_count() <= threads
    again = list(chain.run(image_feed(), level, tiles()))
    assert len(again) == TILES and threading.active_count() <= threads
    np.testing.assert_array_equal(again[0].pixels, first)


def test_photos_a_little_larger_than_a_tile_share_graphs_for_any_size(
    bundle: Path, photo: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_model = OpenVinoSession._compiled

    def counted(self: OpenVinoSession, *given: Any) -> object:
        compiled.append(self._path.stem)
        return compile_model(self, *given)

    monkeypatch.setattr(OpenVinoSession, "_compiled", counted)
    with Upscaler(bundle, backend="openvino", precision="fp32") as upscaler:
        side = upscaler.manifest.image.tile_px // 4
        for height in range(side + 2, side + 9):
            upscaler(photo(height, height))
    assert sorted(compiled) == ["decoder", "denoiser", "encoder", "vpim"], "each once"


def test_after_warmup_no_size_compiles(
    bundle: Path, photo: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Upscaler(bundle, backend="openvino", precision="fp32") as upscaler:
        upscaler.warmup()
        monkeypatch.setattr(OpenVinoSession, "_compiled", lambda self, *_: pytest.fail("late"))
        side = upscaler.manifest.image.tile_px // 4
        for height in (3, side, side + 5, 3 * side):
            upscaler(photo(height, height + 1))
            upscaler(photo(height, height))


def test_what_nobody_waits_for_is_not_computed_to_its_end(
    chain: HostChain, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tile behind the one at which a run is left stops at its next graph."""
    ran: list[str] = []
    working, compute = threading.Event(), chain._tile
    left: list[threading.Event] = []
    sessions = chain._sessions

    def noted(*args: object) -> tuple[Array, Array, Array]:
        left.append(args[-1])  # type: ignore[arg-type]
        return compute(*args)  # type: ignore[arg-type]

    class Watched:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, name: str) -> object:
            return getattr(sessions[self.name], name)

        def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
            ran.append(self.name)
            if ran.count("encoder") == 2 and self.name == "encoder":
                working.set()
                assert left[0].wait(WAIT_S)
            return sessions[self.name].run(feeds)

    monkeypatch.setattr(chain, "_tile", noted)
    monkeypatch.setattr(chain, "_sessions", {name: Watched(name) for name in sessions})
    level = choice_weights("realism", upscaler.manifest)
    results = chain.run(image_feed(), level, tiles())
    next(results)
    assert working.wait(WAIT_S)
    results.close()
    assert ran.count("encoder") == 2 and ran.count("denoiser") == ran.count("decoder") == 1


def test_a_graph_that_refuses_a_tile_ends_the_image_and_no_other(
    chain: HostChain, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    level, count, compute = (
        choice_weights("realism", upscaler.manifest),
        itertools.count(),
        chain._tile,
    )
    expected = [outputs.pixels for outputs in chain.run(image_feed(), level, tiles())]
    compute, threads = chain._tile, threading.active_count()

    def refusing(*args: object) -> tuple[Array, Array, Array]:
        if next(count) == 1:
            raise BackendError("too hot")
        return compute(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(chain, "_tile", refusing)
        with pytest.raises(BackendError, match="too hot"):
            list(chain.run(image_feed(), level, tiles()))
    assert threading.active_count() <= threads
    found = [outputs.pixels for outputs in chain.run(image_feed(), level, tiles())]
    np.testing.assert_array_equal(found, expected)


def test_threads_get_a_turn_in_the_order_in_which_they_asked() -> None:
    """One that asks again at once does not get it before another that waits."""
    turns, order = Turns(), list[int]()

    def take(number: int) -> None:
        for _ in range(20):
            with turns:
                order.append(number)
                waiting = len(turns._asked) > 1
                if not waiting:
                    time.sleep(0.001)
                several.append(waiting)

    several: list[bool] = []
    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    with turns:  # until both have asked
        for thread in threads:
            thread.start()
        while len(turns._asked) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join(WAIT_S)
    assert len(order) == 40
    again = [a == b for a, b in zip(order, order[1:], strict=False)]
    assert not any(same and waited for same, waited in zip(again, several, strict=False))


def test_who_is_interrupted_while_it_waits_for_its_turn_holds_nobody_up() -> None:
    turns = Turns()
    interrupted = turns._changed.wait_for

    def raise_once(*_: object) -> bool:
        turns._changed.wait_for = interrupted  # type: ignore[method-assign]
        raise KeyboardInterrupt

    turns._changed.wait_for = raise_once  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt), turns:
        pass
    taken = threading.Event()

    def take() -> None:
        with turns:
            taken.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert taken.wait(5)


def test_an_image_is_made_where_no_thread_can_be_begun_any_more(
    chain: HostChain, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of the interpreter, in a thread that goes on."""

    def refused(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    level = choice_weights("realism", upscaler.manifest)
    expected = [outputs.pixels for outputs in chain.run(image_feed(), level, tiles())]
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refused)
    found = [outputs.pixels for outputs in chain.run(image_feed(), level, tiles())]
    np.testing.assert_array_equal(found, expected)


def test_an_upscaler_that_is_closed_while_it_runs_says_so(
    bundle: Path, photo: Callable[..., np.ndarray]
) -> None:
    with (
        Upscaler(bundle, backend="onnxruntime") as upscaler,
        pytest.raises(UsageError, match="closed while it ran"),
    ):
        upscaler(photo(40, 60), tile_px=64, progress=lambda *_: upscaler.close())


def test_a_result_over_the_limit_of_pixels_is_refused(upscaler: Upscaler) -> None:
    with pytest.raises(UsageError, match="the limit is 1000 million pixels"):
        upscaler.output_shape((20_000, 20_000, 3))
