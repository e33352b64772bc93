"""The PNG encoder: what other decoders make of its files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from rcod_runtime import parallel, png
from rcod_runtime.png import encode_png

SHAPES = [(1, 1), (1, 9), (9, 1), (5, 7, 1), (5, 7, 2), (33, 21, 3), (33, 21, 4)]


def noise(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strip_bytes", [1, 200, 2**17])
def test_pillow_reads_back_the_pixels(
    shape: tuple[int, ...], strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png, "STRIP_BYTES", strip_bytes)
    pixels = noise(shape, np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        image.verify()  # the checksums
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(shape), pixels)


@pytest.mark.parametrize("shape", [(33, 21, 3), (33, 21, 4)])
def test_opencv_reads_back_16_bits(shape: tuple[int, ...]) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = noise(shape, np.uint16)
    found = cv2.imdecode(np.frombuffer(encode_png(pixels), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(found[:, :, [2, 1, 0, 3][: shape[2]]], pixels)


def test_the_bytes_do_not_depend_on_the_number_of_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = noise((300, 200, 3), np.uint8)
    monkeypatch.setattr(png, "STRIP_BYTES", 4096)
    several = encode_png(pixels)
    monkeypatch.setattr(parallel, "MAX_THREADS", 1)
    assert encode_png(pixels) == several


def test_a_view_of_a_larger_image_is_written_as_it_looks() -> None:
    pixels = noise((40, 60, 4), np.uint8)[::2, 5:25, :3]
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
