"""Bicubic resampling with Pillow's filter (a = -0.5), by boxes, without seams."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Floats = npt.NDArray[np.float32]


class Resampler:
    """Resizes one image to one size, box by box; equal to the crop of the whole result.

    Args:
        image: (H, W, C), any real dtype; values are kept in their units.
        size_hw: height and width of the whole result.
    """

    def __init__(self, image: npt.NDArray[np.generic], size_hw: tuple[int, int]) -> None:
        from PIL import Image

        self.size_hw = size_hw
        self.source_hw = image.shape[:2]
        planes = image.astype(np.float32, copy=False)
        self._planes: list[PilImage] = [
            Image.fromarray(np.ascontiguousarray(planes[:, :, c])) for c in range(image.shape[2])
        ]

    def box(self, top: int, left: int, height: int, width: int) -> Floats:
        """Rows top.. and columns left.. of the result -> (height, width, C) float32.

        In memory the channels lie one after another, as the graphs take them.
        """
        from PIL import Image

        y, x = (s / t for s, t in zip(self.source_hw, self.size_hw, strict=True))
        region = (left * x, top * y, (left + width) * x, (top + height) * y)
        # Rounding must not push the region over the edge, where Pillow refuses it.
        region = (
            region[0],
            region[1],
            min(region[2], float(self.source_hw[1])),
            min(region[3], float(self.source_hw[0])),
        )
        out = np.empty((len(self._planes), height, width), np.float32)
        for c, plane in enumerate(self._planes):
            out[c] = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC, region))
        return out.transpose(1, 2, 0)


def upsample(image: npt.NDArray[np.generic], size_hw: tuple[int, int]) -> Floats:
    """The whole image at another size: (H, W, C) -> (height, width, C) float32, same units."""
    return Resampler(image, size_hw).box(0, 0, *size_hw)


def resize_for_tokens(image: npt.NDArray[np.generic], side_px: int) -> Floats:
    """The whole image squashed to a square, antialiased: (H, W, C) -> (S, S, C) float32."""
    return upsample(image, (side_px, side_px))
