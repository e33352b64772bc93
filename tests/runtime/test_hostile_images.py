"""Image files made to keep a decoder busy, or to fill its memory."""

from __future__ import annotations

import struct
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import TiffImageFile

from rcod_runtime.errors import ImageError
from rcod_runtime.image_io import decode_image
from tests.runtime.test_images import Photo, deep_png, encoded


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_what_is_cut_in_its_head_is_called_cut(photo: Photo, kind: str) -> None:
    data = encoded(Image.fromarray(photo(32, 32)), kind)
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_image(data[:20], "cut")


@pytest.mark.parametrize("kind", [b"IHDR", b"tEXt", b"IDAT"])
def test_a_chunk_that_claims_gigabytes_is_refused_at_once(kind: bytes) -> None:
    """OpenCV made room for it: 4 GB and 15 s for a file of three kilobytes (fuzz, images 1551)."""
    pytest.importorskip("cv2")
    data = deep_png(np.full((24, 32, 3), 7, np.uint16))
    at = data.index(b"IDAT") - 4
    claimed = struct.pack(">I", 0xFB000007) + kind
    begin = time.process_time()
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_image(data[:at] + claimed + data[at + 8 :], "d.png")
    assert time.process_time() - begin < 2


def test_a_jpeg_of_thousands_of_scans_is_refused(photo: Photo) -> None:
    """75 bytes a scan, each a pass over 50 million pixels: minutes for a file of a megabyte."""
    data = encoded(Image.fromarray(photo(64, 64)), "JPEG", progressive=True)
    scan, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    for count, good in ((10, True), (5000, False)):
        longer = data[:end] + data[scan:end] * count + data[end:] + b"\xff\xda" * 1000
        if good:  # what lies behind the image is not counted
            assert decode_image(longer, "a.jpg").pixels.shape == (64, 64, 3)
        else:
            with pytest.raises(ImageError, match="at most 100 scans in a JPEG, found 50"):
                decode_image(longer, "a.jpg")


def test_a_marker_without_a_length_hides_no_scans(photo: Photo) -> None:
    """TEM, and then what a reader of lengths would leap over and libjpeg decodes."""
    data = encoded(Image.fromarray(photo(64, 64)), "JPEG", progressive=True)
    scan, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    hidden = b"\xff\x01\xfe\xfe" + data[scan:end] * 200
    with pytest.raises(ImageError, match="at most 100 scans in a JPEG, found 2"):
        decode_image(data[:end] + hidden + data[end:], "a.jpg")


@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
def test_frames_behind_the_first_are_not_walked_through(
    photo: Photo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A TIFF of 32 MiB can have 800 000 of them, and each looks all others up in a list."""
    frames = [Image.fromarray(photo(seed=s)) for s in range(40)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    plugin = {"TIFF": TiffImageFile, "GIF": GifImageFile}[kind]
    sought: list[int] = []
    real = plugin._seek

    def seek(self: Any, frame: int, *more: Any) -> None:
        sought.append(frame)
        real(self, frame, *more)

    monkeypatch.setattr(plugin, "_seek", seek)
    assert decode_image(data, "a").pixels.shape[:2] == (24, 40)
    assert "several frames" in caplog.text
    assert max(sought, default=0) <= 1
