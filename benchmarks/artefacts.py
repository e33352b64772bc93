"""What averages hide: seams between tiles, shifted colours, grids.

  python -m benchmarks.artefacts PHOTOS

The centre of each photo in a folder is upscaled at each level, in the bundle's tiles and in one.

seams: the mean difference of neighbours in luma across the lines where a tile begins or ends, over
  that on all other lines; over that on other lines at the same places of the grid below; and over
  that on the same lines of the image made in one tile, where what is in the photos has no part.
apart: the mean difference in luma, of 255, between the averages of 8x8 pixels in the tiled image
  and in the one made in one tile, where tiles overlap: tiles that disagree there fade into each
  other without a line.
colours: how far an image's channels are from the input's in the mean, of 255.
grid: of the eight lines that the decoder makes of one place of the latent, the strongest in luma's
  differences, over the mean of all; bicubic's stands beside it.

Prints a machine card, a table and one JSON document as the last line. Exit codes: those of
rcod-upscale, and 1 where seams, tiles apart or colours are beyond their limits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import report
from benchmarks.command import Verdict, check_at_least_1, run_command
from benchmarks.errors import DatasetError
from benchmarks.graphs import usual_tile_px
from benchmarks.pairs import images_by_stem, read_rgb
from benchmarks.scores import bicubic
from rcod_runtime import Upscaler, UsageError
from rcod_runtime.tiles import plan_axis
from rcod_train.quality.metrics import luma

SCHEMA_VERSION = 1
# Of apart and colours: one step of 8 bits, the smallest that a screen shows.
LIMITS = {
    "seams": 1.1,
    "seams_same_places": 1.1,
    "seams_one_tile": 1.1,
    "apart": 1.0,
    "colours": 1.0,
}
PLACE_PX = 8  # of the result, to one place of the latent

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ArtefactsConfig:
    photos: Path
    bundle: Path | None
    levels: tuple[str, ...]
    crop_px: int
    tile_px: int | None
    limit: int


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.artefacts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("photos", type=Path, metavar="PHOTOS", help="a folder of images to upscale")
    add("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    add("--levels", nargs="+", default=["fidelity", "neutral", "realism"], metavar="LEVEL")
    add("--crop", type=int, default=256, metavar="PX", help="side (default: %(default)s)")
    add("--tile", type=int, metavar="PX", help="of the result; default: as rcod-upscale")
    add("--limit", type=int, default=20, metavar="N", help="of photos (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(_config(arguments)), arguments.json)


def _config(arguments: argparse.Namespace) -> ArtefactsConfig:
    check_at_least_1(arguments, "crop", "tile", "limit")
    return ArtefactsConfig(
        arguments.photos,
        arguments.bundle,
        tuple(arguments.levels),
        arguments.crop,
        arguments.tile,
        arguments.limit,
    )


def run(config: ArtefactsConfig) -> Verdict:
    """Measure, print card and table, and return the JSON document with its verdict."""
    card = report.machine_card()
    paths = list(images_by_stem(config.photos).values())[: config.limit]
    crops = [centre(read_rgb(path), config.crop_px) for path in paths]
    crops = [crop for crop in crops if min(crop.shape[:2]) == config.crop_px]
    if not crops:
        raise DatasetError(
            f"{config.photos}: expected images of at least {config.crop_px} px a side, found none. "
            "Choose a smaller --crop."
        )
    with Upscaler(config.bundle, "cpu") as upscaler:
        contract = upscaler.manifest.image
        side = contract.scale * config.crop_px
        tile_px = config.tile_px or usual_tile_px(upscaler, side)
        overlap_px = min(contract.overlap_px, tile_px // 2)
        lines = seam_lines(side, tile_px, overlap_px)
        if not lines:
            raise UsageError(
                f"--crop {config.crop_px}: one tile of {tile_px} px holds it; expected a larger "
                "crop or a smaller --tile."
            )
        shared = shared_cells(side, tile_px, overlap_px)
        results: dict[str, dict[str, Any]] = {
            "bicubic": {"grid": grid(profile([bicubic(crop, (side, side)) for crop in crops]))}
        }
        for level in config.levels:
            tiled = upscaled(upscaler, crops, level, tile_px, overlap_px)
            whole = upscaled(upscaler, crops, level, side, 0)
            results[level] = judged(tiled, whole, crops, lines, shared)
    print(report.format_card(card))
    print(f"\n{len(crops)} photos of {config.crop_px} px, tiles of {tile_px} px\n")
    columns = {
        "seams": "seams",
        "seams_same_places": "same places",
        "seams_one_tile": "one tile",
        "apart": "apart",
        "colours": "colours",
        "colours_worst": "worst",
        "grid": "grid",
    }
    rows = [
        [name, *("" if key not in result else f"{result[key]:.3f}" for key in columns)]
        for name, result in results.items()
    ]
    print(report.format_table(("", *columns.values()), rows))
    print("limits: " + ", ".join(f"{key} {limit:g}" for key, limit in LIMITS.items()) + "\n")
    passed = all(
        result.get(key, 0.0) <= limit
        for result in results.values()
        for key, limit in LIMITS.items()
    )
    document = report.document(
        "artefacts",
        SCHEMA_VERSION,
        card,
        photos=len(crops),
        crop_px=config.crop_px,
        tile_px=tile_px,
        limits=LIMITS,
        results=results,
    )
    return Verdict(document, passed)


def centre(image: Image, side_px: int) -> Image:
    """The square in the middle, or what there is of it."""
    top, left = (max(0, length - side_px) // 2 for length in image.shape[:2])
    return np.ascontiguousarray(image[top : top + side_px, left : left + side_px])


def seam_lines(length_px: int, tile_px: int, overlap_px: int) -> list[int]:
    """Pixels that lie behind a line where a tile begins or ends, along one axis of an image."""
    axis = plan_axis(length_px, tile_px, overlap_px, PLACE_PX)
    ends = {start + axis.tile_px for start in axis.starts}
    return sorted(line for line in ends.union(axis.starts) if 0 < line < length_px)


def shared_cells(length_px: int, tile_px: int, overlap_px: int) -> Flags:
    """Of the cells of PLACE_PX along one axis, those that lie in two tiles or more."""
    axis = plan_axis(length_px, tile_px, overlap_px, PLACE_PX)
    tiles = np.zeros(length_px, np.int64)
    for start in axis.starts:
        tiles[start : start + axis.tile_px] += 1
    cells = tiles[: length_px // PLACE_PX * PLACE_PX].reshape(-1, PLACE_PX)
    shared: Flags = (cells > 1).all(1)
    return shared


def upscaled(
    upscaler: Upscaler, crops: Sequence[Image], level: str, tile_px: int, overlap_px: int
) -> list[Image]:
    """The crops at a level, in tiles of this size and overlap."""
    made = (upscaler(crop, level, tile_px=tile_px, overlap_px=overlap_px) for crop in crops)
    return [np.asarray(image, np.uint8) for image in made]


def judged(
    tiled: Sequence[Image],
    whole: Sequence[Image],
    inputs: Sequence[Image],
    lines: Sequence[int],
    shared: Flags,
) -> dict[str, Any]:
    """The figures of one level, with the same ``seam_lines`` and ``shared_cells`` on both axes."""
    differences = profile(tiled)
    seams = np.asarray(lines) - 1
    others = np.delete(np.arange(len(differences)), seams)
    same_places = [differences[others[(others - i) % PLACE_PX == 0]].mean() for i in seams]
    at = differences[seams].mean()
    shifts = np.abs(
        [sr.mean((0, 1)) - lq.mean((0, 1)) for sr, lq in zip(tiled, inputs, strict=True)]
    )
    return {
        "seams": float(at / differences[others].mean()),
        "seams_same_places": float(at / np.mean(same_places)),
        "seams_one_tile": float(at / profile(whole)[seams].mean()),
        "apart": apart(tiled, whole, shared),
        "colours": float(shifts.mean()),
        "colours_worst": float(shifts.max()),
        "grid": grid(differences),
    }


def apart(tiled: Sequence[Image], whole: Sequence[Image], shared: Flags) -> float:
    """The mean difference of cell means between square images, on the cells that are ``shared``
    along an axis; without such cells nothing is blended, and it is 0."""
    inside = shared[:, None] | shared[None, :]
    if not inside.any():
        return 0.0
    means = [cell_means(luma(a) - luma(b)) for a, b in zip(tiled, whole, strict=True)]
    return float(np.mean([np.abs(mean[inside]).mean() for mean in means]))


def cell_means(values: Floats) -> Floats:
    """(H, W) -> (H / PLACE_PX, W / PLACE_PX); what is left at the lower and right edge is cut."""
    rows, columns = (side // PLACE_PX for side in values.shape)
    cut = values[: rows * PLACE_PX, : columns * PLACE_PX]
    means: Floats = cut.reshape(rows, PLACE_PX, columns, PLACE_PX).mean((1, 3))
    return means


def profile(images: Sequence[Image]) -> Floats:
    """Of square images: the mean difference of luma from each pixel to the next one, i to i + 1,
    along rows and columns."""
    rows = []
    for image in images:
        y = luma(image)
        rows.append(np.abs(np.diff(y, axis=0)).mean(1) + np.abs(np.diff(y, axis=1)).mean(0))
    mean: Floats = np.mean(rows, 0) / 2
    return mean


def grid(differences: Floats) -> float:
    """The mean of a profile on the strongest of eight lines, over that of all."""
    places = [differences[place::PLACE_PX].mean() for place in range(PLACE_PX)]
    return float(max(places) / np.mean(places))


if __name__ == "__main__":
    sys.exit(main())
