"""Where the photos of a training lie: files in folders, members of tar shards, LR and HR pairs."""

from __future__ import annotations

import io
import logging
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.ContainerIO import ContainerIO

from rcod_train.errors import DataError

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
SCALE = 4  # of HQ to LQ
_BITS_PER_SAMPLE = 258  # TIFF's tag
# What Pillow's decoders raise on damaged files.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError,
    OverflowError, ZeroDivisionError, NotImplementedError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


class _Member(ContainerIO[bytes]):
    """A part of an open shard, as a file of its own."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")  # libtiff would read the shard from its beginning


@dataclass(frozen=True)
class Photo:
    """One photo, or one pair of a paired folder.

    Args:
        path: the file, or the shard it is in.
        name: its path below its folder or in its shard.
        span: first byte and bytes in the shard.
        lq: the low-resolution partner of a pair.
    """

    path: Path
    name: str
    span: tuple[int, int] | None = None
    lq: Path | None = None

    def __str__(self) -> str:
        return str(self.path) if self.span is None else f"{self.path}: {self.name}"

    @property
    def file(self) -> tuple[Path, tuple[int, int] | None]:
        """Tells whether two photos are one file, whatever folder or link they were found by."""
        return self.path.resolve(), self.span

    @contextmanager
    def open(self) -> Iterator[Image.Image]:
        """The image, not decoded yet: of one in a shard no more is read than its header.

        Raises:
            one of UNREADABLE: what it may be.
        """
        if self.span is None:
            with Image.open(self.path) as image:
                yield image
        else:
            with (
                self.path.open("rb") as shard,
                Image.open(_Member(shard, *self.span)) as image,
            ):
                yield image

    def read(self) -> Pixels:
        """(H, W, 3) uint8 RGB; raises like ``open``, and DataError like ``find_photos``."""
        with self.open() as image:
            return _rgb(image, str(self))

    def read_lq(self) -> Pixels:
        """The partner, (H/4, W/4, 3); raises like ``read``."""
        assert self.lq is not None
        with Image.open(self.lq) as image:
            return _rgb(image, str(self.lq))


def find_photos(sources: tuple[str, ...], min_side_px: int, option: str = "--data") -> list[Photo]:
    """All photos below the folders, and in the .tar shards there or named themselves, that open and
    are large enough; sorted by path. Shards are plain tar files, as webdataset has them; their
    members are read at random by their place, so a batch depends on nothing but its number.

    A file that lies below several of the sources counts once, named by the first. Files that don't
    open or are too small are counted and named in a warning. ``option`` is what gave the sources.

    Raises:
        DataError: a source is missing, a shard is damaged, a photo's white can't be known, or no
            photo is left.
    """
    found: list[Photo] = []
    for source in map(Path, sources):
        if not (source.is_dir() or source.suffix == ".tar" and source.is_file()):
            raise DataError(
                f"{source}: expected a folder of photos or a .tar shard, found none. Check "
                f"{option}."
            )
        below = _below(source) if source.is_dir() else _in_shard(source)
        found += sorted(below, key=_order)
    candidates = {photo.file: photo for photo in reversed(found)}.values()
    if len(candidates) < len(found):
        log.warning("%d files were found more than once; each counts once",
                    len(found) - len(candidates))  # fmt: skip
    photos, skipped = [], []
    for photo in sorted(candidates, key=_order):
        try:
            with photo.open() as image:
                large_enough = min(image.size) >= min_side_px
                if large_enough:
                    _white(image, str(photo))
        except UNREADABLE:
            large_enough = False
        (photos if large_enough else skipped).append(photo)
    if skipped:
        names = ", ".join(Path(p.name).name for p in skipped[:5])
        log.warning(
            "%d of %d files skipped (unreadable, or a side under %d px): %s",
            len(skipped),
            len(candidates),
            min_side_px,
            names + (", ..." if len(skipped) > 5 else ""),
        )
    if not photos:
        raise DataError(
            f"{', '.join(sources)}: expected photos with both sides at least {min_side_px} px, "
            f"found {len(candidates)} image files and none large enough. "
            "Add photos, or lower the stage's context_px."
        )
    return photos


def find_pairs(folder: str, min_side_px: int) -> list[Photo]:
    """Pairs of ``folder``/HR and ``folder``/LR with the same stem, sorted; HR's sides are 4 times
    LR's. Pairs whose HR is smaller than ``min_side_px`` are skipped, counted and named.

    Raises:
        DataError: a folder is missing, an image has no partner or does not open, its white can't
            be known, sides don't fit, or no pair is left.
    """
    root = Path(folder)
    for part in ("LR", "HR"):
        if not (root / part).is_dir():
            raise DataError(f"{root / part}: expected a folder of images, found none.")
    lq, hq = (_by_stem(root / part) for part in ("LR", "HR"))
    for here, there in ((lq, hq), (hq, lq)):
        for stem in sorted(here.keys() - there.keys()):
            raise DataError(
                f"{here[stem]}: no image of this name in the other folder ({len(here)} and "
                f"{len(there)} images). Pairs have one name in LR and HR."
            )
    pairs, small = [], []
    for stem in sorted(hq):
        pair = Photo(hq[stem], hq[stem].name, lq=lq[stem])
        sizes = []
        for path in (hq[stem], lq[stem]):
            try:
                with Image.open(path) as image:
                    sizes.append(_upright_size(image))
                    _white(image, str(path))
            except UNREADABLE as exc:
                raise DataError(f"{path}: not a readable image ({exc}). Remove the pair.") from exc
        if sizes[0] != (sizes[1][0] * SCALE, sizes[1][1] * SCALE):
            raise DataError(
                f"{hq[stem]}: expected {SCALE} times the sides of its LR image, found "
                f"{sizes[0][0]} x {sizes[0][1]} px for {sizes[1][0]} x {sizes[1][1]} px."
            )
        (pairs if min(sizes[0]) >= min_side_px else small).append(pair)
    if small:
        names = ", ".join(p.name for p in small[:5]) + (", ..." if len(small) > 5 else "")
        log.warning("%d of %d pairs skipped (HR has a side under %d px): %s",
                    len(small), len(hq), min_side_px, names)  # fmt: skip
    if not pairs:
        raise DataError(
            f"{root}: expected pairs whose HR has both sides at least {min_side_px} px, found "
            f"{len(hq)} pairs and none large enough. Lower the stage's context_px."
        )
    return pairs


def readable_spread(photos: list[Photo], count: int) -> list[Photo]:
    """At most ``count`` that can be decoded, evenly spread over all, in their order: neighbours are
    often of one folder or scene. One that can't be is named in a warning, and another one taken.

    Raises:
        DataError: none can.
    """
    spread = {i * len(photos) // count for i in range(count)}
    found: list[int] = []
    for i in sorted(range(len(photos)), key=lambda i: i not in spread):
        if len(found) == count:
            break
        try:
            photos[i].read()
            found.append(i)
        except UNREADABLE as exc:
            log.warning("%s: can't be decoded (%s); not validated on", photos[i], exc)
    if not found:
        raise DataError(f"{photos[0]}: of {len(photos)} photos to validate on none can be decoded.")
    return [photos[i] for i in sorted(found)]


def _white(image: Image.Image, source: str) -> int:
    """The value that is white, told without decoding.

    Raises:
        DataError: none is: integers of 32 bits or with a sign, or floating point.
    """
    if image.mode in ("I", "F"):
        raise DataError(
            f"{source}: expected 8 or 16 bits a channel, found Pillow's mode {image.mode} (signed, "
            "32 bits or floating point): which value is white can't be known. Save it with 8 or "
            "16 bits, or remove it."
        )
    if not image.mode.startswith("I;16"):
        return 255
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))  # 12 in some TIFF files
    return int(2 ** bits[0] - 1)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as ``_rgb`` has them, told without decoding: Pillow has turned a TIFF's
    already, and would decode a PNG to look for EXIF data behind its pixels."""
    width, height = image.size
    asked = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    if asked and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
        return height, width
    return width, height


