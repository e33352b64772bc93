"""Score a bundle, or folders of finished images, against a dataset of real pairs.

  python -m benchmarks.quality --dataset realsr                      the embedded model
  python -m benchmarks.quality --dataset realsr --bundle my_bundle --names-ending 5 0
  python -m benchmarks.quality --dataset realsr --outputs osediff    images made elsewhere
  python -m benchmarks.quality --dataset realsr --paper RealSR --report reports/realsr

The dataset is a folder with LR/ and HR/; images pair up by name. Prints a machine card, a table of
means, and one JSON document as the last line; --report writes it with a Markdown and an HTML page.
PSNR, SSIM and NIQE are built in; the others need another package or its weights (benchmarks.iqa)
and are marked as missing where these can't be had. Exit codes: those of rcod-upscale, and 11 for
what is wrong with the dataset or a metric.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import iqa, paper, report
from benchmarks.command import (
    Verdict,
    check_at_least_1,
    check_can_write,
    make_folder,
    run_command,
)
from benchmarks.gather import gather
from benchmarks.pairs import Pair, find_outputs, find_pairs, select
from benchmarks.quality_report import (
    method_document,
    metrics_document,
    paper_document,
    write_report,
)
from benchmarks.scores import (
    BICUBIC,
    GROUND_TRUTH,
    METRIC_NAMES,
    Image,
    Method,
    Metric,
    build_metrics,
    outputs_method,
    packaged_metric,
    scale_of,
)
from benchmarks.tables import mean_table
from rcod_runtime import Upscaler, UsageError
from rcod_train.quality.pristine import load_pristine

# 2: metrics have a header, missing ones a reason, the paper's rows beside. 3: PIQE of RGB, which
# had its red and blue swapped before
SCHEMA_VERSION = 3
ALL_METRICS = (*METRIC_NAMES, *(packaged.name for packaged in iqa.PACKAGED))
COMPARED = 4  # photos of a report with before/after comparisons


@dataclass(frozen=True)
class QualityConfig:
    """What is compared on what. ``levels`` None: all of the bundle; empty: no model is run."""

    dataset: Path
    bundle: Path | None
    levels: tuple[str | float, ...] | None
    backend: str
    precision: str
    threads: int
    outputs: tuple[Path, ...]
    endings: tuple[str, ...] | None
    limit: int | None
    metrics: tuple[str, ...]
    niqe_params: Path | None
    strips: tuple[str, ...]
    strips_dir: Path | None
    paper: paper.Dataset | None
    report: Path | None  # path of three files, without suffix
    compare: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", type=Path, required=True, metavar="DIR", help="folder with LR/ and HR/")
    add("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    add(
        "--levels",
        nargs="+",
        metavar="LEVEL",
        help="names, adaptive, or numbers in 0..1 (default: all levels of the bundle)",
    )
    add("--backend", choices=("auto", "openvino", "onnxruntime"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--threads", type=int, default=0, metavar="N", help="compute threads (default: all)")
    add(
        "--outputs",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders of finished images, one row each; a model is then run only with --bundle "
        "or --levels",
    )
    add(
        "--names-ending",
        nargs="+",
        metavar="TEXT",
        help="only images whose name ends so, before what all names end in (RealSR's _LR4)",
    )
    add("--limit", type=int, metavar="N", help="only the first N images by name")
    add(
        "--metrics",
        nargs="+",
        choices=ALL_METRICS,
        metavar="NAME",
        default=list(ALL_METRICS),
        help=f"of {', '.join(ALL_METRICS)} (default: all that can be had)",
    )
    add(
        "--niqe-params",
        type=Path,
        metavar="FILE",
        help="NIQE's pristine parameters, .npz or .mat (default: an installed package's)",
    )
    add("--strips", nargs="+", default=[], metavar="NAME", help="images to draw a strip of")
    add("--strips-dir", type=Path, metavar="DIR", help="where strips go, as NAME.png")
    add("--paper", choices=paper.DATASETS, help="set these rows of the paper beside the results")
    add("--report", type=Path, metavar="PATH", help="write PATH.json, PATH.md and PATH.html")
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"images with before/after comparisons in the report (default: {COMPARED} of them)",
    )
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(_config(arguments)), arguments.json)


def _config(arguments: argparse.Namespace) -> QualityConfig:
    levels: tuple[str | float, ...] | None = None
    if arguments.levels is not None:
        levels = tuple(_level(text) for text in arguments.levels)
    elif arguments.outputs and arguments.bundle is None:
        levels = ()
    if bool(arguments.strips) != (arguments.strips_dir is not None):
        raise UsageError("--strips and --strips-dir: expected both or none.")
    if arguments.report is not None and not arguments.report.name:
        raise UsageError(
            f"--report {arguments.report}: expected the path of its files without a suffix, "
            "such as reports/realsr."
        )
    check_at_least_1(arguments, "limit")
    return QualityConfig(
        dataset=arguments.dataset,
        bundle=arguments.bundle,
        levels=levels,
        backend=arguments.backend,
        precision=arguments.precision,
        threads=arguments.threads,
        outputs=tuple(arguments.outputs),
        endings=None if arguments.names_ending is None else tuple(arguments.names_ending),
        limit=arguments.limit,
        metrics=tuple(dict.fromkeys(arguments.metrics)),
        niqe_params=arguments.niqe_params,
        strips=tuple(arguments.strips),
        strips_dir=arguments.strips_dir,
        paper=arguments.paper,
        report=arguments.report,
        compare=tuple(arguments.compare),
    )


def _level(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def run(config: QualityConfig) -> Verdict:
    """Score everything, print card and table, and return the JSON document; the report is written
    after it."""
    if config.report is not None:
        check_can_write(config.report.with_name(f"{config.report.name}.html"))
    card = report.machine_card()
    pairs = select(find_pairs(config.dataset), config.endings, config.limit)
    built_in = [name for name in config.metrics if name in METRIC_NAMES]
    metrics = build_metrics(built_in, lambda: load_pristine(config.niqe_params))
    packaged, missing = iqa.load(config.metrics)
    metrics += [packaged_metric(loaded) for loaded in packaged if loaded.of_image is not None]
    strips = {_chosen_name("--strips", name, pairs) for name in config.strips}
    compared = {_chosen_name("--compare", name, pairs) for name in config.compare}
    if config.report is not None and not compared:
        compared = {pair.name for pair in pairs[:: max(1, len(pairs) // COMPARED)][:COMPARED]}
    if config.strips_dir is not None:
        make_folder("--strips-dir", config.strips_dir)
    with ExitStack() as stack:
        methods, model = _methods(config, pairs, stack)
        gathered = gather(pairs, methods, metrics, packaged, strips, config.strips_dir, compared)
    document = report.document(
        "quality",
        SCHEMA_VERSION,
        card,
        dataset={"name": config.dataset.name, "pairs": len(pairs)},
        model=model,
        metrics=metrics_document(metrics, packaged),
        missing=missing,
        paper=paper_document(config.paper, len(pairs)),
        methods=[method_document(method, metrics, gathered) for method in methods],
    )
    _print(config, card, json.loads(document), len(pairs), metrics)
    path = config.report
    if path is None:
        return Verdict(document, passed=True)
    return Verdict(
        document,
        passed=True,
        write_more=lambda: write_report(path, config.paper, document, gathered.comparisons, card),
    )


def _print(
    config: QualityConfig,
    card: report.MachineCard,
    document: dict[str, Any],
    pairs: int,
    metrics: Sequence[Metric],
) -> None:
    print(report.format_card(card))
    print(f"dataset   {config.dataset.name}, {pairs} pairs")
    if document["model"] is not None:
        print(f"model     {document['model']['name']}, {document['model']['backend']}")
    for metric in metrics:
        print(f"{metric.name:<9} {metric.protocol}")
    for name, why in document["missing"].items():
        print(f"missing   {name}: {why}")
    print()
    table = mean_table(document)
    print(report.format_table(table.headers, [row.cells for row in table.rows]))


def _methods(
    config: QualityConfig, pairs: Sequence[Pair], stack: ExitStack
) -> tuple[list[Method], dict[str, Any] | None]:
    """What is compared, and a description of the model where one runs."""
    methods = [BICUBIC]
    methods += [outputs_method(d.resolve().name, find_outputs(d, pairs)) for d in config.outputs]
    model = None
    if config.levels != ():
        upscaler = stack.enter_context(
            Upscaler(
                config.bundle,
                backend=config.backend,
                precision=config.precision,
                threads=config.threads,
            )
        )
        manifest = upscaler.manifest
        levels = config.levels or tuple(level.name for level in manifest.levels)
        methods += [_level_method(upscaler, level) for level in levels]
        model = {
            "name": manifest.identity.name,
            "family": manifest.identity.family,
            "backend": upscaler.backend,
            "graph_sha256": {n: graph.content_sha256 for n, graph in manifest.graphs.items()},
        }
    methods.append(GROUND_TRUTH)
    names = [method.name for method in methods]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UsageError(
            f"two rows would be named {sorted(repeated)[0]!r}. Name each level once, "
            "and rename folders of outputs that are named alike."
        )
    return methods, model


def _level_method(upscaler: Upscaler, level: str | float) -> Method:
    def upscaled(pair: Pair, lq: Image, hq: Image) -> Image:
        sr: Image = upscaler(lq, level, scale_of(pair, lq, hq)).astype(np.uint8, copy=False)
        return sr

    return Method(str(level), "model", upscaled)


def _chosen_name(option: str, name: str, pairs: Sequence[Pair]) -> str:
    stem = Path(name).stem if "." in name else name
    if stem not in {pair.name for pair in pairs}:
        raise UsageError(
            f"{option} {name}: expected one of the {len(pairs)} chosen images, "
            f"such as {pairs[0].name}."
        )
    return stem


if __name__ == "__main__":
    sys.exit(main())
