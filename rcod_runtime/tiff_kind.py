"""What a TIFF (6.0, or BigTIFF) says of its pixels, read from its first directory: for what Pillow
doesn't look at, and before a decoder makes room for it."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from rcod_runtime.errors import ImageError
from rcod_runtime.parallel import row_bands

BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
PLANAR, SEPARATE_PLANES = 284, 2
_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 322, 323
_SAID = {
    BITS: "BitsPerSample", 277: "SamplesPerPixel", 338: "ExtraSamples", 339: "SampleFormat",
    PHOTOMETRIC: "PhotometricInterpretation", 259: "Compression", 266: "FillOrder",
}  # fmt: skip
_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHOLE = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_MOST = 8  # values of a tag that are read: samples are fewer
_MOST_VALUES = 65535  # of a tag: samples, and a short says how many they are
_MOST_ENTRIES = 4096  # of a directory: encoders write some twenty

# Encoders' tiles have 128 to 1024 px a side; with 4096 a small image may still come in one.
TILE_PX = 4096 * 4096


def is_tiff(data: bytes) -> bool:
    return data.startswith(_SIGNATURES)


def numbers(tiff: bytes, *tags: int) -> dict[int, list[int]]:
    """The values of those of the tags that are whole numbers. Of a tag that stands there twice it
    is those of both: decoders don't agree on which one counts.

    Raises:
        struct.error: there is no directory, or one made to fill the memory of its reader.
    """
    order = "<" if tiff[:2] == b"II" else ">"
    big = 43 in tiff[2:4]
    (first,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", tiff, 8 if big else 4)
    if first > len(tiff):
        raise struct.error(f"a directory at {first} in {len(tiff)} bytes")
    count_of, entry_of = (f"{order}Q", f"{order}HHQ") if big else (f"{order}H", f"{order}HHI")
    (count,) = struct.unpack_from(count_of, tiff, first)
    if count > _MOST_ENTRIES:
        raise struct.error(f"a directory of {count} entries, expected at most {_MOST_ENTRIES}")
    start, step, inline = first + (8 if big else 2), 20 if big else 12, 8 if big else 4
    found: dict[int, list[int]] = {}
    for at in range(start, min(start + count * step, len(tiff) - step + 1), step):
        tag, kind, many = struct.unpack_from(entry_of, tiff, at)
        if tag not in tags or kind not in _WHOLE:
            continue
        if many > _MOST_VALUES:
            raise struct.error(f"{many} values of tag {tag}, expected at most {_MOST_VALUES}")
        values = f"{order}{min(many, _MOST)}{_WHOLE[kind]}"
        where = at + step - inline
        if struct.calcsize(f"{order}{_WHOLE[kind]}") * many > inline:
            (where,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", tiff, where)
        if where + struct.calcsize(values) <= len(tiff):
            found.setdefault(tag, []).extend(struct.unpack_from(values, tiff, where))
    return found


def check_sizes(tiff: bytes, max_pixels: int, source: str) -> None:
    """Image and tiles in bounds, whichever decoder reads them.

    The image: where its sides stand there twice, or as a type that Pillow passes over, it may have
    another size for OpenCV than for Pillow. The largest counts.

    Tiles: a decoder makes room for a whole one, and fills it, however little of it is in the image.
    (The strips of other files end with the image, whatever their length is said to be.) One may
    have ``max_pixels``, and takes then no more room than an image may, or TILE_PX where that is
    more. All together may have four times as many: those at the edges reach beyond it.

    Raises:
        ImageError: they are over it.
        struct.error: as numbers.
    """
    found = numbers(tiff, _WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH)
    image_width, image_length, width, length = (
        max(found.get(tag, ()), default=0) for tag in (_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH)
    )
    if image_width * image_length > max_pixels:
        raise ImageError(
            f"{source}: expected at most {max_pixels / 1e6:g} million pixels, found an ImageWidth "
            f"of {image_width} and an ImageLength of {image_length}, which decoders don't read "
            "alike. Save it as PNG."
        )
    if width < 1 or length < 1:
        return  # none, or such as no decoder takes
    across, down = -(-image_width // width), -(-image_length // length)
    limit = max(max_pixels, TILE_PX)
    if width * length > limit or across * down * width * length > 4 * limit:
        raise ImageError(
            f"{source}: expected tiles of at most {limit / 1e6:.3g} million pixels, and "
            f"{4 * limit / 1e6:.3g} million in all, found {across} x {down} of {width} x {length} "
            "px. Save it without tiles, or with smaller ones."
        )


def unreadable(tiff: bytes, source: str) -> ImageError:
    """Why Pillow doesn't know it, in the words of TIFF."""
    try:
        found = numbers(tiff, _WIDTH, *_SAID)
    except struct.error as exc:
        return ImageError(f"{source}: the image is damaged or cut short ({exc}).")
    said = [
        f"{_SAID[tag]} {' '.join(map(str, found[tag][:_MOST]))}" for tag in _SAID if tag in found
    ]
    if _WIDTH not in found or not said:
        return ImageError(f"{source}: the image is damaged or cut short (nothing says its size).")
    return ImageError(
        f"{source}: expected a TIFF of 8 or 16 bits, grey or in colours, found a kind of TIFF that "
        f"can't be read ({', '.join(said)}). Save it as PNG."
    )


def stretch(grey: npt.NDArray[np.uint16], bits: int, photometric: object) -> None:
    """Values as a TIFF of up to 16 bits has them to those of 16 bits, black 0 and white 65535, in
    place: Pillow does so up to 8 bits alone."""
    if bits < 16:
        table = np.rint(np.linspace(0, 65535, 2**bits)).astype(np.uint16)
        for rows in row_bands(grey.shape[0]):  # to look them up takes four times as much room
            grey[rows] = table[grey[rows]]
    if photometric == WHITE_IS_ZERO:
        np.invert(grey, out=grey)