def _rgb(image: Image.Image, source: str) -> Pixels:
    """(H, W, 3) uint8, turned as a camera noted it in the EXIF data. Pillow's conversion would cut
    deeper grey off at 255."""
    white = _white(image, source)
    ImageOps.exif_transpose(image, in_place=True)
    if white == 255:
        return np.asarray(image.convert("RGB"))
    grey = np.asarray(image, np.float32) * (255 / white)
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def _by_stem(folder: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            if path.stem in images:
                raise DataError(
                    f"{folder}: {images[path.stem].name} and {path.name} have the same name. "
                    "Keep one of them."
                )
            images[path.stem] = path
    return images


def _order(photo: Photo) -> tuple[Path, str]:
    return photo.path, photo.name


def _below(folder: Path) -> Iterator[Photo]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES:
            yield Photo(path, path.relative_to(folder).as_posix())
        elif path.suffix == ".tar":
            yield from _in_shard(path)


def _in_shard(path: Path) -> list[Photo]:
    try:
        with tarfile.open(path, "r:") as shard:
            photos = [
                Photo(path, member.name, (member.offset_data, member.size))
                for member in shard
                if member.isreg() and PurePosixPath(member.name).suffix.lower() in SUFFIXES
            ]
            end = shard.offset
        with path.open("rb") as file:  # tarfile takes a damaged or cut header for the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"a damaged header, or cut off, at byte {end}")
        return photos
    except (OSError, tarfile.TarError) as exc:
        raise DataError(
            f"{path}: not a whole tar file without compression ({exc}). Remove it or make it again."
        ) from exc
