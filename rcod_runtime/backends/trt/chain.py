"""The chain on a GPU: a tile goes up, runs through three engines, and comes down.

Latents never leave the device between the graphs. What one tile batch enqueues is captured once per
shape as a CUDA graph and launched again for any level, because the level is data. Two slots let the
copies of one tile batch overlap the computation of another.

Tiles travel as float32, four times the bytes of uint8: 3.1 MB for 512 px, 0.1 ms of a PCIe 4.0 x16
link (and as much again on the way down of nano's latents, which are checked), behind a computation
that takes longer (README, Backends). As uint8 they would not be the same tiles: the upsampled input
is rounded nowhere, and the result only after blending and colours.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from rcod_runtime.backends import Array
from rcod_runtime.backends.trt.arrays import DeviceArray, batch_of, stream_handle, view_array
from rcod_runtime.backends.trt.cache import write_cache
from rcod_runtime.backends.trt.cuda import (
    FLOAT_BYTES,
    CapturedGraph,
    Cuda,
    DeviceBuffer,
    Event,
    drop_graphs,
    release,
    release_with,
)
from rcod_runtime.backends.trt.engine import float_bytes
from rcod_runtime.backends.trt.engines import EngineSet
from rcod_runtime.backends.trt.libraries import load_cuda, load_tensorrt
from rcod_runtime.backends.trt.load import load_engines
from rcod_runtime.backends.trt.memory import DOWN, SLOTS, Memory, Slot, kept, sides_of
from rcod_runtime.backends.trt.turn import Turn
from rcod_runtime.bundle import Bundle
from rcod_runtime.chain import (
    STAGES,
    ImageFeed,
    TileOutputs,
    check_finite,
    input_shapes,
    to_pixels,
)
from rcod_runtime.contract import GUIDE
from rcod_runtime.errors import BackendError, UsageError

log = logging.getLogger(__name__)


def open_device_chain(
    bundle: Bundle, engines: EngineSet, index: int, precision: str
) -> DeviceChain:
    """The chain on GPU ``index``.

    Raises:
        UsageError: a precision that the engines have not.
        BackendError: a library or the device refuses something.
        EngineMismatch: TensorRT refuses an engine.
        HashMismatch: an engine's file was changed.
    """
    if precision not in ("auto", engines.precision):
        raise UsageError(
            f"precision {precision}: the engines compute in {engines.precision}. Choose that or "
            "auto, or export the bundle in another precision."
        )
    trt = load_tensorrt(engines.target)
    return DeviceChain(bundle, engines, trt, Cuda(load_cuda(engines.target), index))


class DeviceChain:
    """All graphs of a bundle as engines on one GPU. Threads take turns image by image."""

    fits_tiles = False

    def __init__(self, bundle: Bundle, engines: EngineSet, trt: Any, cuda: Cuda) -> None:
        self.name, self.version = engines.target, engines.version
        self.precision = engines.precision
        self.tile_px: int | None = engines.tile_px
        self.batches, self.batch = engines.batches, engines.batches[1]
        self._manifest, self._cuda, self._turn = bundle.manifest, cuda, Turn()
        guide = engines.engines.get(GUIDE)
        self._window_limits = ((), ()) if guide is None else guide.profile["lq"][::2]
        self._captured: dict[bool, CapturedGraph | None] = {}
        self._ran: set[bool] = set()
        self._bound: dict[str, Any] = {}
        self._compiled: set[object] = set()  # shapes of graphs that have been bound
        self._shapes: dict[str, tuple[int, ...]] = {}  # of what comes down
        self._compiles = False  # TensorRT-RTX meets shapes that it has not run
        self._resources = contextlib.ExitStack()
        self._closed = False
        with contextlib.ExitStack() as undo:
            undo.callback(release, cuda, self._resources)
            with cuda.guard():
                self._engines, self._caches = load_engines(
                    bundle, engines, trt, cuda, self._resources
                )
                self._memory = Memory(
                    cuda, self._resources, bundle.manifest, engines.tile_px, engines.batches[1]
                )
                self._memory.bind(bundle.manifest, self._engines)
            undo.pop_all()
        self._resources.callback(drop_graphs, self._captured)
        self._resources.callback(self._memory.drain)
        self._finalizer = release_with(self, cuda, self._resources)

    def run(
        self, feed: ImageFeed, level: Array | None, tiles: Iterable[Array]
    ) -> Generator[TileOutputs, None, None]:
        with self._whole_or_reset():
            with self._cuda.guard():
                self._start(feed, level)
            pending: deque[Slot] = deque()
            for number, image in enumerate(tiles):
                slot = self._memory.slots[number % SLOTS]
                with self._cuda.guard():
                    self._submit(slot, image, adaptive=level is None)
                    pending.append(slot)
                    if len(pending) < SLOTS:
                        continue
                    outputs = self._collect(pending.popleft())
                yield outputs
            while pending:
                with self._cuda.guard():
                    outputs = self._collect(pending.popleft())
                yield outputs

    def estimate(self, feed: ImageFeed, tiles: Iterable[Array]) -> list[Array]:
        memory, values = self._memory, []
        with self._whole_or_reset(all_ran=False), self._cuda.guard():
            self._bind(feed)
            for image in tiles:
                self._upload(memory.slots[0], image)
                self._engines["encoder"].enqueue(memory.compute)
                m_l, shape = memory.host["m_l"], (feed.batch,)
                source, nbytes = memory.tensors["m_l"].address, float_bytes(shape)
                self._cuda.copy(m_l.address, source, nbytes, "DeviceToHost", memory.compute)
                memory.compute.synchronize()
                values.append(m_l.floats(shape).copy())
        return values

    def enqueue_on(
        self,
        stream: Any,
        image: Any,
        thumbnail: Any,
        window: Any,
        out: Any,
        level: Array | None,
    ) -> Any:
        """Arrays of the GPU in and out, without the host: see Upscaler.enqueue."""
        manifest, side, memory = self._manifest, self.tile_px or 0, self._memory
        handle, cuda, tokens_px = stream_handle(stream), self._cuda, manifest.image.tokens_px
        if manifest.is_guided is (window is None):
            raise UsageError(
                "window: this bundle has a guide, which looks at the photo's centre; give that."
                if manifest.is_guided
                else "window: this bundle has no guide that would look at it; leave it out."
            )
        with contextlib.ExitStack() as keep, cuda.guard():
            tiles = view_array(image, "image", handle, cuda, keep)
            batch = batch_of(tiles, self.batches)
            shape, thumbnail_shape = (batch, 3, side, side), (1, 3, tokens_px, tokens_px)
            source = tiles.check(shape)
            small = view_array(thumbnail, "thumbnail", handle, cuda, keep).check(thumbnail_shape)
            seen = None
            if window is not None:
                seen = view_array(window, "window", handle, cuda, keep)
                seen.check_between(*self._window_limits)
            made = DeviceArray(cuda, shape, handle) if out is None else None
            target = (
                view_array(out, "out", handle, cuda, keep).check(shape, writeable=True)
                if made is None
                else made.address
            )
            # Only its shapes count here: the values are on the GPU already.
            feed = ImageFeed(batch, (side, side), np.empty(thumbnail_shape, np.float32))
            if seen is not None:
                feed.window = np.empty(seen.shape, np.float32)
            with self._whole_or_reset():
                self._bind(feed)
                memory.caller.record(handle)
                memory.compute.wait(memory.caller)
                self._take(memory.once["thumbnail"], small, thumbnail_shape)
                self._enqueue_once("vpim", batch)
                if seen is not None:
                    self._take(memory.once["lq"], seen.address, seen.shape)
                    self._enqueue_once(GUIDE, batch)
                self._set_level(batch, level)
                self._take(memory.tensors["image"], source, shape)
                self._run_stages(adaptive=level is None)
                decoded, nbytes = memory.tensors["decoded"].address, float_bytes(shape)
                cuda.copy(target, decoded, nbytes, "DeviceToDevice", memory.compute)
                if made is not None:
                    made.mark_written(memory.compute)
                memory.caller.record(memory.compute)
                memory.caller.delay(handle)
        return out if made is None else made

    def profile(self, feed: ImageFeed, tile: Array, runs: int) -> dict[str, float]:
        compute, times = self._memory.compute, []
        n = len(self._manifest.levels)
        with self._whole_or_reset(), self._cuda.guard(), contextlib.ExitStack() as keep:
            stamps = [kept(keep, Event(self._cuda, timing=True)) for _ in (*STAGES, "end")]
            self._start(feed, np.full(n, 1 / n, np.float32))
            self._upload(self._memory.slots[0], tile)
            for _ in range(runs + 1):  # the first one warms up
                stamps[0].record(compute)
                for name, stamp in zip(STAGES, stamps[1:], strict=True):
                    self._engines[name].enqueue(compute)
                    stamp.record(compute)
                compute.synchronize()
                times.append([b.ms_since(a) for a, b in zip(stamps, stamps[1:], strict=False)])
        medians = np.median(times[1:], axis=0)
        return {name: float(ms) for name, ms in zip(STAGES, medians, strict=True)}

    def close(self) -> None:
        if self._turn.is_mine:  # from a progress callback: its image ends, and gives all back
            self._closed = True
            return
        with self._turn.taken():
            self._closed = True
            self._give_back()

    def _give_back(self) -> None:
        if self._finalizer.alive:
            release(self._cuda, self._resources)
            self._finalizer.detach()  # not before: without the GPU it can be tried again

    # One image.

    def _bind(self, feed: ImageFeed) -> None:
        """Shapes of this image's graphs; a new tile batch drops the captured graphs."""
        if not self._bound:  # perhaps after an error, where waiting failed as well
            self._memory.drain()
        for name, shapes in input_shapes(self._manifest, feed).items():
            if self._bound.get(name) == shapes:
                continue
            if name in STAGES:
                self._drop_captures()
            self._bound.pop(name, None)
            self._engines[name].bind_shapes(shapes, sides_of(name, feed.batch, feed.tile_hw))
            self._bound[name] = shapes
            key = name, tuple(sorted(shapes.items()))
            if key not in self._compiled:
                self._compiled.add(key)
                self._compiles = True
        self._shapes = {
            tensor.name: tensor.sized(feed.batch, *feed.tile_hw)
            for name in STAGES
            for tensor in self._manifest.graphs[name].outputs
            if tensor.name in DOWN
        }

    def _start(self, feed: ImageFeed, level: Array | None) -> None:
        """Tokens, matrices and level onto the device, once for an image."""
        self._bind(feed)
        self._run_once("vpim", feed, "thumbnail", feed.thumbnail)
        if feed.window is not None:
            self._run_once(GUIDE, feed, "lq", feed.window)
        self._set_level(feed.batch, level)

    def _set_level(self, batch: int, level: Array | None) -> None:
        """The level of what is enqueued from here on; None leaves it to the graphs."""
        memory = self._memory
        if "level" not in memory.tensors:
            return
        if level is not None:
            shape = (batch, len(level))
            host, device = memory.host["level"], memory.tensors["level"]
            memory.level_read.synchronize()  # the former level, where nobody waited for its image
            host.floats(shape)[:] = level
            nbytes = float_bytes(shape)
            self._cuda.copy(device.address, host.address, nbytes, "HostToDevice", memory.compute)
            memory.level_read.record(memory.compute)
        elif self._manifest.is_guided:
            self._repeat(batch, memory.once["adaptive"], memory.tensors["level"])

    def _run_once(self, name: str, feed: ImageFeed, given: str, values: Array) -> None:
        """A graph that looks at the whole image; its outputs stay on the device for every tile."""
        memory, compute = self._memory, self._memory.compute
        memory.once_host[given].floats(values.shape)[:] = values
        target, source = memory.once[given].address, memory.once_host[given].address
        self._cuda.copy(target, source, float_bytes(values.shape), "HostToDevice", compute)
        self._enqueue_once(name, feed.batch)
        outputs = {}
        for tensor in self._manifest.graphs[name].outputs:
            shape = outputs[tensor.name] = tensor.sized(1, 0, 0)
            made, host = memory.once[tensor.name], memory.once_host[tensor.name]
            self._cuda.copy(host.address, made.address, float_bytes(shape), "DeviceToHost", compute)
        compute.synchronize()
        for output, shape in outputs.items():
            check_finite(memory.once_host[output].floats(shape), name)

    def _enqueue_once(self, name: str, batch: int) -> None:
        """A graph that looks at the whole image, whose input is on the device."""
        memory = self._memory
        self._engines[name].enqueue(memory.compute)
        for tensor in self._manifest.graphs[name].outputs:
            if tensor.name in memory.tensors:
                self._repeat(batch, memory.once[tensor.name], memory.tensors[tensor.name])

    def _repeat(self, batch: int, once: DeviceBuffer, target: DeviceBuffer) -> None:
        """An image's row for every tile of the batch."""
        for i in range(batch):
            address = target.address + i * once.nbytes
            self._cuda.copy(
                address, once.address, once.nbytes, "DeviceToDevice", self._memory.compute
            )

    # One tile batch.

    def _submit(self, slot: Slot, image: Array, adaptive: bool) -> None:
        """Enqueue a tile batch; its slot is free, because it was collected."""
        memory = self._memory
        self._upload(slot, image)
        self._run_stages(adaptive)
        nbytes = {name: float_bytes(shape) for name, shape in self._shapes.items()}
        for name in DOWN:
            source = memory.tensors["decoded" if name == "image" else name]
            self._move(slot.device[name], source, nbytes[name])
        slot.computed.record(memory.compute)
        memory.down.wait(slot.computed)
        for name in DOWN:
            target, source = slot.host[name], slot.device[name]
            self._cuda.copy(
                target.address, source.address, nbytes[name], "DeviceToHost", memory.down
            )
        slot.done.record(memory.down)

    def _upload(self, slot: Slot, image: Array) -> None:
        """Tiles to the encoder's input, through the slot."""
        memory, nbytes = self._memory, float_bytes(image.shape)
        host, device = slot.host["image"], slot.device["image"]
        host.floats(image.shape)[:] = image
        self._cuda.copy(device.address, host.address, nbytes, "HostToDevice", memory.up)
        slot.uploaded.record(memory.up)
        memory.compute.wait(slot.uploaded)
        self._move(memory.tensors["image"], device, nbytes)

    def _run_stages(self, adaptive: bool) -> None:
        """The first time as it is, so that TensorRT does what it does lazily; then as a graph."""
        if adaptive in self._ran and adaptive not in self._captured:
            self._captured[adaptive] = self._capture(adaptive)
        captured = self._captured.get(adaptive)
        if captured is not None:
            captured.launch(self._memory.compute)
            return
        self._enqueue_stages(adaptive)
        self._ran.add(adaptive)

    def _capture(self, adaptive: bool) -> CapturedGraph | None:
        compute = self._memory.compute
        refusing = [name for name in STAGES if not self._engines[name].is_capturable(compute)]
        if refusing:
            log.info("no CUDA graph: %s can't be captured", ", ".join(refusing))
            return None
        compute.synchronize()  # nothing of the first run is left to be done
        try:
            return CapturedGraph(self._cuda, compute, lambda: self._enqueue_stages(adaptive))
        except BackendError as exc:  # an engine may hold what no graph can; it runs all the same
            self._cuda.runtime.cudaGetLastError()  # the next launch must not find it
            log.warning("no CUDA graph, launched one by one: %s", str(exc))
            return None

    def _enqueue_stages(self, adaptive: bool) -> None:
        memory = self._memory
        for name in STAGES:
            self._engines[name].enqueue(memory.compute)
            chosen = memory.tensors.get("adaptive") if name == "encoder" and adaptive else None
            if chosen is not None and "level" in memory.tensors:
                nbytes = self._shapes["z_lq"][0] * len(self._manifest.levels) * FLOAT_BYTES
                self._move(memory.tensors["level"], chosen, nbytes)

    def _collect(self, slot: Slot) -> TileOutputs:
        """Wait for a tile batch; the slot is free afterwards."""
        if self._closed:
            raise UsageError("this Upscaler was closed while it ran.")
        slot.done.synchronize()
        z_lq, z_sr, decoded = (slot.host[name].floats(self._shapes[name]) for name in DOWN)
        return TileOutputs(z_lq.copy(), z_sr.copy(), to_pixels(decoded))

    def _move(self, target: DeviceBuffer, source: DeviceBuffer, nbytes: int) -> None:
        """From one buffer of the device to another, in the order of the computing stream."""
        compute = self._memory.compute
        self._cuda.copy(target.address, source.address, nbytes, "DeviceToDevice", compute)

    def _take(self, target: DeviceBuffer, source: int, shape: tuple[int, ...]) -> None:
        """A caller's array on the device, in the order of the computing stream."""
        compute, nbytes = self._memory.compute, float_bytes(shape)
        self._cuda.copy(target.address, source, nbytes, "DeviceToDevice", compute)

    # Afterwards.

    @contextlib.contextmanager
    def _whole_or_reset(self, all_ran: bool = True) -> Iterator[None]:
        """One caller's turn. After an error, or an iterator left early: nothing in flight, and all
        bound anew.

        Once all engines ran with new shapes, what TensorRT-RTX compiled for them is kept: before,
        files would be without it.
        """
        with self._turn.taken():
            if self._closed:
                raise UsageError("this Upscaler is closed; make a new one.")
            try:
                yield
            except BaseException:
                self._reset()
                raise
            finally:
                if self._closed:  # meanwhile, by its own thread
                    self._give_back()
            if all_ran and self._compiles:
                self._compiles = False
                for path, cache in self._caches:  # the next start will be faster
                    write_cache(path, cache)

    def _reset(self) -> None:
        self._bound = {}
        with contextlib.suppress(BackendError), self._cuda.guard():
            try:
                self._memory.drain()
            finally:
                with contextlib.suppress(BackendError):
                    self._drop_captures()
                self._cuda.runtime.cudaGetLastError()  # the next image must not find it

    def _drop_captures(self) -> None:
        self._ran = set()
        drop_graphs(self._captured)
