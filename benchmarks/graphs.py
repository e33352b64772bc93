"""Each graph of a bundle by itself, through the runtime's backends, on inputs that are ready."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rcod_runtime.backends import Array, Session, choose
from rcod_runtime.bundle import open_bundle
from rcod_runtime.levels import level_weights
from rcod_runtime.resample import resize_for_tokens, upsample


def graph_stages(
    bundle_path: Path | None,
    backend_name: str,
    precision: str,
    threads: int,
    lq: npt.NDArray[np.uint8],
    level: str,
) -> dict[str, Callable[[], object]]:
    """A call for each graph, with shapes bound and inputs taken from this image.

    Args:
        lq: (h, w, 3) uint8, processed in one tile.
    """
    bundle = open_bundle(bundle_path)
    contract = bundle.manifest.image
    backend = choose(backend_name, precision, threads)
    size_hw = (lq.shape[0] * contract.scale, lq.shape[1] * contract.scale)
    calls: dict[str, Callable[[], object]] = {}

    def first_run(graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
        session: Session = backend.load(bundle.graph_path(graph))
        session.bind({name: value.shape for name, value in feeds.items()})
        calls[graph] = lambda: session.run(feeds)
        return {name: value.copy() for name, value in session.run(feeds).items()}

    thumbnail = resize_for_tokens(lq, contract.tokens_px)
    tokens = first_run("vpim", {"image": _nchw(thumbnail)})["tokens"]
    z_lq = first_run("encoder", {"image": _nchw(upsample(lq, size_hw))})["z_lq"]
    weights = level_weights(level, bundle.manifest.levels)[None]
    z_sr = first_run("denoiser", {"z_lq": z_lq, "tokens": tokens, "level": weights})["z_sr"]
    first_run("decoder", {"z_sr": z_sr})
    return calls


def _nchw(image: Array) -> Array:
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None] / 127.5 - 1.0, np.float32)
