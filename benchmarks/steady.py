"""The variants that are timed against each other, opened and checked to compute the same thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.eager import MODES, NO_GUIDE, EagerPipeline, Mode, ModeMissing
from benchmarks.errors import BenchmarkError
from benchmarks.graphs import graph_stages, usual_tile_px
from benchmarks.picture import draw_picture
from rcod_runtime import Upscaler, UsageError
from rcod_runtime.levels import choice_weights
from rcod_runtime.manifest import ImageContract, Manifest

Image = npt.NDArray[np.uint8]
Call = Callable[[], object]

# A bundle and the checkpoint it was made from agree far better, two trainings far worse.
SAME_MODEL_PSNR_DB = 40.0


@dataclass(frozen=True)
class Comparison:
    """One model on one image through several libraries. ``checkpoint`` None: no baseline.
    ``batch``: of several square tiles that lie beside each other in the image and run together; of
    1 the image is upscaled as rcod-upscale does it, in the bundle's tiles."""

    bundle: Path | None
    checkpoint: Path | None
    side_px: int
    level: str
    variants: tuple[tuple[str, str], ...]  # backend and precision; the first one is the reference
    threads: int
    modes: tuple[Mode, ...] = MODES  # of PyTorch
    batch: int = 1

    def command_options(self) -> list[str]:
        """The same choice as options of rcod-upscale, in the precision it takes by itself."""
        options = ["--realism", self.level, "--backend", self.variants[0][0]]
        options += ["--threads", str(self.threads)]
        return options if self.bundle is None else [*options, "--bundle", str(self.bundle)]

    def tile_px(self, contract: ImageContract) -> int:
        """Of tiles in the result; an image smaller than one is a tile of its own size."""
        return contract.tile_px if self.batch == 1 else self.side_px * contract.scale


@dataclass(frozen=True)
class Agreement:
    """How alike the images of two variants are, 8 bit. ``psnr_db`` is inf for equal ones."""

    a: str
    b: str
    psnr_db: float
    max_abs_u8: int


@dataclass(frozen=True)
class Opened:
    """Variants, ready: ``whole`` by name, ``stages()``, of one tile, by graph and then by
    name.

    ``missing`` says of a variant why this machine hasn't it; ``first_call_ms`` is each one's very
    first image, with whatever is compiled or reordered at first use.
    """

    model: dict[str, Any]
    whole: dict[str, Call]
    agreements: tuple[Agreement, ...]
    first_call_ms: dict[str, float]
    missing: dict[str, str]
    tile_px: int
    stages: Callable[[], dict[str, dict[str, Call]]]


def check_comparable(comparison: Comparison, manifest: Manifest) -> None:
    """Fail before anything is loaded.

    Raises:
        UsageError: a level that the bundle hasn't, or a size that does not fit its grid; beside a
            checkpoint, a bundle with a guide or a size of several tiles, which PyTorch has not.
    """
    contract = manifest.image
    choice_weights(comparison.level, manifest)
    if comparison.side_px * contract.scale % contract.size_multiple:
        step = contract.size_multiple // contract.scale
        raise UsageError(
            f"--size {comparison.side_px}: expected a multiple of {step} px, so that no "
            "variant works on padding."
        )
    if comparison.checkpoint is None:
        return
    if manifest.is_guided:
        raise UsageError(NO_GUIDE)
    most_px = comparison.tile_px(contract) // contract.scale
    if comparison.side_px > most_px:
        raise UsageError(
            f"--size {comparison.side_px}: the bundle makes several tiles of it, PyTorch one. "
            f"Expected at most {most_px} px beside --checkpoint; without, any size is measured."
        )


