"""The pipeline: lq image in, sr image out, through the four graphs of a bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from rcod_runtime.arrays import (
    Prepared,
    checked_out,
    checked_shape,
    guide_window,
    host_array,
    prepare_image,
    restore_layout,
    with_hidden_filled,
)
from rcod_runtime.backends import Array
from rcod_runtime.backends.choice import open_chain
from rcod_runtime.bundle import Bundle, open_bundle
from rcod_runtime.chain import STAGES, Chain, ImageFeed, TileOutputs, check_finite
from rcod_runtime.colour import (
    COLOUR_MATCHES,
    DEFAULT_COLOUR_MATCH,
    ColourMatch,
    match_colour,
    store,
)
from rcod_runtime.errors import UsageError
from rcod_runtime.levels import adaptive_level, choice_weights, default_level, level_weights
from rcod_runtime.manifest import Manifest
from rcod_runtime.resample import Resampler, resize_for_tokens
from rcod_runtime.tiles import Blender, TilePlan, is_whole, pad_to, plan_axis, plan_image

log = logging.getLogger(__name__)

MAX_SCALE = 4.0
MAX_OUTPUT_PIXELS = 1_000_000_000
ADAPTIVE_TILES = 16  # looked at to choose the adaptive level of a large image

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Progress = Callable[[int, int], None]


class Upscaler:
    """A bundle, opened and ready.

    One Upscaler may be shared by threads. On the CPU they take turns tile batch by tile batch, on a
    GPU image by image (a progress callback must not call the Upscaler there); what happens around
    the graphs (resampling, blending, colours) overlaps. The same input gives the same bytes on one
    backend and precision.

    Args:
        bundle: folder of a bundle; None is the embedded model.
        device: ``auto``, ``cpu``, or ``cuda:N``. auto takes the bundle's engines where they fit a
            GPU of this machine, otherwise the CPU.
        backend: ``auto``, ``tensorrt``, ``openvino``, ``onnxruntime`` or ``onnxruntime-tensorrt``
            (see rcod_runtime.backends.choice.open_chain).
        precision: ``fp32``; ``bf16`` (openvino, on processors that compute it natively), twice as
            fast and a few grey levels off; or ``auto``, bf16 where that is so and faster, otherwise
            fp32. A GPU computes in the precision of the graphs.
        threads: compute threads, 0 for the backend's choice.
        require_signature: PEM file of the Ed25519 public key that must have signed the bundle.
        tile_px: of the engines, where the bundle has some for several sizes; None: its own.

    After a fork the child can't use it: the backends' threads are not there. A pickled one is made
    again from its arguments where it is loaded, so that processes started by ``spawn`` can take it.

    Raises:
        BundleError: the bundle is missing, not whole, or not valid.
        SignatureError: the bundle is not signed by the required key.
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
        require_signature: Path | str | None = None,
        tile_px: int | None = None,
    ) -> None:
        self._process = os.getpid()
        self._bundle: Bundle = open_bundle(bundle, require_signature)
        self._arguments: dict[str, Any] = {
            "bundle": None if bundle is None else self._bundle.folder,
            "device": device,
            "backend": backend,
            "precision": precision,
            "threads": threads,
            "require_signature": require_signature and Path(require_signature).absolute(),
            "tile_px": tile_px,
        }
        self._chain = open_chain(self._bundle, backend, device, precision, threads, tile_px)
        self._closed = False
        log.info("backend %s", self.backend)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def backend(self) -> str:
        """Name, version and precision of what runs the graphs."""
        return f"{self._chain.name} {self._chain.version} {self._chain.precision}"

    def close(self) -> None:
        """Release the graphs. Twice is harmless; a call afterwards is an error."""
        if os.getpid() != self._process:  # a fork's child: nothing here is its own
            return
        self._closed = True
        self._chain.close()

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
        image: Any,
        realism: str | float | None = None,
        scale: float | None = None,
        out: Pixels | None = None,
        *,
        colour_match: ColourMatch = DEFAULT_COLOUR_MATCH,
        tile_px: int | None = None,
        overlap_px: int | None = None,
        batch: int | None = None,
        progress: Progress | None = None,
    ) -> Pixels:
        """Upscale one image.

        Args:
            image: uint8 or uint16, (H, W) or (H, W, 1) grey, (H, W, 2) grey and alpha, (H, W, 3)
                RGB or (H, W, 4) RGBA; sRGB values, alpha straight. A numpy array, or one of the
                host's memory by DLPack (a torch tensor on the CPU).
            realism: a level's name, ``adaptive`` (the level is chosen from the image, Eq. 5), or a
                number from 0 (fidelity) to 1 (realism). None is neutral, or the middle level of a
                bundle that has no neutral.
            scale: 1 to 4, fractions too; None is the bundle's own (4). The result has exactly
                round(H * scale) x round(W * scale) pixels.
            out: array for the result; without it a fresh one is made, which the caller owns. After
                an error it may hold a part of the result.
            colour_match: how colours are held to the input's (see rcod_runtime.colour).
            tile_px, overlap_px: of tiles in the result; None is the bundle's choice, and on a CPU
                the least that makes no more tiles.
            batch: tiles run together; None is the backend's choice.
            progress: called with (tiles done, tiles in all).

        Returns:
            The result, a numpy array with dtype, channels and dimensions of ``image``.

        Raises:
            UsageError: an argument that can't be used; says which, and what is expected.
            NonFiniteOutput: a graph gave NaN or infinity; names graph, level and tile.
        """
        self._check_usable()
        contract = self.manifest.image
        if not isinstance(colour_match, str) or colour_match not in COLOUR_MATCHES:
            raise UsageError(
                f"colour_match {colour_match!r}: expected one of {', '.join(COLOUR_MATCHES)}."
            )
        if progress is not None and not callable(progress):
            raise UsageError(f"progress {progress!r}: expected a function of two numbers.")
        batch = self._batch(batch)
        realism = default_level(self.manifest.levels) if realism is None else realism
        weights = choice_weights(realism, self.manifest)

        image = host_array(image)
        prepared = prepare_image(image)
        shape = self.output_shape(image.shape, scale)
        height, width = shape[:2]
        out = checked_out(out, shape, image.dtype)
        if np.may_share_memory(image, out):  # at scale 1: still to be read
            prepared = prepare_image(image.copy())
        fit = tile_px is None and self._chain.fits_tiles
        tile_px = self._tile_px(tile_px)
        multiple = self._chain.tile_px or contract.size_multiple
        plan = plan_image((height, width), tile_px, overlap_px, contract.overlap_px, multiple, fit)
        prepared = with_hidden_filled(prepared)
        job = _Job(self._chain, self.manifest, prepared, plan, batch, tile_px)
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

    def output_shape(
        self, image_shape: tuple[int, ...], scale: float | None = None
    ) -> tuple[int, ...]:
        """The shape of the result for an image of a shape (H, W) or (H, W, C); nothing is computed.

        Raises:
            UsageError: no such shape, ``scale`` is not in 1..4, or the result would be too large.
        """
        image_shape = checked_shape(image_shape)
        scale = float(self.manifest.image.scale) if scale is None else _checked_scale(scale)
        height, width = (max(1, round(side * scale)) for side in image_shape[:2])
        if height * width > MAX_OUTPUT_PIXELS:
            raise UsageError(
                f"the result would have {width} x {height} px; the limit is "
                f"{MAX_OUTPUT_PIXELS / 1e6:g} million pixels. Cut the image into parts."
            )
        return height, width, *image_shape[2:]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was made from: graphs and threads stay in this process."""
        if self._closed:
            raise UsageError("this Upscaler is closed; a closed one can't be pickled.")
        return functools.partial(type(self), **self._arguments), ()

    def _check_usable(self) -> None:
        if self._closed:
            raise UsageError("this Upscaler is closed; make a new one.")
        if os.getpid() != self._process:
            raise UsageError(
                "this Upscaler was made before a fork, and its threads are not in this process. "
                'Make one in each process, or start them with multiprocessing\'s "spawn".'
            )

    def enqueue(
        self,
        image: Any,
        thumbnail: Any,
        out: Any = None,
        realism: str | float | None = None,
        stream: Any = 0,
        *,
        window: Any = None,
    ) -> Any:
        """One tile batch that lies on the GPU, to an array on the GPU, on the caller's stream.

        Nothing passes through the host, and the caller's stream is behind the result from here on.
        Nothing is waited for but that the call before this one has read its level. Upsampling,
        tiles, blending and colours are the caller's here, and so is a check for NaN.

        The arrays are of any library with DLPack (torch, CuPy, JAX) or __cuda_array_interface__
        (Numba). The stream waits for what writes them where they say which stream that is. None of
        them is kept after the call: the caller may drop them where their memory is used again in
        the stream's order, as in torch and CuPy.

        Args:
            image: float32 (B, 3, tile, tile) in [-1, 1], upsampled to the output's size, C order.
            thumbnail: float32 (1, 3, tokens, tokens) in [-1, 1]: the whole photo at the manifest's
                tokens_px.
            out: float32, shape of ``image``: receives the result in [-1, 1]. Without it an array is
                made, which costs an allocation here and a wait for the GPU when it is dropped.
            realism: as in a call; but ``adaptive`` chooses for each tile by itself, where no guide
                sees the photo: tiles that will lie side by side want one level.
            stream: CUDA's handle of the caller's stream: a number or what stands for one.
            window: for a bundle with a guide (rcod-s), float32 (1, 3, h, w) in [0, 1]: the photo
                before upsampling, of a larger one the centre of 512 px a side. The guide runs on
                the GPU; as tokens, its matrices are made anew in every call.

        Returns:
            ``out``, or the new array, which has DLPack and __cuda_array_interface__ and is its
            holder's: it outlives the Upscaler.

        Raises:
            UsageError: no engines are in use, or an array can't be used; says what is expected.
            BackendError: the device refuses something.
        """
        self._check_usable()
        run = getattr(self._chain, "enqueue_on", None)
        if run is None:
            raise UsageError(
                f"arrays on the GPU need the bundle's engines, {self.backend} is in use. "
                'Open it with backend="tensorrt".'
            )
        weights = choice_weights(realism, self.manifest)
        return run(stream, image, thumbnail, window, out, weights)

    def warmup(self, batch: int | None = None) -> None:
        """Do now what the first images would wait for: compiling, capturing, for single tiles and
        for full batches; on a CPU for tiles of any size too."""
        height, width = self._tile_lq()
        if self._chain.fits_tiles:
            self(np.zeros((height // 2, width, 3), np.uint8), self.manifest.levels[0].name)
        for tiles in sorted({self._chain.batches[0], self._batch(batch)}):
            image = np.zeros((height, width * tiles, 3), np.uint8)  # one tile batch
            for _ in range(2):  # the first run of an engine is as it is, the second is captured
                self(image, self.manifest.levels[0].name, overlap_px=0, batch=tiles)

    def profile(self, runs: int = 10, batch: int | None = None) -> dict[str, float]:
        """Median milliseconds of encoder, denoiser and decoder for one tile batch; on a GPU by
        events on the stream that computes, without copies."""
        self._check_usable()
        if not isinstance(runs, int) or runs < 1:
            raise UsageError(f"runs {runs!r}: expected an integer of at least 1.")
        chain, manifest = self._chain, self.manifest
        side = self._tile_px(None)
        batch = self._batch(batch)
        prepared = prepare_image(np.full((*self._tile_lq(), 3), 128, np.uint8))
        axis = plan_axis(side, side, 0, manifest.image.size_multiple)
        job = _Job(chain, manifest, prepared, TilePlan(axis, axis), batch, side)
        feed = dataclasses.replace(job.feed, batch=batch)
        return chain.profile(feed, np.zeros((batch, 3, side, side), np.float32), runs)

    def _tile_lq(self) -> tuple[int, int]:
        """(H, W) of an input that fills one tile."""
        side = self._tile_px(None) // self.manifest.image.scale
        return side, side

    def _batch(self, batch: int | None) -> int:
        low, high = self._chain.batches
        if batch is None:
            return self._chain.batch
        if not is_whole(batch) or not 1 <= batch <= high:
            raise UsageError(f"batch {batch!r}: expected an integer in 1..{high}.")
        return max(low, int(batch))

    def _tile_px(self, tile_px: int | None) -> int:
        only = self._chain.tile_px
        if tile_px is None:
            return only or self.manifest.image.tile_px
        if only is not None and tile_px != only:
            raise UsageError(
                f"tile size {tile_px} px: the engines in use are for {only} px. Open the bundle "
                f"with tile_px={tile_px}, for engines of rcod-export engines --tile {tile_px}."
            )
        return tile_px


class _Job:
    """One image on its way through the graphs."""

    def __init__(
        self,
        chain: Chain,
        manifest: Manifest,
        image: Prepared,
        plan: TilePlan,
        batch: int,
        tile_px: int,
    ) -> None:
        self.chain, self.manifest, self.plan = chain, manifest, plan
        self.batch = max(chain.batches[0], plan.batch(batch))
        size = plan.y.length_px, plan.x.length_px
        self.resampler = Resampler(image.lq, size, image.unit / 127.5, -1.0)
        small = resize_for_tokens(image.lq, manifest.image.tokens_px, image.unit)
        small = small.transpose(2, 0, 1)[None]
        self.feed = ImageFeed(
            self.batch,
            (plan.y.tile_px, plan.x.tile_px),
            np.ascontiguousarray(small / 127.5 - 1.0, np.float32),
            guide_window(image.lq) if manifest.is_guided else None,
            common_tile=plan.y.tile_px == plan.x.tile_px == tile_px,
        )

    def run(
        self, sr: Pixels, weights: Array | None, realism: str, progress: Progress | None
    ) -> None:
        """All tiles into ``sr`` (H, W, 3), uint8 or uint16; weights None: the graphs' choice."""
        plan = self.plan
        gain = np.float32(np.iinfo(sr.dtype).max / 255)
        blender = Blender(plan, 3)
        done = 0
        tiles = (self._tiles([(row, x) for x in columns]) for row, columns in self._chunks())
        with contextlib.closing(self.chain.run(self.feed, weights, tiles)) as results:
            for (row, columns), outputs in zip(self._chunks(), results, strict=True):
                _check_tile(outputs, realism, row, columns[0])
                for column, tile in zip(columns, outputs.pixels, strict=False):
                    blender.add(row, column, tile)
                done += len(columns)
                if progress is not None:
                    progress(done, plan.count)
                if columns[-1] == len(plan.x.starts) - 1:
                    for top, rows in blender.finish_row(row):
                        for c in range(3):
                            if gain != 1:
                                rows[:, :, c] *= gain
                            store(rows[:, :, c], sr[top : top + len(rows), :, c])

    def adaptive_weights(self) -> Array:
        """One-hot weights of the level that Eq. 5 gives for the mean of M over the image."""
        chosen = self.plan.spread(ADAPTIVE_TILES)
        count = len(chosen)
        tiles = (self._tiles(chosen[i : i + self.batch]) for i in range(0, count, self.batch))
        estimates = np.concatenate(self.chain.estimate(self.feed, tiles))
        check_finite(estimates, STAGES[0], ", realism adaptive")
        m_l = float(np.mean(estimates[:count]))
        manifest = self.manifest
        level = adaptive_level(m_l, manifest.metric, manifest.levels)
        log.info("adaptive: M is estimated at %.3f, level %s", m_l, level.name)
        return level_weights(level.name, manifest.levels)

    def _chunks(self) -> Iterator[tuple[int, list[int]]]:
        """Tile batches as (row, columns), row by row."""
        columns = list(range(len(self.plan.x.starts)))
        for row in range(len(self.plan.y.starts)):
            for first in range(0, len(columns), self.batch):
                yield row, columns[first : first + self.batch]

    def _tiles(self, positions: list[tuple[int, int]]) -> Array:
        """Upsampled input of the tiles in these rows and columns, (batch, 3, h, w) in [-1, 1]; a
        short batch is filled up."""
        y, x = self.plan.y, self.plan.x
        image = np.empty((self.batch, 3, y.tile_px, x.tile_px), np.float32)
        for i in range(self.batch):
            row, column = positions[min(i, len(positions) - 1)]
            height, width = y.valid(row), x.valid(column)
            box = y.starts[row], x.starts[column], height, width
            if (height, width) == image.shape[2:]:
                self.resampler.box(*box, out=image[i])
            else:
                tile = pad_to(self.resampler.box(*box), y.tile_px, x.tile_px)
                image[i] = tile.transpose(2, 0, 1)
        return image


def _check_tile(outputs: TileOutputs, realism: str, row: int, column: int) -> None:
    where = f", realism {realism}, tile row {row}, column {column}"
    for graph, values in zip(STAGES, outputs, strict=True):
        check_finite(values, graph, where)


def _checked_scale(scale: float) -> float:
    number = isinstance(scale, (int, float, np.floating, np.integer))
    if isinstance(scale, bool) or not number or not 1.0 <= scale <= MAX_SCALE:
        raise UsageError(f"scale {scale!r}: expected a number in 1..{MAX_SCALE:g}.")
    return float(scale)
