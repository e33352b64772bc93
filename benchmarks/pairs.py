"""Pairs of a dataset, by name: what is compared with what never depends on an order of files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.errors import DatasetError
from rcod_runtime.image_io import READ_SUFFIXES, read_image


@dataclass(frozen=True)
class Pair:
    """One image of a dataset: its low-resolution input and its ground truth."""

    name: str  # stem, the same in every folder
    lq: Path
    hq: Path


def find_pairs(dataset: Path) -> list[Pair]:
    """Pairs of ``dataset``/LR and ``dataset``/HR with the same stem, sorted by it.

    Raises:
        DatasetError: a folder is missing or empty, or an image has no partner.
    """
    lq, hq = images_by_stem(dataset / "LR"), images_by_stem(dataset / "HR")
    _check_partners(dataset / "LR", lq, dataset / "HR", hq)
    _check_partners(dataset / "HR", hq, dataset / "LR", lq)
    return [Pair(name, lq[name], hq[name]) for name in sorted(lq)]


def find_outputs(folder: Path, pairs: Sequence[Pair]) -> dict[str, Path]:
    """The image of ``folder`` for each pair, by stem; others there are left alone.

    Raises:
        DatasetError: the folder is missing, or has no image for one of the pairs.
    """
    found = images_by_stem(folder)
    missing = [pair.name for pair in pairs if pair.name not in found]
    if missing:
        raise DatasetError(
            f"{folder}: expected an image named {missing[0]}.*, found none "
            f"({len(missing)} of {len(pairs)} are missing). Outputs keep the names of their inputs."
        )
    return {pair.name: found[pair.name] for pair in pairs}


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Images of a folder, its subfolders left out.

    Raises:
        DatasetError: no folder, no images in it, or two with one stem.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: expected a folder of images, found none.")
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in READ_SUFFIXES or not path.is_file():
            continue
        if path.stem in images:
            raise DatasetError(
                f"{folder}: {images[path.stem].name} and {path.name} have the same name. "
                "Keep one of them."
            )
        images[path.stem] = path
    if not images:
        raise DatasetError(f"{folder}: expected images, found none.")
    return images


def select(
    pairs: Sequence[Pair], endings: Sequence[str] | None = None, limit: int | None = None
) -> list[Pair]:
    """Pairs whose name ends in one of ``endings``, then the first ``limit`` of them.

    What all names have in common at their end (RealSR's ``_LR4``) is not looked at.

    Raises:
        DatasetError: nothing is left.
    """
    chosen = list(pairs)
    if endings is not None:
        tail = _common_tail([pair.name for pair in pairs])
        chosen = [p for p in chosen if p.name.removesuffix(tail).endswith(tuple(endings))]
    chosen = chosen[:limit]
    if not chosen:
        raise DatasetError(f"no pair is left of {len(pairs)}. Choose other endings or limits.")
    return chosen


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """An image as (H, W, 3) uint8.

    Raises:
        DatasetError: it has other channels or another depth.
        ImageError: it can't be read.
    """
    pixels = read_image(path).pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DatasetError(
            f"{path}: expected 8-bit RGB, found {pixels.shape} {pixels.dtype}. Convert it."
        )
    return pixels.astype(np.uint8, copy=False)


def _check_partners(
    folder: Path, images: Mapping[str, Path], other: Path, partners: Mapping[str, Path]
) -> None:
    alone = [path.name for stem, path in images.items() if stem not in partners]
    if alone:
        raise DatasetError(
            f"{folder / alone[0]}: expected a partner of the same name in {other}, found none "
            f"({len(alone)} without one). Add it, or take the image away."
        )


def _common_tail(names: Sequence[str]) -> str:
    """What follows the last place where names differ, back to a separator: ``_LR4``."""
    if len(names) < 2:
        return ""
    tail = os.path.commonprefix([name[::-1] for name in names])[::-1]
    start = min((i for i in (tail.find("_"), tail.find("-")) if i >= 0), default=len(tail))
    return tail[start:]
