"""Image files in and out: every colour mode, orientation and depth that photos come in."""

from __future__ import annotations

import importlib.util
import io
import logging
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from rcod_runtime.errors import ImageError, OutputError
from rcod_runtime.files import read_bounded, write_whole
from rcod_runtime.parallel import row_bands
from rcod_runtime.png import encode_png
from rcod_runtime.tiff import with_profile
from rcod_runtime.tiff_kind import (
    BITS,
    PHOTOMETRIC,
    PLANAR,
    SEPARATE_PLANES,
    check_sizes,
    is_tiff,
    stretch,
    unreadable,
)

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

MAX_INPUT_PIXELS = 50_000_000
MAX_INPUT_BYTES = 2**30  # 50 million pixels of 16-bit RGBA, stored as they are, have 0.4 GB
READ_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
MAX_SCANS = 100  # encoders write up to some ten
# Nothing else that Pillow knows: some of its formats run programs (EPS: Ghostscript).
READ_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP",
    ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP",
}  # fmt: skip
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "TIFF": {"compression": "tiff_deflate"},
}
MAX_SIDE_PX = {"JPEG": 65_500, "WEBP": 16_383}  # libjpeg's; 14 bits in the file
# What Pillow's decoders raise on damaged files.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError,
    OverflowError, ZeroDivisionError, NotImplementedError, struct.error, zlib.error,
)  # fmt: skip

_ORIENTATION = 0x0112  # EXIF
_EXTRA_SAMPLES, _ASSOCIATED_ALPHA = 338, 1  # TIFF 6.0, section 18
# With a length behind it: not what stands among a JPEG's values, nor TEM (01), which has none.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_BEGINNING = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP", re.DOTALL)
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Photo:
    """A decoded image. ``pixels`` is (H, W) grey, (H, W, 2) grey and alpha, (H, W, 3) or (H, W, 4),
    uint8 or uint16, upright; ``icc`` the profile its values are in, where one was given."""

    pixels: Pixels
    icc: bytes | None = None


def read_image(path: Path | str, max_pixels: int = MAX_INPUT_PIXELS) -> Photo:
    """Decode an image file.

    EXIF orientation is applied, palettes are expanded, CMYK is converted to sRGB, of an animation
    the first frame is taken. 16-bit grey keeps its depth, 12-bit grey becomes 16-bit; 16-bit colour
    keeps its depth where OpenCV is installed and is read at 8 bits with a warning otherwise. The
    one transparent colour that a PNG may have becomes alpha.

    Raises:
        ImageError: missing, a folder, empty, not an image, of a kind of TIFF that can't be read,
            damaged, over ``max_pixels``, or made to keep decoders busy.
    """
    path = Path(path)
    try:
        data = read_bounded(path, MAX_INPUT_BYTES)
    except FileNotFoundError as exc:
        raise ImageError(f"{path}: not found.") from exc
    except IsADirectoryError as exc:
        raise ImageError(f"{path}: expected an image file, found a folder.") from exc
    except OSError as exc:
        raise ImageError(f"{path}: can't be read ({exc.strerror or exc}).") from exc
    return decode_image(data, str(path), max_pixels)


