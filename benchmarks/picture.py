"""A drawn picture with the contents of a photo: smooth areas, edges, fine texture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def draw_picture(height: int, width: int) -> npt.NDArray[np.uint8]:
    """The same (height, width, 3) uint8 picture on every machine."""
    y = np.linspace(0.0, 1.0, height)[:, None]
    x = np.linspace(0.0, 1.0, width)[None, :]
    red = 96 + 96 * y + 24 * np.sin(9 * x) * np.cos(7 * y)
    green = 80 + 64 * x + 48 * np.sin(40 * (x + 0.6 * y) ** 2)
    blue = 128 + 72 * np.cos(5 * y - 3 * x)
    image = np.stack(np.broadcast_arrays(red, green, blue), axis=2)
    for top, left, radius, shade in ((0.3, 0.35, 0.2, 60), (0.62, 0.7, 0.16, -70)):
        disc = (y - top) ** 2 + (x - left) ** 2 < radius**2
        image += shade * disc[:, :, None]
    # A multiplicative hash of the pixel's place: texture without a random generator.
    rows, columns = np.ogrid[:height, :width]
    grain = ((rows * 7919 + columns * 104729 + rows * columns * 31) * 2654435761) % 4093
    image += (grain / 4092 - 0.5)[:, :, None] * 18
    picture: npt.NDArray[np.uint8] = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return picture
