"""What TensorRT-RTX compiled for this GPU, kept between processes.

It lies in the user's cache folder and not beside the engines: it is code, and the bundle's manifest
has no hash of it, so a bundle from elsewhere must not be able to bring one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from rcod_runtime.backends.trt.cuda import Cuda
from rcod_runtime.backends.trt.engine import LoadedEngine
from rcod_runtime.backends.trt.libraries import gpu_name, sm_of
from rcod_runtime.errors import OutputError
from rcod_runtime.files import write_whole
from rcod_runtime.manifest import Engine

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """What belongs to this machine and not into a bundle."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rcod"


def read_cache(engine: LoadedEngine, entry: Engine, cuda: Cuda) -> tuple[Any, Path]:
    """The runtime cache of an engine, filled where this machine has one, and its file.

    TensorRT-RTX checks the content against version, GPU and driver, and refuses another's. So each
    has a file of its own: of two GPUs one would write over the other's at every start. CUDA says of
    a driver only which CUDA it is of.
    """
    machine = f"{gpu_name(cuda.runtime, cuda.index)}, driver {cuda.call('cudaDriverGetVersion')}"
    digest = hashlib.sha256(f"{machine}, {entry.sha256}".encode()).hexdigest()[:32]
    name = f"{entry.version}-sm{sm_of(cuda.runtime, cuda.index)}-{digest}.bin"
    path = cache_folder() / "runtime" / name
    cache = engine.new_cache()
    with contextlib.suppress(OSError):
        if not cache.deserialize(path.read_bytes()):
            log.info("%s: is of another machine or version; made anew", path)
    return cache, path


def write_cache(path: Path, cache: Any) -> None:
    """Keep the cache, whole or not at all; where it can't be written, the next start is slower."""
    serialized = cache.serialize()
    if serialized is None:
        log.info("%s: not kept, TensorRT gives no cache", path)
        return
    data = bytes(serialized)
    try:
        if path.is_file() and path.read_bytes() == data:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, data)
    except OutputError as exc:
        log.info("%s", exc)
    except OSError as exc:
        log.info("%s: can't be written (%s)", path, exc.strerror or exc)