def decode_image(data: bytes, source: str, max_pixels: int = MAX_INPUT_PIXELS) -> Photo:
    """The same for the content of a file; ``source`` names it in messages."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError(f"{source}: expected an image, found an empty file.")
    try:
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{source}: {width} x {height} px; the limit is {max_pixels / 1e6:g} million "
                    "pixels. Cut the image into parts."
                )
            if image.format == "TIFF":
                check_sizes(data, max_pixels, source)
                _check_planes(image, data, source)
            if image.format in ("JPEG", "MPO") and _scans(data) > MAX_SCANS:
                raise ImageError(
                    f"{source}: expected at most {MAX_SCANS} scans in a JPEG, found "
                    f"{_scans(data)}: it was made to keep decoders busy."
                )
            if getattr(image, "is_animated", False):  # n_frames would walk through all of them
                log.warning("%s: has several frames; only the first is used", source)
            deep = _deep_colour(data, image, source)
            if deep is not None:
                return Photo(deep, _profile(image))
            if _is_deep_colour(image, data):
                cure = ""
                if importlib.util.find_spec("cv2") is None:
                    cure = ' To keep it: pip install "rcod[opencv]"'
                log.warning("%s: 16-bit colour is read at 8 bits.%s", source, cure)
            if image.format == "PNG":
                _scale_transparency(image, data)
            photo = _converted(image, source)  # now a TIFF is upright, and doesn't say how it was
            return Photo(_upright(photo.pixels, _orientation(image, source)), photo.icc)
    except UnidentifiedImageError as exc:
        if is_tiff(data):
            raise unreadable(data, source) from exc
        if _BEGINNING.match(data):
            raise ImageError(f"{source}: the image is damaged or cut short.") from exc
        raise ImageError(
            f"{source}: expected an image (PNG, JPEG, WebP, TIFF, BMP, GIF), found another kind of "
            "file."
        ) from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageError(
            f"{source}: over the limit of {max_pixels / 1e6:g} million pixels."
        ) from exc
    except MemoryError as exc:
        raise ImageError(
            f"{source}: there is not enough memory to decode it, or it is damaged and asks for too "
            "much. Cut the image into parts."
        ) from exc
    except _DECODER_ERRORS as exc:
        raise ImageError(f"{source}: the image is damaged or cut short ({exc}).") from exc


def _scans(data: bytes) -> int:
    """Scans of a JPEG's first image. Each passes over all pixels, and takes a few bytes."""
    count, at = 0, 2
    while match := _MARKER.search(data, at):
        at, kind = match.start(), data[match.start() + 1]
        if kind == _END_OF_IMAGE:
            break
        count += kind == _START_OF_SCAN
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return count


def _is_deep_colour(image: Image, data: bytes) -> bool:
    """More than 8 bits in several channels, which Pillow can't hold."""
    if image.format == "PNG":
        return data[24] == 16 and data[25] in (2, 4, 6)  # IHDR: bit depth, colour type
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(BITS, (8,))
        return len(bits) > 1 and max(bits) > 8
    return False


def _check_planes(image: Image, data: bytes, source: str) -> None:
    """Decoders take the first of a TIFF's planes for all three channels, without an error.

    Raises:
        ImageError: colours of 16 bits, each in a plane of its own.
    """
    planar = getattr(image, "tag_v2", {}).get(PLANAR) == SEPARATE_PLANES
    if planar and _is_deep_colour(image, data):
        raise ImageError(
            f"{source}: expected a TIFF whose 16-bit colours lie pixel by pixel, found them in "
            "separate planes. Save it as PNG, or with interleaved channels."
        )


def _deep_colour(data: bytes, image: Image, source: str) -> Pixels | None:
    """16-bit colour through OpenCV, upright and with straight alpha, as Pillow gives 8 bits; None
    where it isn't that, or OpenCV isn't installed."""
    if not _is_deep_colour(image, data):
        return None
    try:
        import cv2
    except ImportError:
        return None
    if image.format == "PNG":
        data = _needed_chunks(data)
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as exc:
        raise ValueError(str(exc)) from exc
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        return None
    if decoded.shape[1::-1] != image.size:
        raise ValueError(f"{image.size} px by one decoder, {decoded.shape[1::-1]} by another")
    channels = decoded.shape[2]
    if image.format == "TIFF":  # a fourth that it doesn't call alpha is none: Pillow's mode knows
        channels = min(channels, len(image.getbands()))
    order = [2, 1, 0, 3][:channels]
    pixels: npt.NDArray[np.uint16] = np.ascontiguousarray(decoded[:, :, order], np.uint16)
    if image.format == "PNG":
        return _upright(pixels, _orientation(image, source))
    # OpenCV has turned a TIFF upright already, whatever flags it gets.
    if getattr(image, "tag_v2", {}).get(_EXTRA_SAMPLES) == (_ASSOCIATED_ALPHA,):
        _divide_by_alpha(pixels)
    return pixels


