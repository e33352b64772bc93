"""The metric code against published figures: OSEDiff's images on RealSR and its per-image log.

  python -m benchmarks.proof --dataset realsr

The dataset is a folder with LR/, HR/, osediff/ (the published images) and osediff/metrics/*.log
(what their authors' tool printed for each). Every image is scored again by this project's code and
compared. Prints a machine card, a table and one JSON document as the last line. Exit codes: 0 all
within the limits, 1 something beyond them (the table says what), 11 no such dataset or metric.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import iqa, report
from benchmarks.command import Verdict, check_at_least_1, run_command
from benchmarks.errors import DatasetError
from benchmarks.pairs import find_outputs, find_pairs, select
from benchmarks.scores import (
    METRIC_NAMES,
    build_metrics,
    outputs_method,
    packaged_metric,
    score_pairs,
)
from rcod_train.errors import MissingPackage
from rcod_train.quality.pristine import load_pristine

SCHEMA_VERSION = 1
OUTPUTS = "osediff"
# What the log calls our metrics. Its values have six decimals; NIQE is held by its mean, since one
# patch near a rounding edge moves an image's value. LPIPS and DISTS were computed on a GPU there.
LOGGED_AS = {
    "psnr_y": "PSNR", "ssim_y": "SSIM", "niqe": "NIQE", "lpips": "LPIPS", "dists": "DISTS",
}  # fmt: skip
PER_IMAGE_LIMITS = {"psnr_y": 0.001, "ssim_y": 1e-5, "lpips": 5e-4, "dists": 5e-4}  # dB; none
MEAN_LIMITS = {"niqe": 0.02}  # of the published mean

_LINE = re.compile(r"/(?P<name>[^/|]+)\.\w+ \| (?P<values>.*) \| Runtime")
_VALUE = re.compile(r"(\w+): (-?[\d.]+)")


@dataclass(frozen=True)
class Proof:
    """One metric's agreement with the log over all images."""

    metric: str
    images: int
    mean: float
    published_mean: float
    largest_difference: float  # absolute, of one image
    worst_image: str
    mean_off: float  # relative
    limit: str
    passed: bool


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", type=Path, required=True, metavar="DIR", help="LR/, HR/, osediff/")
    add("--metrics", nargs="+", choices=list(LOGGED_AS), default=list(METRIC_NAMES))
    add("--limit", type=int, metavar="N", help="only the first N images by name")
    add("--niqe-params", type=Path, metavar="FILE", help="as in benchmarks.quality")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> Verdict:
    """Score the published images, print card and table; the document and whether all agree."""
    from tqdm import tqdm

    check_at_least_1(arguments, "limit")
    dataset, names = arguments.dataset, arguments.metrics
    card = report.machine_card()
    pairs = select(find_pairs(dataset), None, arguments.limit)
    published = read_log(find_log(dataset / OUTPUTS / "metrics"))
    built_in = [name for name in names if name in METRIC_NAMES]
    metrics = build_metrics(built_in, lambda: load_pristine(arguments.niqe_params))
    packaged, missing = iqa.load(names)
    if missing:
        raise MissingPackage("; ".join(missing.values()))
    metrics += [packaged_metric(loaded) for loaded in packaged]
    method = outputs_method(OUTPUTS, find_outputs(dataset / OUTPUTS, pairs))
    found = {
        score.pair: score.values
        for score in tqdm(
            score_pairs(pairs, [method], metrics), total=len(pairs), unit="image", disable=None
        )
    }
    proofs = [
        compare(
            metric.name,
            {name: values[metric.name] for name, values in found.items()},
            {name: _published(published, name, metric.name) for name in found},
        )
        for metric in metrics
    ]
    print(report.format_card(card))
    print(f"dataset   {dataset.name}, {len(pairs)} images of {OUTPUTS}\n")
    print(format_proofs(proofs))
    passed = all(proof.passed for proof in proofs)
    document = report.document(
        "proof",
        SCHEMA_VERSION,
        card,
        dataset={"name": dataset.name, "outputs": OUTPUTS, "pairs": len(pairs)},
        passed=passed,
        metrics=[asdict(proof) for proof in proofs],
    )
    return Verdict(document, passed)


def find_log(folder: Path) -> Path:
    """The one log of a folder.

    Raises:
        DatasetError: there is none, or more than one.
    """
    logs = sorted(folder.glob("*.log"))
    if len(logs) != 1:
        raise DatasetError(f"{folder}: expected one published .log file, found {len(logs)}.")
    return logs[0]


def read_log(path: Path) -> dict[str, dict[str, float]]:
    """Image name -> metric as the log names it -> value.

    Raises:
        DatasetError: no line gives an image's values.
    """
    scores = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := _LINE.search(line):
            scores[found["name"]] = {
                metric: float(value) for metric, value in _VALUE.findall(found["values"])
            }
    if not scores:
        raise DatasetError(
            f'{path}: expected lines such as "dir/NAME.png | PSNR: 25.79; ... | Runtime: ...", '
            "found none."
        )
    return scores


def compare(
    metric: str, found: Mapping[str, float | None], published: Mapping[str, float]
) -> Proof:
    """Found values against published ones, image by image and in the mean."""
    values = {name: float("nan") if v is None else v for name, v in found.items()}
    differences = {name: abs(values[name] - published[name]) for name in values}
    # A value that is not a number is the worst of all.
    worst = max(differences, key=lambda name: (differences[name] != differences[name],
                                               differences[name]))  # fmt: skip
    mean = sum(values.values()) / len(values)
    published_mean = sum(published[name] for name in values) / len(values)
    off = mean / published_mean - 1
    if metric in PER_IMAGE_LIMITS:
        limit = f"{PER_IMAGE_LIMITS[metric]:g} an image"
        passed = differences[worst] <= PER_IMAGE_LIMITS[metric]
    else:
        limit = f"{MEAN_LIMITS[metric]:.0%} of the mean"
        passed = abs(off) <= MEAN_LIMITS[metric]
    return Proof(
        metric, len(values), mean, published_mean, differences[worst], worst, off, limit, passed
    )


def format_proofs(proofs: Sequence[Proof]) -> str:
    headers = ("metric", "images", "mean", "published", "mean off", "largest of one image", "where",
               "limit", "")  # fmt: skip
    rows = [
        [p.metric, str(p.images), f"{p.mean:.6f}", f"{p.published_mean:.6f}", f"{p.mean_off:+.4%}",
         f"{p.largest_difference:.2e}", p.worst_image, p.limit, "ok" if p.passed else "BEYOND"]
        for p in proofs
    ]  # fmt: skip
    return report.format_table(headers, rows)


def _published(scores: Mapping[str, Mapping[str, float]], name: str, metric: str) -> float:
    try:
        return scores[name][LOGGED_AS[metric]]
    except KeyError:
        raise DatasetError(
            f"{name}: expected its {LOGGED_AS[metric]} in the published log, found none."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
