"""The graphs of a bundle as one chain: what an image asks of them, and their order on a CPU."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from rcod_runtime.backends import LARGE_GRAPH_BYTES, Array, Backend, Session, Shapes
from rcod_runtime.bundle import Bundle
from rcod_runtime.checked import CheckedSession
from rcod_runtime.contract import GUIDE
from rcod_runtime.errors import NonFiniteOutput, UsageError
from rcod_runtime.manifest import Manifest
from rcod_runtime.parallel import Turns, in_parallel

STAGES = ("encoder", "denoiser", "decoder")  # what runs for every tile


@dataclass
class ImageFeed:
    """What the graphs need of one image besides its tiles.

    ``common_tile``: the tile is of the size that all larger images have, and not the photo's own.
    ``thumbnail`` (1, 3, S, S) in [-1, 1] is what the tokens are made of; ``window`` (1, 3, h, w) in
    [0, 1] is what the guide of rcod-s sees. ``kept`` is the chain's: what it made of the two.
    """

    batch: int
    tile_hw: tuple[int, int]
    thumbnail: Array
    window: Array | None = None
    common_tile: bool = True
    kept: dict[str, Array] = field(default_factory=dict)


class TileOutputs(NamedTuple):
    """What a tile batch gives: z_lq and z_sr (B, C, h/8, w/8), with channels behind the latent's
    where something skips the denoiser, and the image (B, h, w, 3) in 0..255. The arrays are the
    caller's."""

    z_lq: Array
    z_sr: Array
    pixels: Array


class Chain(Protocol):
    """The graphs of one bundle on one device. May be shared by threads.

    ``tile_px`` is the only tile size it takes, None where any will do; ``batches`` the smallest and
    largest tile batch, ``batch`` the one to take where nobody chose. ``fits_tiles``: smaller tiles
    than usual take less time there, of whatever size they are.
    """

    name: str
    version: str
    precision: str
    tile_px: int | None
    batches: tuple[int, int]
    batch: int
    fits_tiles: bool

    def run(
        self, feed: ImageFeed, level: Array | None, tiles: Iterable[Array]
    ) -> Generator[TileOutputs, None, None]:
        """Tile batches (B, 3, h, w) in [-1, 1] -> their outputs, in order.

        Close the iterator if it is left before its end. ``level`` (n,) weighs the levels; None
        leaves the choice to the graphs.

        Raises:
            BackendError: the device or the library refuses something.
            NonFiniteOutput: tokens or matrices hold NaN or infinity.
        """
        ...

    def estimate(self, feed: ImageFeed, tiles: Iterable[Array]) -> list[Array]:
        """m_l (B,) of every tile batch (Eq. 6, as the MEM sees it)."""
        ...

    def profile(self, feed: ImageFeed, tile: Array, runs: int) -> dict[str, float]:
        """Median milliseconds of every stage for one tile batch."""
        ...

    def close(self) -> None:
        """Release everything. Twice is harmless; a call afterwards is an error."""
        ...


