"""All memory of a chain on a GPU, allocated once for the largest tile batch, at fixed addresses."""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

from rcod_runtime.backends.trt.cuda import Cuda, DeviceBuffer, Event, PinnedBuffer, Stream
from rcod_runtime.backends.trt.engine import LoadedEngine, float_bytes
from rcod_runtime.chain import STAGES
from rcod_runtime.contract import GUIDE
from rcod_runtime.manifest import MAX_GUIDE_PX, Manifest, Tensor

SLOTS = 2
DOWN = ("z_lq", "z_sr", "image")  # what comes down of every tile batch, in TileOutputs' order
ONCE = ("vpim", GUIDE)  # graphs that look at the whole image, once

_Resource = TypeVar("_Resource", bound=Any)


class Slot:
    """Staging of one tile batch: pinned memory, its copies on the device, and events.

    ``image`` goes up and comes down again in the same place.
    """

    def __init__(self, cuda: Cuda, keep: contextlib.ExitStack, nbytes: dict[str, int]) -> None:
        self.host = {name: kept(keep, PinnedBuffer(cuda, n)) for name, n in nbytes.items()}
        self.device = {name: kept(keep, DeviceBuffer(cuda, n)) for name, n in nbytes.items()}
        self.uploaded, self.computed, self.done = (kept(keep, Event(cuda)) for _ in range(3))


class Memory:
    """Streams and buffers; ``keep`` releases them.

    ``tensors``: by the names of the tile graphs' tensors (``decoded`` is the decoder's image);
    ``once``: by those of the graphs that run once for an image (``thumbnail`` is what vpim sees),
    with pinned memory for each in ``once_host``; ``host``: pinned, for small tensors.
    ``level_read``: the pinned level was copied; ``caller``: between a caller's stream and ours.
    """

    def __init__(
        self, cuda: Cuda, keep: contextlib.ExitStack, manifest: Manifest, tile_px: int, batch: int
    ) -> None:
        # One for the engines and one for each direction, so that copies overlap computing.
        self.compute, self.up, self.down = (kept(keep, Stream(cuda)) for _ in range(3))
        self.level_read, self.caller = (kept(keep, Event(cuda)) for _ in range(2))
        sizes = {
            tensor_key(name, tensor): float_bytes(tensor.sized(batch, tile_px, tile_px))
            for name in STAGES
            for tensor in tensors_of(manifest, name)
        }
        self.tensors = {key: kept(keep, DeviceBuffer(cuda, n)) for key, n in sizes.items()}
        self.host = {
            key: kept(keep, PinnedBuffer(cuda, sizes[key]))
            for key in ("level", "m_l")
            if key in sizes
        }
        largest = MAX_GUIDE_PX * manifest.image.scale
        sizes_once = {
            tensor_key(name, tensor): float_bytes(tensor.sized(1, largest, largest))
            for name in ONCE
            for tensor in tensors_of(manifest, name)
        }
        self.once = {key: kept(keep, DeviceBuffer(cuda, n)) for key, n in sizes_once.items()}
        self.once_host = {key: kept(keep, PinnedBuffer(cuda, n)) for key, n in sizes_once.items()}
        staged = {name: sizes[name] for name in DOWN}
        self.slots = [Slot(cuda, keep, staged) for _ in range(SLOTS)]

    def drain(self) -> None:
        """Wait for all that is enqueued."""
        for stream in (self.up, self.compute, self.down):
            stream.synchronize()

    def bind(self, manifest: Manifest, engines: dict[str, LoadedEngine]) -> None:
        """Tell every engine where its tensors lie."""
        for name, engine in engines.items():
            buffers = self.once if name in ONCE else self.tensors
            for tensor in tensors_of(manifest, name):
                engine.bind_address(tensor.name, buffers[tensor_key(name, tensor)].address)


def tensors_of(manifest: Manifest, graph: str) -> tuple[Tensor, ...]:
    """Inputs and outputs of a graph; none of a graph that the bundle has not."""
    if graph not in manifest.graphs:
        return ()
    return (*manifest.graphs[graph].inputs, *manifest.graphs[graph].outputs)


def tensor_key(graph: str, tensor: Tensor) -> str:
    """A name for a buffer: three graphs call something ``image``."""
    own = {("decoder", "image"): "decoded", ("vpim", "image"): "thumbnail"}
    return own.get((graph, tensor.name), tensor.name)


def sides_of(graph: str, batch: int, tile_hw: tuple[int, int]) -> tuple[int, int, int]:
    """Batch, height and width of what a graph gives for a tile batch."""
    return (1 if graph in ONCE else batch, *tile_hw)


def kept(stack: contextlib.ExitStack, resource: _Resource) -> _Resource:
    """Release a resource with the stack."""
    stack.callback(resource.close)
    return resource
