"""Each graph of a bundle by itself, through the runtime's backends, on inputs that are ready."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rcod_runtime import Upscaler
from rcod_runtime.arrays import guide_window
from rcod_runtime.backends import Array, Session, choose
from rcod_runtime.bundle import open_bundle
from rcod_runtime.contract import GUIDE
from rcod_runtime.levels import choice_weights
from rcod_runtime.resample import resize_for_tokens, upsample
from rcod_runtime.tiles import plan_image


def graph_stages(
    bundle_path: Path | None,
    backend_name: str,
    precision: str,
    threads: int,
    lq: npt.NDArray[np.uint8],
    level: str,
    tile_px: int,
) -> dict[str, Callable[[], object]]:
    """A call for each graph, with shapes bound and inputs taken from this image, as the runtime's
    chain does it on a CPU.

    Args:
        lq: (h, w, 3) uint8, processed in one tile.
        tile_px: of the result: the size that graphs are compiled for; an image of another one runs
            on what takes all sizes.
    """
    bundle = open_bundle(bundle_path)
    manifest = bundle.manifest
    contract = manifest.image
    backend = choose(backend_name, precision, threads)
    size_hw = (lq.shape[0] * contract.scale, lq.shape[1] * contract.scale)
    weights = choice_weights(level, manifest)
    made: dict[str, Array] = {}  # what the graphs gave so far
    calls: dict[str, Callable[[], object]] = {}

    def first_run(graph: str, **given: Array) -> None:
        inputs = {**made, **given}
        feeds = {tensor.name: inputs[tensor.name] for tensor in manifest.graphs[graph].inputs}
        common = graph == "vpim" or (graph != GUIDE and size_hw == (tile_px, tile_px))
        session: Session = backend.load(bundle.graph_path(graph))
        session.bind({name: value.shape for name, value in feeds.items()}, common=common)
        calls[graph] = lambda: session.run(feeds)
        made.update({name: value.copy() for name, value in session.run(feeds).items()})

    if manifest.is_guided:
        first_run(GUIDE, lq=guide_window(lq))
    first_run("vpim", image=_nchw(resize_for_tokens(lq, contract.tokens_px)))
    first_run("encoder", image=_nchw(upsample(lq, size_hw)))
    first_run("denoiser", level=made["adaptive"] if weights is None else weights[None])
    first_run("decoder")
    return calls


def _nchw(image: Array) -> Array:
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None] / 127.5 - 1.0, np.float32)


def usual_tile_px(upscaler: Upscaler, side_px: int) -> int:
    """Of the tiles that an upscaler on the CPU makes of a square result by itself; the bundle's
    where that is one tile."""
    image = upscaler.manifest.image
    fit = upscaler._chain.fits_tiles
    size, multiple = (side_px, side_px), image.size_multiple
    plan = plan_image(size, image.tile_px, None, image.overlap_px, multiple, fit)
    return image.tile_px if plan.count == 1 else plan.y.tile_px