def _needed_chunks(data: bytes) -> bytes:
    """A PNG with what its pixels need: OpenCV would make room for 4 GB if a chunk claims them, and
    reads animations and gamma into the pixels."""
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, end = data[at + 4 : at + 8], at + 12 + size
        if end > len(data):
            raise ValueError(f"a chunk of {size} bytes in the last {len(data) - at}")
        if kind in (b"IHDR", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        if kind == b"IEND":
            return b"".join(kept)
        at = end
    raise ValueError("its last chunk is missing")


def _orientation(image: Image, source: str) -> object:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS as exc:
        log.warning("%s: its EXIF can't be read (%s); it is taken to be upright", source, exc)
        return 1


def _upright(pixels: Pixels, orientation: object) -> Pixels:
    """EXIF's eight orientations, undone."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return cast(Pixels, np.ascontiguousarray(pixels))


def _divide_by_alpha(pixels: npt.NDArray[np.uint16]) -> None:
    """Associated alpha (colours times alpha) to straight alpha, in place; black under 0."""
    for rows in row_bands(pixels.shape[0]):
        colours, alpha = pixels[rows, :, :3], pixels[rows, :, 3:]
        straight = colours * (np.float32(65535) * (alpha > 0) / np.maximum(alpha, 1))
        colours[:] = np.rint(np.minimum(straight, 65535))


def _scale_transparency(image: Image, data: bytes) -> None:
    """A PNG's transparent colour (tRNS), which Pillow keeps as the file has it, to the values that
    it gives the pixels: 8 bits, but for 16-bit grey."""
    depth, key = data[24], image.info.get("transparency")
    if image.mode == "1" and isinstance(key, int):
        image.info["transparency"] = 255 if key else 0  # newer Pillows have done it
    elif image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _converted(image: Image, source: str) -> Photo:
    icc, key = _profile(image), image.info.get("transparency")
    mode = image.mode
    if mode in ("I;16", "I;16L", "I;16B", "I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{source}: expected 8 or 16 bits a channel, found 32-bit integers.")
        grey = values.astype(np.uint16)
        if image.format == "TIFF" and mode != "I":
            tags = getattr(image, "tag_v2", {})
            stretch(grey, tags.get(BITS, (16,))[0], tags.get(PHOTOMETRIC))
        return Photo(_with_alpha(grey, key), icc)
    if mode == "F":
        raise ImageError(f"{source}: expected 8 or 16 bits a channel, found floating point.")
    if mode in ("1", "L"):
        grey = np.asarray(image if mode == "L" else image.convert("L"))
        return Photo(_with_alpha(grey, key), icc)
    if mode in ("LA", "RGB", "RGBA") and key is None:
        return Photo(np.asarray(image), icc)
    if mode == "CMYK":
        return Photo(np.asarray(_cmyk_to_srgb(image, icc, source)))
    has_alpha = key is not None or mode in ("PA", "La", "RGBa")
    kept = icc if mode in ("P", "PA", "RGB", "RGBX", "YCbCr") else None
    return Photo(np.asarray(image.convert("RGBA" if has_alpha else "RGB")), kept)


def _with_alpha(grey: Pixels, key: object) -> Pixels:
    """Grey (H, W), and where a value of it is transparent alpha: (H, W, 2)."""
    if not isinstance(key, int):
        return grey
    alpha = np.full_like(grey, np.iinfo(grey.dtype).max)
    alpha[grey == key] = 0
    return cast(Pixels, np.stack([grey, alpha], axis=2))


def _profile(image: Image) -> bytes | None:
    """The colour profile; a TIFF may hold anything in its place."""
    icc = image.info.get("icc_profile")
    return icc if isinstance(icc, bytes) and icc else None


def _cmyk_to_srgb(image: Image, icc: bytes | None, source: str) -> Image:
    from PIL import ImageCms

    if icc:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(
                image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError) as exc:
            log.warning(
                "%s: its CMYK profile can't be used (%s); converted without it", source, exc
            )
    return image.convert("RGB")


def format_of(path: Path) -> str:
    """The format that the suffix of a file to be written stands for.

    Raises:
        OutputError: an unknown suffix.
    """
    format_name = FORMATS.get(path.suffix.lower())
    if format_name is None:
        raise OutputError(
            f"{path}: expected a name that ends in one of {', '.join(FORMATS)}, "
            f"found {path.suffix or 'no suffix'!r}."
        )
    return format_name


def write_image(path: Path | str, pixels: Pixels, icc: bytes | None = None) -> None:
    """Encode by the suffix and write whole or not at all; an existing file is replaced.

    Raises:
        OutputError: the folder is missing or can't be written, or the format can't hold the image.
    """
    path = Path(path)
    write_whole(path, encode_image(pixels, format_of(path), str(path), icc))


def check_format(
    shape: tuple[int, ...], dtype: npt.DTypeLike, format_name: str, target: str
) -> None:
    """Whether a format can hold an image, which need not be there yet: whoever would compute it
    asks before.

    Args:
        shape, dtype: of the image; its pixels as in Photo.
        format_name: a value of FORMATS.
        target: names the file in messages.

    Raises:
        OutputError: the format can't hold the image's alpha, depth or size.
    """
    height, width, channels = (*shape, 1)[:3]
    if channels in (2, 4) and format_name in ("JPEG", "BMP"):
        raise OutputError(f"{target}: {format_name} can't hold transparency. Write PNG or WebP.")
    if dtype == np.uint16 and format_name not in ("PNG", "TIFF"):
        raise OutputError(f"{target}: {format_name} can't hold 16 bits. Write PNG.")
    limit = MAX_SIDE_PX.get(format_name)
    if limit is not None and max(height, width) > limit:
        raise OutputError(
            f"{target}: the result would have {width} x {height} px; {format_name} holds at most "
            f"{limit} px a side. Write PNG, or choose a smaller scale."
        )
    if dtype == np.uint16 and channels > 1 and format_name == "TIFF":
        _check_deep_tiff(channels, target)


def _check_deep_tiff(channels: int, target: str) -> None:
    """16-bit colour in a TIFF, which Pillow can't write."""
    if channels == 2:
        raise OutputError(f"{target}: TIFF can't hold 16-bit grey with alpha. Write PNG.")
    try:
        import cv2  # noqa: F401
    except ImportError as exc:
        raise OutputError(
            f"{target}: a TIFF of 16-bit colour needs OpenCV, a PNG doesn't. "
            'pip install "rcod[opencv]"'
        ) from exc


def encode_image(pixels: Pixels, format_name: str, target: str, icc: bytes | None = None) -> bytes:
    """The content of an image file; ``target`` names it in messages.

    Args:
        pixels: as in Photo.
        format_name: a value of FORMATS.

    Raises:
        OutputError: as check_format.
    """
    from PIL import Image

    check_format(pixels.shape, pixels.dtype, format_name, target)
    is_colour = format_name == "WEBP" or (pixels.ndim == 3 and pixels.shape[2] > 2)
    if icc and is_colour and icc[16:20] == b"GRAY":  # what the profile is of
        icc = None
    if format_name == "PNG":
        return encode_png(pixels, icc)
    if pixels.dtype == np.uint16 and pixels.ndim == 3:
        return _encoded_deep_tiff(pixels, target, icc)
    options = dict(SAVE_OPTIONS.get(format_name, {}))
    if icc and format_name != "BMP":
        options["icc_profile"] = icc
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).save(buffer, format_name, **options)
    except (OSError, ValueError, struct.error) as exc:
        raise OutputError(f"{target}: can't be encoded as {format_name} ({exc}).") from exc
    return buffer.getvalue()


def _encoded_deep_tiff(pixels: Pixels, target: str, icc: bytes | None) -> bytes:
    import cv2

    order = [2, 1, 0, 3][: pixels.shape[2]]
    good, data = cv2.imencode(".tiff", np.ascontiguousarray(pixels[:, :, order]))
    if not good:
        raise OutputError(f"{target}: can't be encoded.")
    return with_profile(data.tobytes(), icc) if icc else data.tobytes()
