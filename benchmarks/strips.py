"""A strip: one image as several methods show it, whole and enlarged, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.pairs import read_rgb

Image = npt.NDArray[np.uint8]

PANEL_PX = 256
ENLARGEMENT = 2  # of the detail: PANEL_PX / ENLARGEMENT px of the image are shown
GAP_PX = 6
TEXT_PX = 20
CAPTION_PX = 15
PAPER, INK, FAINT, FRAME = (255, 255, 255), (20, 20, 20), (110, 110, 110), (255, 214, 0)


@dataclass(frozen=True)
class Panel:
    """One method's image, with a label and a smaller caption under it."""

    label: str
    image: Image  # (H, W, 3), the same size in all panels of a strip
    caption: str = ""


def draw_strip(lq_path: Path, panels: Sequence[Panel]) -> Image:
    """Columns lq and then the panels; above the whole image, below one enlarged detail.

    The detail is the most textured square of the last panel; the first column, the input, is
    shown with its own pixels.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    height, width = panels[-1].image.shape[:2]
    lq = Pillow.fromarray(read_rgb(lq_path))
    enlarged_lq = np.asarray(lq.resize((width, height), Pillow.Resampling.NEAREST))
    columns = [Panel("lq", enlarged_lq, f"{lq.width} x {lq.height} px"), *panels]

    whole_px = (PANEL_PX, max(1, round(height * PANEL_PX / width)))
    detail_side = min(PANEL_PX // ENLARGEMENT, height, width)
    top, left = find_detail(panels[-1].image, detail_side)
    text_px = TEXT_PX + CAPTION_PX + 3 * GAP_PX
    strip = Pillow.new(
        "RGB",
        (
            len(columns) * (PANEL_PX + GAP_PX) + GAP_PX,
            whole_px[1] + PANEL_PX + 3 * GAP_PX + text_px,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(strip)
    label_font = ImageFont.load_default(TEXT_PX)
    caption_font = ImageFont.load_default(CAPTION_PX)
    for i, panel in enumerate(columns):
        x = GAP_PX + i * (PANEL_PX + GAP_PX)
        image = Pillow.fromarray(panel.image)
        strip.paste(image.resize(whole_px, Pillow.Resampling.LANCZOS), (x, GAP_PX))
        shrink = PANEL_PX / width
        frame = [x + left * shrink, GAP_PX + top * shrink]
        frame += [frame[0] + detail_side * shrink, frame[1] + detail_side * shrink]
        draw.rectangle([round(v) for v in frame], outline=FRAME, width=2)

        y = whole_px[1] + 2 * GAP_PX
        detail = image.crop((left, top, left + detail_side, top + detail_side))
        strip.paste(detail.resize((PANEL_PX, PANEL_PX), Pillow.Resampling.NEAREST), (x, y))
        y += PANEL_PX + GAP_PX
        middle = x + PANEL_PX // 2
        draw.text((middle, y), panel.label, INK, label_font, anchor="ma")
        y += TEXT_PX + GAP_PX
        draw.text((middle, y), panel.caption, FAINT, caption_font, anchor="ma")
    return np.asarray(strip)


def find_detail(image: Image, side_px: int) -> tuple[int, int]:
    """Top and left of the square with the most texture: the sum of its gradients' square roots,
    which prefers an area full of detail to a single strong edge."""
    grey = image.astype(np.float64).mean(axis=2)
    gradient = np.zeros_like(grey)
    gradient[:, :-1] += np.sqrt(np.abs(np.diff(grey, axis=1)))
    gradient[:-1] += np.sqrt(np.abs(np.diff(grey, axis=0)))
    total = np.pad(gradient.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = (
        total[side_px:, side_px:]
        - total[:-side_px, side_px:]
        - total[side_px:, :-side_px]
        + total[:-side_px, :-side_px]
    )
    top, left = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return int(top), int(left)
