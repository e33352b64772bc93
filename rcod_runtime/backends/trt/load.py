"""All engines of a set, ready to be bound."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from rcod_runtime.backends.trt.cache import read_cache
from rcod_runtime.backends.trt.cuda import Cuda, DeviceBuffer
from rcod_runtime.backends.trt.engine import LoadedEngine
from rcod_runtime.backends.trt.engines import EngineSet
from rcod_runtime.backends.trt.logger import shared_logger
from rcod_runtime.backends.trt.memory import kept, sides_of
from rcod_runtime.bundle import Bundle
from rcod_runtime.chain import STAGES

Caches = list[tuple[Path, Any]]


def load_engines(
    bundle: Bundle, engines: EngineSet, trt: Any, cuda: Cuda, keep: contextlib.ExitStack
) -> tuple[dict[str, LoadedEngine], Caches]:
    """Engines by their graph, in one arena; with the files that TensorRT-RTX's caches belong to.
    ``keep`` releases them.

    Raises:
        BackendError: the library or the device refuses something.
        EngineMismatch: TensorRT refuses an engine, or it is not of the manifest's graph.
        HashMismatch: an engine's file was changed.
    """
    logger, caches = shared_logger(trt), Caches()
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = False
    loaded: dict[str, LoadedEngine] = {}
    keep.callback(caches.clear)  # after the contexts that use them
    # The largest first: while it is loaded, it needs the most memory beside what is loaded.
    for name, entry in sorted(engines.engines.items(), key=lambda item: -item[1].bytes):
        path, graph = bundle.path(entry.file), bundle.manifest.graphs[name]
        loaded[name] = kept(keep, LoadedEngine(trt, runtime, logger, path, entry, graph))
    for name, engine in loaded.items():
        cache, entry = None, engines.engines[name]
        if engines.target == "tensorrt-rtx":
            cache, path = read_cache(engine, entry, cuda)
            caches.append((path, cache))
        engine.open_context(trt, cache, captured=name in STAGES)
        # What does not fit is refused here, and not with the first image.
        largest = {tensor: shapes[-1] for tensor, shapes in entry.profile.items()}
        tile_hw = engines.tile_px, engines.tile_px
        engine.bind_shapes(largest, sides_of(name, engines.batches[1], tile_hw))
    # One arena: the engines run one after another on one stream, so they share it.
    nbytes = max(engine.scratch_bytes for engine in loaded.values())
    arena = kept(keep, DeviceBuffer(cuda, nbytes))
    for engine in loaded.values():
        engine.use_memory(arena.address, arena.nbytes)
    return loaded, caches
