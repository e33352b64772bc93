"""The pipeline: lq image in, sr image out, through the four graphs of a bundle."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from rcod_runtime.arrays import Prepared, guide_window, prepare_image, restore_layout
from rcod_runtime.backends import Array, Session, Shapes, choose
from rcod_runtime.bundle import Bundle, open_bundle
from rcod_runtime.colour import (
    COLOUR_MATCHES,
    DEFAULT_COLOUR_MATCH,
    ColourMatch,
    match_colour,
)
from rcod_runtime.errors import NonFiniteOutput, UsageError
from rcod_runtime.levels import ADAPTIVE, adaptive_level, level_weights
from rcod_runtime.manifest import GUIDE, Manifest
from rcod_runtime.resample import Resampler, resize_for_tokens
from rcod_runtime.tiles import Blender, TilePlan, pad_to, plan_axis

log = logging.getLogger(__name__)

MAX_SCALE = 4.0
MAX_OUTPUT_PIXELS = 1_000_000_000
ADAPTIVE_TILES = 16  # looked at to choose the adaptive level of a large image

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Progress = Callable[[int, int], None]


class Upscaler:
    """A bundle, opened and ready.

    One Upscaler may be shared by threads: it runs one tile batch at a time, and what happens around
    the graphs (resampling, blending, colours) overlaps. The same input gives the same bytes on one
    backend and precision.

    Args:
        bundle: folder of a bundle; None is the embedded model.
        device: ``auto`` or ``cpu``.
        backend: ``auto``, ``openvino`` or ``onnxruntime``.
        precision: ``fp32``; ``bf16`` (openvino, on processors that compute it natively), twice as
            fast and a few grey levels off; or ``auto``, bf16 where that is so, otherwise fp32.
        threads: compute threads, 0 for the backend's choice.

    Raises:
        BundleError: the bundle is missing, not whole, or not valid.
        BackendError: the backend is not installed or refuses a graph.
        UsageError: an unknown device, backend or precision.
    """

    def __init__(
        self,
        bundle: Path | str | None = None,
        device: str = "auto",
        backend: str = "auto",
        *,
        precision: str = "auto",
        threads: int = 0,
    ) -> None:
        self._bundle: Bundle = open_bundle(bundle)
        self._backend = choose(backend, device, precision, threads)
        graphs = self._bundle.manifest.graphs
        paths = {name: self._bundle.graph_path(name) for name in graphs}
        # The largest first: while it is loaded, it needs the most memory beside what is loaded.
        sizes = {name: self._bundle.graph_bytes(name) for name in graphs}
        self._sessions: dict[str, Session] = {
            name: self._backend.load(paths[name])
            for name in sorted(graphs, key=lambda name: -sizes[name])
        }
        self._bound: Shapes = {}
        self._lock = threading.Lock()
        self._closed = False
        log.info("backend %s", self.backend)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def backend(self) -> str:
        """Name, version and precision of what runs the graphs."""
        return f"{self._backend.name} {self._backend.version} {self._backend.precision}"

    def close(self) -> None:
        """Release the graphs. Twice is harmless; a call afterwards is an error."""
        with self._lock:
            self._closed = True
            self._sessions = {}

    def __enter__(self) -> Upscaler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(
        self,
        image: npt.NDArray[Any],
        realism: str | float = "neutral",
        scale: float | None = None,
        out: Pixels | None = None,
        *,
        colour_match: ColourMatch = DEFAULT_COLOUR_MATCH,
        tile_px: int | None = None,
        overlap_px: int | None = None,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> Pixels:
        """Upscale one image.

        Args:
            image: uint8 or uint16, (H, W) or (H, W, 1) grey, (H, W, 2) grey and alpha, (H, W, 3)
                RGB or (H, W, 4) RGBA; sRGB values.
            realism: a level's name, ``adaptive`` (the level is chosen from the image, Eq. 5), or a
                number from 0 (fidelity) to 1 (realism).
            scale: 1 to 4, fractions too; None is the bundle's own (4). The result has exactly
                round(H * scale) x round(W * scale) pixels.
            out: array for the result; without it a fresh one is made, which the caller owns.
            colour_match: how colours are held to the input's (see rcod_runtime.colour).
            tile_px, overlap_px: of tiles in the result; None is the bundle's choice.
            batch: tiles run together.
            progress: called with (tiles done, tiles in all).

        Returns:
            The result, with dtype, channels and dimensions of ``image``.

        Raises:
            UsageError: an argument that can't be used; says which, and what is expected.
            NonFiniteOutput: a graph gave NaN or infinity; names graph, level and tile.
        """
        if self._closed:
            raise UsageError("this Upscaler is closed; make a new one.")
        contract = self.manifest.image
        scale = float(contract.scale) if scale is None else _checked_scale(scale)
        if colour_match not in COLOUR_MATCHES:
            raise UsageError(
                f"colour_match {colour_match!r}: expected one of {', '.join(COLOUR_MATCHES)}."
            )
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= 64:
            raise UsageError(f"batch {batch!r}: expected an integer in 1..64.")
        weights = None
        if realism == ADAPTIVE:
            if not self.manifest.has_metric_estimator:
                raise UsageError(
                    f"realism adaptive: the bundle {self.manifest.identity.name} has no metric "
                    "estimation module. Choose a level or a number in [0, 1]."
                )
        else:
            weights = level_weights(realism, self.manifest.levels)

        prepared = prepare_image(image)
        height, width = (max(1, round(side * scale)) for side in prepared.lq.shape[:2])
        if height * width > MAX_OUTPUT_PIXELS:
            raise UsageError(
                f"the result would have {width} x {height} px; the limit is "
                f"{MAX_OUTPUT_PIXELS / 1e6:g} million pixels. Cut the image into parts."
            )
        if out is not None and np.may_share_memory(image, out):  # at scale 1: still to be read
            prepared = prepare_image(image.copy())
        out = _checked_out(out, (height, width, *image.shape[2:]), image.dtype)
        tile_px = contract.tile_px if tile_px is None else tile_px
        overlap_px = min(contract.overlap_px, tile_px // 2) if overlap_px is None else overlap_px
        y, x = (
            plan_axis(side, tile_px, overlap_px, contract.size_multiple) for side in (height, width)
        )
        job = _Job(self, prepared, TilePlan(y, x), batch)
        # A guide sees the whole image, and so does a single tile: there the graphs choose.
        if weights is None and job.plan.count > 1 and not self.manifest.is_guided:
            weights = job.adaptive_weights()
        direct = out.ndim == 3 and out.shape[2] == 3
        sr = out if direct else np.empty((height, width, 3), image.dtype)
        job.run(sr, weights, str(realism), progress)
        match_colour(sr, prepared.lq, colour_match)
        if not direct:
            restore_layout(sr, prepared, out)
        return out

    def _run(self, name: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run a bound graph; the caller holds the lock."""
        return self._sessions[name].run(feeds)

    def _bind(self, batch: int, tile_hw: tuple[int, int], window: Array | None) -> None:
        """Make all graphs ready for a tile shape and for the guide's window; the caller holds the
        lock."""
        shapes = self._shapes(batch, tile_hw)
        if window is not None:
            shapes[GUIDE] = {"lq": window.shape}
        if shapes == self._bound:
            return
        with ThreadPoolExecutor(len(shapes)) as pool:  # compiling releases the GIL
            list(pool.map(lambda name: self._sessions[name].bind(shapes[name]), shapes))
        self._bound = shapes

    def _shapes(self, batch: int, tile_hw: tuple[int, int]) -> dict[str, Any]:
        """Input shapes of every graph; the tokens are the image's, so their graph runs once."""
        return {
            name: {
                tensor.name: tensor.sized(1 if name == "vpim" else batch, *tile_hw)
                for tensor in graph.inputs
            }
            for name, graph in self.manifest.graphs.items()
            if name != GUIDE
        }


