"""The fidelity-realism curve of a quality document as a picture, and the images it does worst on.

  python -m benchmarks.quality --dataset realsr --levels 0 0.1 ... 1 --paper RealSR --json q.json
  python -m benchmarks.figures q.json --out docs/curve.png
  python -m benchmarks.ablation ... --json a.json
  python -m benchmarks.figures a.json --out docs/ablation.png

PSNR against NIQE: the levels joined by a line, other methods and the paper's rows as points. Prints
the names of the --worst images whose SSIM falls most from bicubic to the last level: failure cases,
for ``benchmarks.quality --strips``. Of an ablation every variant is a line. Exit codes: 0, 2, 6,
and 11 for a document that is neither.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError, MissingPackage
from rcod_runtime.errors import RcodError
from rcod_runtime.files import write_whole

FIDELITY, REALISM, STRUCTURE = "psnr_y", "niqe", "ssim_y"
BASELINE, ADAPTIVE = "bicubic", "adaptive"
# Places of a name, in points of print from its own: beside it, under it, over it.
PLACES = (
    ((5, 4), "left"), ((-5, 4), "right"), ((5, -11), "left"), ((-5, -11), "right"),
    ((0, 12), "center"), ((0, -14), "center"),
)  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    """A quality document with at least one level of a model, or an ablation's.

    Raises:
        BenchmarkError: it isn't one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        drawn = lines(document) if _is_ablation(document) else points(document)["model"]
        if not drawn:
            raise ValueError("no model in it")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BenchmarkError(
            f"{path}: expected a document of benchmarks.quality or benchmarks.ablation ({exc})."
        ) from exc
    return dict(document)


def _is_ablation(document: dict[str, Any]) -> bool:
    return bool(document["benchmark"] == "ablation")


def lines(ablation: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Variant -> (PSNR, NIQE) of its levels in order."""
    found = {}
    for name, variant in ablation["variants"].items():
        levels = [mean for level, mean in variant["levels"].items() if level != ADAPTIVE]
        pairs = [(mean.get(FIDELITY), mean.get(REALISM)) for mean in levels]
        found[name] = [pair for pair in pairs if None not in pair]
    return {name: line for name, line in found.items() if line}


def points(document: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """(name, PSNR, NIQE): the model's levels in order, other methods, and the paper's rows where
    nothing keeps them from being compared."""
    found: dict[str, list[tuple[str, float, float]]] = {"model": [], "other": [], "paper": []}
    for method in document["methods"]:
        x, y = (method["mean"].get(key) for key in (FIDELITY, REALISM))
        if x is None or y is None:
            continue
        found["model" if _is_level(method) else "other"].append((method["name"], x, y))
    paper = document.get("paper") or {}
    comparable = not paper.get("caution")
    for row in paper.get("table_2", []) if comparable else []:
        values = row["values"]
        if FIDELITY in values and REALISM in values:
            found["paper"].append((row["method"], values[FIDELITY], values[REALISM]))
    return found


def _is_level(method: dict[str, Any]) -> bool:
    """``adaptive`` is a choice among the levels, not one of them."""
    return bool(method["kind"] == "model" and method["name"] != ADAPTIVE)


def worst(document: dict[str, Any], count: int) -> list[str]:
    """Images whose SSIM falls most from bicubic to the last level; none without SSIM, bicubic or a
    level."""
    methods = {m["name"]: m["images"] for m in document["methods"]}
    levels = [m["images"] for m in document["methods"] if _is_level(m)]
    if BASELINE not in methods or not levels:
        return []
    fall = {
        name: methods[BASELINE][name][STRUCTURE] - values[STRUCTURE]
        for name, values in levels[-1].items()
        if STRUCTURE in values and STRUCTURE in methods[BASELINE].get(name, {})
    }
    return sorted(fall, key=lambda name: -fall[name])[:count]


def draw(document: dict[str, Any]) -> bytes:
    """The picture as PNG.

    Raises:
        MissingPackage: matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingPackage('matplotlib is missing. pip install "rcod[plot]"') from exc
    figure = Figure(figsize=(7.2, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    is_ablation = _is_ablation(document)
    title = (_draw_variants if is_ablation else _draw_levels)(axes, document)
    axes.invert_yaxis()
    axes.set(
        xlabel="PSNR of Y, dB", ylabel="NIQE (smaller is better: axis turned)",
        title=f"{title}; up and right is better",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    if not is_ablation:
        found = points(document)
        ends = found["model"][:1] + found["model"][-1:]
        _write_names(figure, axes, [*ends, *found["other"], *found["paper"]])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_levels(axes: Any, document: dict[str, Any]) -> str:
    found = points(document)
    styles = {"model": ("#c2410c", "o-"), "other": ("#1d4ed8", "s"), "paper": ("#9ca3af", "^")}
    for kind, rows in found.items():
        if rows:
            colour, style = styles[kind]
            label = {"model": document["model"]["name"], "paper": "paper's Table 2"}.get(kind)
            x, y = [row[1] for row in rows], [row[2] for row in rows]
            axes.plot(x, y, style, color=colour, label=label, markersize=5)
    axes.margins(x=0.09)  # names stand beside their points
    return f"{document['dataset']['name']}, {document['dataset']['pairs']} pairs"


def _write_names(figure: Any, axes: Any, named: list[tuple[str, float, float]]) -> None:
    """Each at the place by its point where it covers least of those before."""
    figure.draw_without_rendering()  # where things are is known from here on
    written: list[Any] = []
    for name, x, y in named:
        texts = [
            axes.annotate(name, (x, y), textcoords="offset points", xytext=offset, ha=side,
                          fontsize=8)
            for offset, side in PLACES
        ]  # fmt: skip
        boxes = [text.get_window_extent() for text in texts]
        covered = [sum(_shared(box, other) for other in written) for box in boxes]
        best = covered.index(min(covered))
        chosen = texts[best]
        written.append(boxes[best])
        for text in texts:
            if text is not chosen:
                text.remove()


def _shared(a: Any, b: Any) -> float:
    both = a.intersection(a, b)
    return 0.0 if both is None else float(both.width * both.height)


def _draw_variants(axes: Any, document: dict[str, Any]) -> str:
    """The first one is what the others are compared with."""
    for i, (name, line) in enumerate(lines(document).items()):
        x, y = zip(*line, strict=True)
        weight = 2.5 if i == 0 else 1
        axes.plot(x, y, "o-", color=f"C{i}", label=name, markersize=4, linewidth=weight)
    return "the same budget for all"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "document", type=Path, help="JSON document of benchmarks.quality, or ablation"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--worst", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        document = load(arguments.document)
        write_whole(arguments.out, draw(document))
    except RcodError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if not _is_ablation(document):
        print(" ".join(worst(document, arguments.worst)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
