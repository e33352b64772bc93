"""Colour profiles of what is written."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from rcod_runtime.image_io import encode_image

GREY = b"\0" * 16 + b"GRAY" + b"\0" * 108


@pytest.mark.parametrize(
    ("shape", "format_name", "kept"),
    [
        ((8, 8), "PNG", True),
        ((8, 8), "TIFF", True),
        ((8, 8, 2), "PNG", True),
        ((8, 8), "WEBP", False),
        ((8, 8, 3), "PNG", False),
        ((8, 8, 4), "PNG", False),
    ],
)
def test_a_profile_of_grey_is_on_grey_alone(
    shape: tuple[int, ...], format_name: str, kept: bool
) -> None:
    """WebP has colours, and 16-bit grey with alpha is read as colour: there it would say nothing
    of the pixels, and readers that drop it show other tones."""
    content = encode_image(np.full(shape, 128, np.uint8), format_name, "photo", GREY)
    with Image.open(io.BytesIO(content)) as image:
        assert image.info.get("icc_profile") == (GREY if kept else None)
