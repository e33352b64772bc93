"""The tables of a quality document: means beside the paper's, every image; as Markdown too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.iqa import PACKAGED

UNKNOWN = "-"


@dataclass(frozen=True)
class Row:
    """``best``: columns in which this row is the best of the document's own."""

    cells: tuple[str, ...]
    is_paper: bool = False
    best: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Table:
    headers: tuple[str, ...]
    rows: tuple[Row, ...]


def mean_table(document: Mapping[str, Any]) -> Table:
    """Methods as rows, metrics as columns; published rows follow, where the document has some."""
    metrics = document["metrics"]
    published = document["paper"]["table_2"] if document["paper"] else []
    names = [*metrics, *(n for n in _columns(published) if n not in metrics)]
    headers = tuple(metrics[n]["header"] if n in metrics else f"{n.upper()} (paper)" for n in names)
    best = {
        i + 1: _best(document["methods"], name, metrics[name]["higher_is_better"])
        for i, name in enumerate(names)
        if name in metrics
    }
    rows = [
        Row(
            (m["name"], *(shown(m["mean"].get(n), _decimals(metrics, n)) for n in names)),
            best=frozenset(i for i, winner in best.items() if m["name"] == winner),
        )
        for m in document["methods"]
    ]
    rows += [
        Row(
            (
                f"paper: {row['method']}",
                *(shown(row["values"].get(n), _decimals(metrics, n)) for n in names),
            ),
            is_paper=True,
        )
        for row in published
    ]
    return Table(("mean of images", *headers), tuple(rows))


def image_table(document: Mapping[str, Any], metric: str) -> Table:
    """Images as rows, methods as columns."""
    methods = document["methods"]
    decimals = _decimals(document["metrics"], metric)
    rows = [
        Row((pair, *(shown(m["images"][pair].get(metric), decimals) for m in methods)))
        for pair in methods[0]["images"]
    ]
    return Table(("image", *(m["name"] for m in methods)), tuple(rows))


def notes(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know: protocols, what is missing, where the paper's rows are from."""
    lines = [f"{m['header']}: {m['protocol']}." for m in document["metrics"].values()]
    missing = document["missing"]
    reasons = dict.fromkeys(missing.values())
    for reason in reasons:
        names = ", ".join(name.upper() for name, why in missing.items() if why == reason)
        lines.append(f"Missing: {names}: {reason}.")
    if document["paper"]:
        paper = document["paper"]
        lines.append(f"Paper: {paper['source']}. Table 2: {paper['protocol']}")
        if paper["caution"]:
            lines.append(paper["caution"])
    return lines


def efficiency_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table 3 of the paper."""
    headers = ("method", "PSNR", "MANIQA", "seconds", "trainable M")
    fields = ("psnr_y", "maniqa", "seconds", "trainable_millions")
    return Table(
        headers,
        tuple(
            Row((row["method"], *(f"{row[f]:g}" for f in fields)), is_paper=True) for row in rows
        ),
    )


def as_markdown(table: Table) -> str:
    """A Markdown table; the best of a column is bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---" + "|---:" * (len(table.headers) - 1) + "|"
    rows = [
        line([f"**{c}**" if i in row.best else c for i, c in enumerate(row.cells)])
        for row in table.rows
    ]
    return "\n".join([line(table.headers), rule, *rows])


def render_markdown(document: Mapping[str, Any], card: str) -> str:
    """The whole report, without pictures."""
    dataset = document["dataset"]
    parts = [
        f"# {dataset['name']}, {dataset['pairs']} pairs",
        "```\n" + card + "\n```",
        as_markdown(mean_table(document)),
        "\n".join(f"- {line}" for line in notes(document)),
    ]
    if document["paper"]:
        paper = document["paper"]
        parts += [
            f"## The paper's Table 3\n\n{paper['table_3_protocol']}",
            as_markdown(efficiency_table(paper["table_3"])),
        ]
    for name, metric in document["metrics"].items():
        if not metric["whole_set"]:
            parts += [f"## {metric['header']}", as_markdown(image_table(document, name))]
    return "\n\n".join(parts) + "\n"


def _columns(published: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(published[0]["values"]) if published else []


def _best(methods: Sequence[Mapping[str, Any]], metric: str, higher: bool) -> str | None:
    values = {
        m["name"]: m["mean"][metric]
        for m in methods
        if m["kind"] != "reference" and m["mean"].get(metric) is not None
    }
    if not values:
        return None
    name: str = (max if higher else min)(values, key=lambda key: values[key])
    return name


def _decimals(metrics: Mapping[str, Any], name: str) -> int:
    if name in metrics:
        return int(metrics[name]["decimals"])
    return next((packaged.decimals for packaged in PACKAGED if packaged.name == name), 4)


def shown(value: float | None, decimals: int) -> str:
    """A mean as tables have it; ``UNKNOWN`` where a metric was not computed."""
    return UNKNOWN if value is None else f"{value:.{decimals}f}"