class _Job:
    """One image on its way through the graphs."""

    def __init__(self, upscaler: Upscaler, image: Prepared, plan: TilePlan, batch: int) -> None:
        self.upscaler, self.plan = upscaler, plan
        self.batch = min(batch, plan.count)
        self.image = image
        self.resampler = Resampler(image.lq, (plan.y.length_px, plan.x.length_px), image.unit)
        self.tokens: Array | None = None
        self.window = guide_window(image.lq) if upscaler.manifest.is_guided else None
        self.guided: dict[str, Array] = {}  # what the guide says of the image, for every tile

    def run(
        self, sr: Pixels, weights: Array | None, realism: str, progress: Progress | None
    ) -> None:
        """All tiles into ``sr`` (H, W, 3), uint8 or uint16; weights None: the encoder's choice."""
        plan = self.plan
        gain = np.iinfo(sr.dtype).max / 255.0
        blender = Blender(plan, 3)
        done = 0
        for row in range(len(plan.y.starts)):
            for columns in self._chunks(row):
                tiles = self._upscaled(row, columns, weights, realism)
                for column, tile in zip(columns, tiles, strict=False):
                    blender.add(row, column, tile)
                done += len(columns)
                if progress is not None:
                    progress(done, plan.count)
            for top, rows in blender.finish_row(row):
                sr[top : top + len(rows)] = np.rint(np.clip(rows, 0.0, 255.0) * gain)

    def adaptive_weights(self) -> Array:
        """One-hot weights of the level that Eq. 5 gives for the mean of M over the image."""
        positions = self.plan.positions()
        count = min(ADAPTIVE_TILES, len(positions))
        chosen = [positions[i * len(positions) // count] for i in range(count)]
        values = []
        for row, column in chosen:
            with self.upscaler._lock:
                self._prepare()
                image = self._tiles(row, [column])
                outputs = self.upscaler._run("encoder", {"image": image})
                values.append(float(outputs["m_l"][0]))
        manifest = self.upscaler.manifest
        level = adaptive_level(float(np.mean(values)), manifest.metric, manifest.levels)
        log.info("adaptive: M is estimated at %.3f, level %s", np.mean(values), level.name)
        return level_weights(level.name, manifest.levels)

    def _chunks(self, row: int) -> Iterator[list[int]]:
        columns = list(range(len(self.plan.x.starts)))
        for first in range(0, len(columns), self.batch):
            yield columns[first : first + self.batch]

    def _tiles(self, row: int, columns: list[int]) -> Array:
        """Upsampled input of tiles, (batch, 3, h, w) in [-1, 1]; a short batch is filled up."""
        y, x = self.plan.y, self.plan.x
        image = np.empty((self.batch, 3, y.tile_px, x.tile_px), np.float32)
        for i in range(self.batch):
            column = columns[min(i, len(columns) - 1)]
            box = (y.starts[row], x.starts[column], y.valid(row), x.valid(column))
            tile = pad_to(self.resampler.box(*box), y.tile_px, x.tile_px)
            np.multiply(tile.transpose(2, 0, 1), 1 / 127.5, out=image[i])
        image -= 1.0
        return image

    def _prepare(self) -> None:
        """Bind the graphs to this image, compute its tokens and matrices; under the lock."""
        tile_hw = (self.plan.y.tile_px, self.plan.x.tile_px)
        self.upscaler._bind(self.batch, tile_hw, self.window)
        if self.tokens is None:
            side = self.upscaler.manifest.image.tokens_px
            small = resize_for_tokens(self.image.lq, side, self.image.unit)
            small = small.transpose(2, 0, 1)[None] / 127.5 - 1.0
            feeds = {"image": np.ascontiguousarray(small, np.float32)}
            tokens = self.upscaler._run("vpim", feeds)["tokens"]
            _check_finite(tokens, "vpim", "any", None)
            self.tokens = np.repeat(tokens, self.batch, axis=0)
            if self.window is not None:
                for name, values in self.upscaler._run(GUIDE, {"lq": self.window}).items():
                    _check_finite(values, GUIDE, "any", None)
                    self.guided[name] = np.repeat(values, self.batch, axis=0)

    def _matrices(self, network: str) -> dict[str, Array]:
        name = f"{network}_matrices"
        return {name: self.guided[name]} if self.guided else {}

    def _upscaled(
        self, row: int, columns: list[int], weights: Array | None, realism: str
    ) -> list[npt.NDArray[np.float32]]:
        """Tiles as (h, w, 3) float32 in 0..255."""
        image = self._tiles(row, columns)
        upscaler = self.upscaler
        where = (row, columns[0])
        with upscaler._lock:
            if upscaler._closed:
                raise UsageError("this Upscaler was closed while it ran.")
            self._prepare()
            assert self.tokens is not None
            feeds = {"image": image, **self._matrices("vae")}
            encoded = upscaler._run("encoder", feeds)
            z_lq = encoded["z_lq"]
            _check_finite(z_lq, "encoder", realism, where)
            feeds = {"z_lq": z_lq, "tokens": self.tokens, **self._matrices("unet")}
            if len(upscaler.manifest.levels) > 1:  # with one there is nothing to choose
                feeds["level"] = (
                    (self.guided or encoded)["adaptive"]
                    if weights is None
                    else np.repeat(weights[None], self.batch, axis=0)
                )
            z_sr = upscaler._run("denoiser", feeds)["z_sr"]
            _check_finite(z_sr, "denoiser", realism, where)
            decoded = upscaler._run("decoder", {"z_sr": z_sr})["image"]
            _check_finite(decoded, "decoder", realism, where)
            sr = (decoded.transpose(0, 2, 3, 1) + 1.0) * np.float32(127.5)
        return list(sr)


def _check_finite(values: Array, graph: str, realism: str, tile: tuple[int, int] | None) -> None:
    if not np.isfinite(values).all():
        where = "" if tile is None else f", tile row {tile[0]}, column {tile[1]}"
        raise NonFiniteOutput(
            f"graph {graph}, realism {realism}{where}: gave NaN or infinity; nothing was written. "
            "Try precision fp32, or check the bundle: rcod-doctor --bundle DIR"
        )


def _checked_scale(scale: float) -> float:
    number = isinstance(scale, (int, float, np.floating, np.integer))
    if isinstance(scale, bool) or not number or not 1.0 <= scale <= MAX_SCALE:
        raise UsageError(f"scale {scale!r}: expected a number in 1..{MAX_SCALE:g}.")
    return float(scale)


def _checked_out(out: Pixels | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Pixels:
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != dtype:
        found = f"{out.shape} {out.dtype}" if isinstance(out, np.ndarray) else type(out).__name__
        raise UsageError(f"out: expected an array {shape} {dtype}, found {found}.")
    if not out.flags.writeable:
        raise UsageError("out: expected a writeable array, found a read-only one.")
    return out
