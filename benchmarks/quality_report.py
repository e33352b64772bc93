"""The document of a quality run put together from its scores, and the report's three files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import iqa, paper, report
from benchmarks.gather import Gathered
from benchmarks.page import REALISM, render_page
from benchmarks.plot import Point
from benchmarks.scores import Method, Metric, mean_of
from benchmarks.tables import render_markdown
from rcod_runtime.files import write_whole


def metrics_document(metrics: Sequence[Metric], packaged: Sequence[iqa.Loaded]) -> dict[str, Any]:
    """What each metric is, in the order of the columns."""
    described: dict[str, Any] = {
        m.name: {
            "header": m.header,
            "decimals": m.decimals,
            "higher_is_better": m.higher_is_better,
            "protocol": m.protocol,
            "whole_set": False,
        }
        for m in metrics
    }
    for loaded in packaged:
        if loaded.of_folders is not None:
            described[loaded.packaged.name] = {
                "header": loaded.packaged.header,
                "decimals": loaded.packaged.decimals,
                "higher_is_better": loaded.packaged.higher_is_better,
                "protocol": loaded.protocol,
                "whole_set": True,
            }
    return described


def method_document(
    method: Method, metrics: Sequence[Metric], gathered: Gathered
) -> dict[str, Any]:
    """Means and every image of one method."""
    scores = [score for score in gathered.scores if score.method == method.name]
    means = {m.name: mean_of([score.values[m.name] for score in scores]) for m in metrics}
    return {
        "name": method.name,
        "kind": method.kind,
        "mean": {**means, **gathered.whole_set[method.name]},
        "images": {score.pair: score.values for score in scores},
    }


def paper_document(dataset: paper.Dataset | None, pairs: int) -> dict[str, Any] | None:
    """The paper's tables, and what keeps its rows from being compared, if anything does."""
    if dataset is None:
        return None
    caution = None
    whole_set = paper.pairs(dataset)
    if pairs != whole_set:
        theirs = "a number that is not known here" if whole_set is None else whole_set
        caution = (
            f"Not comparable as it stands: these are means of {pairs} pairs, the paper's of "
            f"{theirs}."
        )
    return {
        "source": paper.source(),
        "dataset": dataset,
        "protocol": paper.protocol("table_2"),
        "caution": caution,
        "table_2": [asdict(row) for row in paper.table_2(dataset)],
        "table_3_protocol": paper.protocol("table_3"),
        "table_3": [asdict(row) for row in paper.table_3()],
    }


def write_report(
    path: Path,
    dataset: paper.Dataset | None,
    document: str,
    comparisons: dict[str, dict[str, bytes]],
    card: report.MachineCard,
) -> None:
    """PATH.json, PATH.md and PATH.html."""
    content, lines = json.loads(document), report.format_card(card)
    points: list[Point] = []
    if dataset is not None and content["paper"]["caution"] is None:
        realism = next((name for name in REALISM if name in content["metrics"]), "niqe")
        points = [
            Point(row.method, row.values["psnr_y"], row.values[realism], "paper")
            for row in paper.table_2(dataset)
        ]
    texts = {
        "json": f"{document}\n",
        "md": render_markdown(content, lines),
        "html": render_page(content, points, comparisons, lines),
    }
    for suffix, text in texts.items():
        write_whole(path.with_name(f"{path.name}.{suffix}"), text.encode())