@contextmanager
def open_comparison(comparison: Comparison) -> Iterator[Opened]:
    """Load every variant of what ``check_comparable`` lets pass, and run it once.

    Raises:
        BenchmarkError: bundle and checkpoint are not the same model.
        RcodError: what loading a bundle, a backend or a checkpoint raises.
    """
    lq = draw_picture(comparison.side_px, comparison.side_px * comparison.batch)
    whole: dict[str, Callable[[], Image]] = {}
    with ExitStack() as stack:
        for backend, precision in comparison.variants:
            upscaler = stack.enter_context(
                Upscaler(
                    comparison.bundle,
                    "cpu",
                    backend,
                    precision=precision,
                    threads=comparison.threads,
                )
            )
            whole[f"{backend} {precision}"] = _runtime_call(upscaler, lq, comparison)
        manifest = upscaler.manifest
        scale, compiled_px = manifest.image.scale, comparison.tile_px(manifest.image)
        tile_px = compiled_px
        if comparison.batch == 1:
            tile_px = usual_tile_px(upscaler, comparison.side_px * scale)
        tile_side = min(comparison.side_px, tile_px // scale)
        tile = lq[:tile_side, :tile_side]
        eager: dict[str, EagerPipeline] = {}
        missing: dict[str, str] = {}
        for mode in comparison.modes if comparison.checkpoint is not None else ():
            assert comparison.checkpoint is not None
            try:
                eager[mode.name] = EagerPipeline(
                    comparison.checkpoint, manifest, comparison.level, comparison.threads, mode
                )
            except ModeMissing as why:
                missing[mode.name] = str(why)
                continue
            whole[mode.name] = _eager_call(eager[mode.name], lq, comparison.batch)
        first_images, first_call_ms = _first_calls(whole)

        def stages() -> dict[str, dict[str, Call]]:
            by_variant = {
                f"{backend} {precision}": graph_stages(
                    comparison.bundle,
                    backend,
                    precision,
                    comparison.threads,
                    tile,
                    comparison.level,
                    compiled_px,
                )
                for backend, precision in comparison.variants
            }
            by_variant.update({name: pipeline.stages(tile) for name, pipeline in eager.items()})
            graphs = next(iter(by_variant.values()))
            return {
                graph: {name: calls[graph] for name, calls in by_variant.items()}
                for graph in graphs
            }

        model = {
            "name": manifest.identity.name,
            "family": manifest.identity.family,
            "graph_sha256": {n: graph.content_sha256 for n, graph in manifest.graphs.items()},
            "graph_precision": {
                name: graph.precision.value for name, graph in manifest.graphs.items()
            },
        }
        agreements = _compare(first_images)
        yield Opened(model, dict(whole), agreements, first_call_ms, missing, tile_px, stages)


def _runtime_call(upscaler: Upscaler, lq: Image, comparison: Comparison) -> Callable[[], Image]:
    options: dict[str, Any] = {}
    if comparison.batch > 1:
        tile_px = comparison.tile_px(upscaler.manifest.image)
        options = {"tile_px": tile_px, "overlap_px": 0, "batch": comparison.batch}

    def call() -> Image:
        sr: Image = upscaler(lq, comparison.level, **options).astype(np.uint8, copy=False)
        return sr

    return call


def _eager_call(pipeline: EagerPipeline, lq: Image, batch: int) -> Callable[[], Image]:
    return lambda: pipeline(lq, batch)


def _first_calls(
    variants: dict[str, Callable[[], Image]],
) -> tuple[dict[str, Image], dict[str, float]]:
    """Each variant's first image, and the milliseconds until it was there."""
    images, times_ms = {}, {}
    for name, call in variants.items():
        begin = time.perf_counter()
        images[name] = call()
        times_ms[name] = (time.perf_counter() - begin) * 1e3
    return images, times_ms


def _compare(images: dict[str, Image]) -> tuple[Agreement, ...]:
    """Every variant's image against the first one's."""
    first, *others = images
    agreements = []
    for name in others:
        difference = images[first].astype(np.int16) - images[name].astype(np.int16)
        error = float(np.mean(difference.astype(np.float64) ** 2))
        psnr_db = float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))
        if psnr_db < SAME_MODEL_PSNR_DB:
            raise BenchmarkError(
                f"{first} and {name}: expected the same image within {SAME_MODEL_PSNR_DB:g} dB, "
                f"found {psnr_db:.1f} dB. Give the checkpoint that the bundle was exported from."
            )
        agreements.append(Agreement(first, name, psnr_db, int(np.abs(difference).max())))
    return tuple(agreements)
