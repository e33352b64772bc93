"""Small images in every format and colour mode that the runtime reads: what the fuzzer damages."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from benchmarks.picture import draw_picture

SIDE_PX = 24


def image_corpus() -> dict[str, bytes]:
    """Name -> content of a file; the same on every call."""
    rgb = Image.fromarray(draw_picture(SIDE_PX, SIDE_PX + 8))
    modes = _modes(rgb)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    files: dict[str, bytes] = {}

    def add(kind: str, label: str, image: Image.Image, **options: Any) -> None:
        buffer = io.BytesIO()
        # Copies: saving leaves settings on an object.
        frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
        options |= frames if label == "frames" else {}
        image.copy().save(buffer, kind, **options)
        files[f"{kind.lower()}-{label}"] = buffer.getvalue()

    for mode in ("L", "RGB", "CMYK"):
        add("JPEG", mode, modes[mode], quality=80)
        add("JPEG", f"{mode}-progressive", modes[mode], progressive=True)
    add("JPEG", "exif-icc", rgb, exif=exif, icc_profile=profile)
    add("JPEG", "444", rgb, subsampling=0, restart_marker_rows=1)
    add("MPO", "frames", rgb)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        add("PNG", mode, modes[mode])
    add("PNG", "P-transparency", modes["P"], transparency=3)
    add("PNG", "L-transparency", modes["L"], transparency=9)
    add("PNG", "RGB-transparency", rgb, transparency=(1, 2, 3), exif=exif, icc_profile=profile)
    add("PNG", "frames", rgb)
    for channels, colour in ((2, 4), (3, 2), (4, 6)):
        files[f"png-16-bit-{channels}"] = _deep_png(channels, colour)
    for mode in ("RGB", "RGBA"):
        add("WEBP", mode, modes[mode], quality=80)
        add("WEBP", f"{mode}-lossless", modes[mode], lossless=True)
    add("WEBP", "exif-icc", rgb, exif=exif, icc_profile=profile)
    add("WEBP", "frames", rgb)
    for mode in (
        "1",
        "L",
        "LA",
        "P",
        "RGB",
        "RGBA",
        "CMYK",
        "YCbCr",
        "LAB",
        "I;16",
        "I;16B",
        "I",
        "F",
    ):
        add("TIFF", mode, modes[mode])
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        add("TIFF", f"RGB-{compression}", rgb, compression=compression)
    for compression in ("group3", "group4", "packbits"):
        add("TIFF", f"1-{compression}", modes["1"], compression=compression)
    add("TIFF", "exif-icc", rgb, exif=exif, icc_profile=profile)
    add("TIFF", "frames", rgb)
    for label, order in (("little", "<"), ("big", ">")):
        files[f"tiff-16-bit-{label}"] = _deep_tiff(order)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        add("BMP", mode, modes[mode])
    for mode in ("1", "L", "P"):
        add("GIF", mode, modes[mode])
    add("GIF", "frames", rgb)
    return files


def _modes(rgb: Image.Image) -> dict[str, Image.Image]:
    modes = {mode: rgb.convert(mode) for mode in ("1", "L", "CMYK", "YCbCr", "I", "F")}
    rgba = rgb.copy()
    rgba.putalpha(modes["L"])
    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    deep = Image.fromarray(np.asarray(modes["L"]).astype(np.uint16) * 257)
    return {
        **modes, "RGB": rgb, "RGBA": rgba, "LA": rgba.convert("LA"), "P": rgb.quantize(32),
        "LAB": lab, "I;16": deep, "I;16B": deep.convert("I").convert("I;16B"),
    }  # fmt: skip


def _deep_png(channels: int, colour: int) -> bytes:
    """16 bits a channel, by hand: Pillow can't write it."""
    rows = _deep_rows(channels, ">")
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _deep_tiff(order: str) -> bytes:
    """16-bit RGB, not compressed, of either byte order."""
    rows = _deep_rows(3, order)
    pixels = rows.tobytes()
    entries = [
        (256, 3, 1, rows.shape[1]), (257, 3, 1, rows.shape[0]), (258, 3, 3, 8 + len(pixels)),
        (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, rows.shape[0]),
        (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    depths = struct.pack(f"{order}3H", 16, 16, 16) + b"\0\0"
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        packed = struct.pack(
            f"{order}HH" if short else f"{order}I", *((value, 0) if short else (value,))
        )
        directory += struct.pack(f"{order}HHI", tag, kind, count) + packed
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(pixels) + 8)
    return start + pixels + depths + directory + struct.pack(f"{order}I", 0)


def _deep_rows(channels: int, order: str) -> np.ndarray:
    values = draw_picture(SIDE_PX, SIDE_PX + 8).astype(np.uint16) * 257
    planes = np.concatenate([values, values[:, :, :1]], axis=2)[:, :, :channels]
    return np.ascontiguousarray(planes).astype(f"{order}u2")
