"""The fidelity-realism plot as SVG text: points in two axes, some of them joined to a path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 20, 54
TICKS = 6  # about
PATH_COLOUR, OTHER_COLOUR, PAPER_COLOUR = "#c2410c", "#1d4ed8", "#9ca3af"


@dataclass(frozen=True)
class Point:
    """A method. ``kind``: model (joined in this order), paper, or another's."""

    label: str
    x: float
    y: float
    kind: str


def draw_plot(
    points: Sequence[Point], x_title: str, y_title: str, y_rises_downwards: bool = False
) -> str:
    """One <svg> element. With ``y_rises_downwards`` smaller values stand higher: better is up."""
    x_ticks = ticks([p.x for p in points])
    y_ticks = ticks([p.y for p in points])
    x_low, x_high = x_ticks[0], x_ticks[-1]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        up = 1 - up if y_rises_downwards else up
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_title)} against {escape(x_title)}">'
    ]
    for x in x_ticks:
        px, bottom = place(x, y_high if y_rises_downwards else y_low)
        parts.append(f'<path class="grid" d="M{px} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{px}" y="{bottom + 18}" text-anchor="middle">{_shown(x)}</text>')
    for y in y_ticks:
        left, py = place(x_low, y)
        parts.append(f'<path class="grid" d="M{left} {py}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{left - 8}" y="{py + 4}" text-anchor="end">{_shown(y)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_title)}</text>'
    )
    parts.append(
        f'<text transform="translate(16 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_title)}</text>'
    )
    model = [place(p.x, p.y) for p in points if p.kind == "model"]
    if len(model) > 1:
        line = "L".join(f"{x} {y}" for x, y in model)
        parts.append(f'<path d="M{line}" fill="none" stroke="{PATH_COLOUR}" stroke-width="2"/>')
    colours = {"model": PATH_COLOUR, "paper": PAPER_COLOUR}
    placed = sorted(((*place(p.x, p.y), p) for p in points), key=lambda row: row[1])
    taken: list[tuple[float, float]] = []
    for px, py, point in placed:
        colour = colours.get(point.kind, OTHER_COLOUR)
        parts.append(
            f'<circle cx="{px}" cy="{py}" r="{3.5 if point.kind == "paper" else 5}" '
            f'fill="{colour}"><title>{escape(point.label)}: {point.x:.4g}, {point.y:.4g}'
            "</title></circle>"
        )
        text_y = py + 4
        while any(abs(px - x) < 120 and abs(text_y - y) < 11 for x, y in taken):
            text_y += 3
        taken.append((px, text_y))
        text = f'<text x="{px + 8}" y="{round(text_y, 1)}">{escape(point.label)}</text>'
        parts.append(text)
    return "\n".join([*parts, "</svg>"])


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around all values, at equal steps of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        first, last = first - 1, last + 1
    return [round(i * step, 10) for i in range(first, last + 1)]


def _shown(value: float) -> str:
    return f"{value:.6g}"
