"""The quality report as one HTML file: no other file, no network, images inside.

The comparisons are range inputs laid over the images: a mouse, a finger and the arrow keys move
them. Text from outside (names of folders and images) is escaped everywhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.plot import Point, draw_plot
from benchmarks.tables import Table, image_table, mean_table, notes

TEMPLATE = Path(__file__).with_name("page.html")
JPEG_QUALITY = 88
FIDELITY = "psnr_y"
# The first of these that was measured is the realism axis of the plot.
REALISM = ("musiq", "clipiqa", "maniqa", "niqe")

Image = npt.NDArray[np.uint8]
# Pair -> method -> JPEG.
Comparisons = Mapping[str, Mapping[str, bytes]]


def as_jpeg(image: Image) -> bytes:
    """(H, W, 3) uint8 -> a JPEG file without chroma subsampling."""
    from PIL import Image as Pillow

    file = BytesIO()
    Pillow.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return file.getvalue()


def render_page(
    document: Mapping[str, Any], paper: Sequence[Point], comparisons: Comparisons, card: str
) -> str:
    """The page of a quality document.

    Args:
        document: what benchmarks.quality prints as its last line, parsed.
        paper: published points for the plot.
        comparisons: what the before/after comparisons show.
    """
    title = f"{document['dataset']['name']}, {document['dataset']['pairs']} pairs"
    parts = ["<h2>Means</h2>", _html_table(mean_table(document))]
    parts += [f'<p class="faint">{escape(line)}</p>' for line in notes(document)]
    plot = _plot(document, paper)
    if plot:
        parts += ["<h2>Fidelity and realism</h2>", plot]
    if comparisons:
        parts += [
            "<h2>Before and after</h2>",
            '<p class="faint">Drag across a photo, or focus it and use the arrow keys.</p>',
        ]
        parts += [_figure(pair, list(methods)) for pair, methods in comparisons.items()]
    parts.append("<h2>Every image</h2>")
    parts += [
        f"<details><summary>{escape(document['metrics'][name]['header'])}</summary>"
        f"{_html_table(image_table(document, name))}</details>"
        for name in document["metrics"]
        if not document["metrics"][name]["whole_set"]
    ]
    images = {
        pair: {method: _data_uri(jpeg) for method, jpeg in methods.items()}
        for pair, methods in comparisons.items()
    }
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        card="<br>".join(escape(line) for line in card.splitlines()),
        body="\n".join(parts),
        images=json.dumps(images).replace("<", "\\u003c"),
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.headers)
    rows = []
    for row in table.rows:
        cells = "".join(
            f'<td class="best">{escape(text)}</td>' if i in row.best else f"<td>{escape(text)}</td>"
            for i, text in enumerate(row.cells)
        )
        rows.append(f'<tr class="{"paper" if row.is_paper else "ours"}">{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _plot(document: Mapping[str, Any], paper: Sequence[Point]) -> str:
    metrics = document["metrics"]
    realism = next((name for name in REALISM if name in metrics), None)
    if FIDELITY not in metrics or realism is None:
        return ""
    points = [
        Point(m["name"], m["mean"][FIDELITY], m["mean"][realism], m["kind"])
        for m in document["methods"]
        if m["mean"].get(FIDELITY) is not None and m["mean"].get(realism) is not None
    ]
    # Adaptive is a mean over images of several levels: no point of the path through them.
    points = [
        Point(p.label, p.x, p.y, "other") if p.kind == "model" and p.label == "adaptive" else p
        for p in points
    ]
    if not points:
        return ""
    better = "" if metrics[realism]["higher_is_better"] else ", smaller is better: axis turned"
    drawn = draw_plot(
        [*paper, *points],
        metrics[FIDELITY]["header"],
        metrics[realism]["header"] + better,
        not metrics[realism]["higher_is_better"],
    )
    return f"<figure>{drawn}<figcaption>Up and right is better.</figcaption></figure>"


def _figure(pair: str, methods: Sequence[str]) -> str:
    def choice(label: str, chosen: str) -> str:
        options = "".join(
            f'<option value="{escape(m)}"{" selected" if m == chosen else ""}>{escape(m)}</option>'
            for m in methods
        )
        return f'<select aria-label="{escape(label)} of {escape(pair)}">{options}</select>'

    before = methods[0]
    after = next((m for m in methods if m == "neutral"), methods[min(1, len(methods) - 1)])
    return (
        f'<figure class="pair" data-pair="{escape(pair)}">'
        '<div class="stage" style="--at: 50%"><img alt=""><img alt="" class="over">'
        '<div class="edge"></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{escape(pair)}"></div>'
        f'<div class="sides">{choice("left", before)}{choice("right", after)}</div>'
        f"<figcaption>{escape(pair)}</figcaption></figure>"
    )


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