class HostChain:
    """The chain on a backend whose inputs and outputs lie in host memory.

    Threads take turns tile batch by tile batch. A run computes one batch while its caller makes the
    next one and is at work on the last: the graphs leave a part of the processors free.
    """

    tile_px: int | None = None
    batches = (1, 64)
    batch = 1

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.name, self.version = backend.name, backend.version
        self.precision = bundle.manifest.precision_with(backend.precision)
        self._manifest = bundle.manifest
        # The largest first: while it is loaded, it needs the most memory beside what is loaded.
        sizes = {name: bundle.graph_bytes(name) for name in bundle.manifest.graphs}
        order = sorted(sizes, key=lambda name: -sizes[name])
        self._large = [name for name in order if sizes[name] > LARGE_GRAPH_BYTES]
        # A large graph that is compiled for one size and for all takes its memory twice.
        self.fits_tiles = backend.takes_any_size and not self._large
        self._sessions: dict[str, Session] = {
            name: CheckedSession(
                backend.load(bundle.graph_path(name)),
                bundle.graph_path(name),
                bundle.manifest.graphs[name],
            )
            for name in order
        }
        self._bound: tuple[dict[str, Shapes], bool] | None = None
        self._lock = Turns()

    def run(
        self, feed: ImageFeed, level: Array | None, tiles: Iterable[Array]
    ) -> Generator[TileOutputs, None, None]:
        left, tiles = threading.Event(), iter(tiles)
        first, second = next(tiles), next(tiles, None)
        if second is None:
            yield self._outputs(feed, level, first, left)
            return
        pool = ThreadPoolExecutor(1)
        running: Future[TileOutputs] | None = None
        following: Future[TileOutputs] | None = None
        try:
            running = _begun(pool, self._outputs, feed, level, first, left)
            for image in itertools.chain((second,), tiles):
                following = _begun(pool, self._outputs, feed, level, image, left)
                yield running.result()
                running = following
            yield running.result()
        finally:
            left.set()
            pool.shutdown(cancel_futures=True)
            running = following = None  # what failed holds its caller's images

    def _outputs(
        self, feed: ImageFeed, level: Array | None, image: Array, left: threading.Event
    ) -> TileOutputs:
        with self._lock:
            _stop_if(left)
            self._prepare(feed)
            z_lq, z_sr, decoded = self._tile(feed, level, image, [], left)
            return TileOutputs(z_lq.copy(), z_sr.copy(), to_pixels(decoded))

    def estimate(self, feed: ImageFeed, tiles: Iterable[Array]) -> list[Array]:
        values = []
        for image in tiles:
            with self._lock:
                self._prepare(feed)
                values.append(self._encode(feed, image)["m_l"].copy())
        return values

    def profile(self, feed: ImageFeed, tile: Array, runs: int) -> dict[str, float]:
        level = np.full(len(self._manifest.levels), 1 / len(self._manifest.levels), np.float32)
        times = []
        with self._lock:
            self._prepare(feed)
            self._tile(feed, level, tile, [])
            for _ in range(runs):
                stamps = [time.perf_counter()]
                self._tile(feed, level, tile, stamps)
                times.append(np.diff(stamps) * 1e3)
        medians = np.median(times, axis=0)
        return {name: float(ms) for name, ms in zip(STAGES, medians, strict=True)}

    def close(self) -> None:
        with self._lock:
            self._sessions = {}

    def _tile(
        self,
        feed: ImageFeed,
        level: Array | None,
        image: Array,
        stamps: list[float],
        left: threading.Event | None = None,
    ) -> tuple[Array, Array, Array]:
        """z_lq, z_sr and the decoded image, valid until the next tile batch. Under the lock.

        The time after every stage goes to ``stamps``. Once ``left`` is set nobody waits for it.
        """
        _stop_if(left)
        encoded = self._encode(feed, image)
        z_lq = encoded["z_lq"]
        stamps.append(time.perf_counter())
        feeds = {"z_lq": z_lq, "tokens": feed.kept["tokens"]}
        if "unet_matrices" in feed.kept:
            feeds["unet_matrices"] = feed.kept["unet_matrices"]
        if len(self._manifest.levels) > 1:  # with one there is nothing to choose
            feeds["level"] = (
                (feed.kept if self._manifest.is_guided else encoded)["adaptive"]
                if level is None
                else np.repeat(level[None], feed.batch, axis=0)
            )
        _stop_if(left)
        z_sr = self._sessions["denoiser"].run(feeds)["z_sr"]
        stamps.append(time.perf_counter())
        _stop_if(left)
        decoded = self._sessions["decoder"].run({"z_sr": z_sr})["image"]
        stamps.append(time.perf_counter())
        return z_lq, z_sr, decoded

    def _encode(self, feed: ImageFeed, image: Array) -> dict[str, Array]:
        feeds = {"image": image}
        if "vae_matrices" in feed.kept:
            feeds["vae_matrices"] = feed.kept["vae_matrices"]
        return self._sessions["encoder"].run(feeds)

    def _bind(self, name: str, shapes: Shapes, feed: ImageFeed) -> None:
        """The thumbnail has one size, and what the guide looks at is the photo's."""
        common = name == "vpim" or (feed.common_tile and name != GUIDE)
        self._sessions[name].bind(shapes, common=common)

    def _prepare(self, feed: ImageFeed) -> None:
        """Bind the graphs to this image's shapes, compute its tokens and matrices once."""
        if not self._sessions:
            raise UsageError("this Upscaler was closed while it ran.")
        shapes = input_shapes(self._manifest, feed)
        if (shapes, feed.common_tile) != self._bound:
            self._bound = None  # neither the old shapes nor the new ones, where one graph refuses
            large = [name for name in self._large if name in shapes]
            others = [name for name in shapes if name not in large]
            for name in large:
                self._bind(name, shapes[name], feed)
            in_parallel(lambda name: self._bind(name, shapes[name], feed), others)
            self._bound = shapes, feed.common_tile
        if feed.kept:
            return
        tokens = self._sessions["vpim"].run({"image": feed.thumbnail})["tokens"]
        check_finite(tokens, "vpim")
        kept = {"tokens": np.repeat(tokens, feed.batch, axis=0)}
        if feed.window is not None:
            for name, values in self._sessions[GUIDE].run({"lq": feed.window}).items():
                check_finite(values, GUIDE)
                kept[name] = np.repeat(values, feed.batch, axis=0)
        feed.kept.update(kept)


def _begun(
    pool: ThreadPoolExecutor, work: Callable[..., TileOutputs], *given: object
) -> Future[TileOutputs]:
    """In the pool's thread, or where the interpreter ends, which begins no more, in this one."""
    try:
        return pool.submit(work, *given)
    except RuntimeError:
        done: Future[TileOutputs] = Future()
        done.set_result(work(*given))
        return done


def _stop_if(left: threading.Event | None) -> None:
    if left is not None and left.is_set():
        raise CancelledError


def input_shapes(manifest: Manifest, feed: ImageFeed) -> dict[str, Shapes]:
    """Shapes of every graph's inputs; tokens and matrices are the image's, so theirs run once."""
    shapes: dict[str, Shapes] = {
        name: {
            tensor.name: tensor.sized(1 if name == "vpim" else feed.batch, *feed.tile_hw)
            for tensor in graph.inputs
        }
        for name, graph in manifest.graphs.items()
        if name != GUIDE
    }
    if feed.window is not None:
        shapes[GUIDE] = {"lq": feed.window.shape}
    return shapes


def to_pixels(decoded: Array) -> Array:
    """What the decoder gives, (B, 3, h, w) in [-1, 1] -> a new (B, h, w, 3) in 0..255."""
    pixels = decoded + 1.0
    pixels *= np.float32(127.5)
    return pixels.transpose(0, 2, 3, 1)


def check_finite(values: Array, graph: str, where: str = "") -> None:
    """Raises NonFiniteOutput where values hold NaN or infinity; ``where`` goes into the message."""
    if not np.isfinite(values).all():
        raise NonFiniteOutput(
            f"graph {graph}{where}: gave NaN or infinity; there is no result. "
            "Try precision fp32, or check the bundle: rcod-doctor --bundle DIR"
        )
