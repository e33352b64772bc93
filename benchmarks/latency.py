"""Latency, start-up and memory of a bundle, against PyTorch running the same checkpoint.

  python -m benchmarks.latency                                  the embedded model alone
  python -m benchmarks.latency --checkpoint runs/nano/merged    with PyTorch eager fp32 beside it

All variants run in turns in one process, on the same image and the same number of threads. Prints
a machine card, tables, and one JSON document as the last line. The figures are reported, not
judged. Exit codes: those of rcod-upscale, and 11 for what can't be measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.command import run_command
from benchmarks.processes import (
    measure_cold_start,
    measure_import,
    measure_peak_memory,
    write_photo,
)
from benchmarks.steady import EAGER, Comparison, open_comparison
from benchmarks.timing import Progress, time_in_turns
from rcod_runtime import UsageError
from rcod_runtime.backends import BACKENDS, BackendName, installed, precisions

SCHEMA_VERSION = 1
COLD_SIDE_PX = 128
MEMORY_SIDE_PX = 1024
PARTS = ("steady", "stages", "start", "memory")
IN_THE_TIMER = {
    "steady": "image array in memory -> sr array in memory: tokens, upsampling, all graphs, "
    "blending, colour match; no files, no loading, no compiling",
    "stages": "one graph on inputs that are ready; sums leave out what is between the graphs",
    "start": "rcod-upscale as a new process, from its start to its end, image written; "
    "import: inside a running interpreter",
    "memory": "peak resident memory of rcod-upscale as a new process, reading and writing included",
}


@dataclass(frozen=True)
class LatencyConfig:
    """What is measured, and how often."""

    comparison: Comparison
    runs: int
    warmup: int
    start_runs: int
    parts: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="the merged checkpoint the bundle was exported from, run in PyTorch eager fp32",
    )
    add("--size", type=int, default=128, metavar="PX", help="side of the input (%(default)s)")
    add("--level", default="neutral", help="a level of the bundle (default: %(default)s)")
    add(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        metavar="NAME",
        help="openvino, onnxruntime (default: those installed)",
    )
    add(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16"),
        help="of the backends (default: all they have on this machine)",
    )
    add("--threads", type=int, metavar="N", help="of every variant (default: all CPUs)")
    add("--runs", type=int, default=30, metavar="N", help="timed runs each (%(default)s)")
    add("--warmup", type=int, default=5, metavar="N", help="untimed runs each (%(default)s)")
    add("--start-runs", type=int, default=5, metavar="N", help="new processes (%(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(_config(arguments)), arguments.json)


def _config(arguments: argparse.Namespace) -> LatencyConfig:
    for name in ("size", "runs", "start_runs"):
        if getattr(arguments, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1."
            )
    return LatencyConfig(
        Comparison(
            bundle=arguments.bundle,
            checkpoint=arguments.checkpoint,
            side_px=arguments.size,
            level=arguments.level,
            variants=_variants(arguments.backends, arguments.precision),
            threads=arguments.threads or report.cpus_available(),
        ),
        runs=arguments.runs,
        warmup=arguments.warmup,
        start_runs=arguments.start_runs,
        parts=tuple(part for part in PARTS if part in arguments.parts),
    )


def _variants(
    backends: Sequence[BackendName] | None, wanted: Sequence[str] | None
) -> tuple[tuple[str, str], ...]:
    variants = tuple(
        (name, precision)
        for name in backends or filter(installed, BACKENDS)
        for precision in precisions(name)
        if wanted is None or precision in wanted
    )
    if not variants:
        raise UsageError(f"--precision {' '.join(wanted or ())}: no backend has it here.")
    return variants


def run(config: LatencyConfig) -> str:
    """Measure the chosen parts, print card and tables, and return the JSON document."""
    card = report.machine_card()
    results: dict[str, Any] = dict.fromkeys(PARTS)
    comparison = config.comparison
    model = None
    # New processes first: nothing of this one competes with them yet.
    with tempfile.TemporaryDirectory() as folder:
        if "start" in config.parts:
            results["start"] = _start(config, Path(folder))
        if "memory" in config.parts:
            photo = write_photo(Path(folder), MEMORY_SIDE_PX)
            results["memory"] = {
                "side_px": MEMORY_SIDE_PX,
                **asdict(measure_peak_memory(photo, comparison.command_options())),
            }
    if "steady" in config.parts or "stages" in config.parts:
        with open_comparison(comparison) as opened:
            model = opened.model
            if "steady" in config.parts:
                results["steady"] = {
                    "side_px": comparison.side_px,
                    "agreement": [asdict(agreement) for agreement in opened.agreements],
                    **_timed(opened.whole, config, "whole"),
                }
            if "stages" in config.parts:
                results["stages"] = {
                    stage: _timed(variants, config, stage)
                    for stage, variants in opened.stages().items()
                }
    print(report.format_card(card))
    _print_results(config, results)
    return report.document(
        "latency",
        SCHEMA_VERSION,
        card,
        config={
            "level": comparison.level,
            "threads": comparison.threads,
            "warmup": config.warmup,
        },
        model=model,
        in_the_timer={part: IN_THE_TIMER[part] for part in config.parts},
        **results,
    )


def _start(config: LatencyConfig, folder: Path) -> dict[str, Any]:
    photo = write_photo(folder, COLD_SIDE_PX)
    options = config.comparison.command_options()
    command_ms = measure_cold_start(photo, options, config.start_runs)
    imports = measure_import(config.start_runs)
    return {
        "side_px": COLD_SIDE_PX,
        "first_command_ms": command_ms[0],
        "command": asdict(report.summarise(command_ms)),
        "import_package": asdict(report.summarise([entry.package_ms for entry in imports])),
        "import_upscaler": asdict(report.summarise([entry.upscaler_ms for entry in imports])),
        "heavy_modules": sorted({name for entry in imports for name in entry.heavy_modules}),
    }


def _timed(variants: Mapping[str, Any], config: LatencyConfig, title: str) -> dict[str, Any]:
    """Latencies of variants, and how many times as fast as PyTorch as it comes each is."""
    with _progress(title, len(variants) * (config.runs + config.warmup)) as progress:
        times = time_in_turns(variants, config.runs, config.warmup, progress)
    latencies = {name: report.summarise(values) for name, values in times.items()}
    eager = latencies.get(EAGER)
    return {
        "latency": {name: asdict(latency) for name, latency in latencies.items()},
        "times_as_fast_as_pytorch": {
            name: eager.median_ms / latency.median_ms if eager else None
            for name, latency in latencies.items()
        },
    }


@contextmanager
def _progress(title: str, total: int) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(desc=title, total=total, unit="run", leave=False, disable=None) as bar:
        yield bar.update


def _print_results(config: LatencyConfig, results: Mapping[str, Any]) -> None:
    comparison = config.comparison
    steady, stages, start, memory = (results[part] for part in PARTS)
    print(f"run       {comparison.level}, {comparison.threads} threads, {config.warmup} warm-ups")
    if steady is not None:
        side = comparison.side_px
        print(f"\nsteady state, {side} x {side} px in: {IN_THE_TIMER['steady']}")
        print(report.format_table(_HEADERS, _rows(steady)))
        for pair in steady["agreement"]:
            print(
                f"{pair['a']} and {pair['b']}: {pair['psnr_db']:.1f} dB, "
                f"at most {pair['max_abs_u8']} of 255 apart"
            )
    if stages is not None:
        print(f"\nstages: {IN_THE_TIMER['stages']}")
        rows = [
            [f"{stage} {row[0]}", *row[1:]] for stage, part in stages.items() for row in _rows(part)
        ]
        print(report.format_table(_HEADERS, rows))
    if start is not None:
        print(f"\nstart, {COLD_SIDE_PX} x {COLD_SIDE_PX} px: {IN_THE_TIMER['start']}")
        names = {
            "rcod-upscale": "command",
            "import rcod_runtime": "import_package",
            "import, with Upscaler": "import_upscaler",
        }
        rows = [[name, *_times(start[key]), ""] for name, key in names.items()]
        print(report.format_table(_HEADERS, rows))
        print(f"rcod-upscale the first time: {start['first_command_ms']:.0f} ms")
        print(f"torch and the like imported: {', '.join(start['heavy_modules']) or 'none'}")
    if memory is not None:
        print(
            f"\npeak memory, {MEMORY_SIDE_PX} x {MEMORY_SIDE_PX} px in: "
            f"{memory['peak_bytes'] / 1e6:.0f} MB, in {memory['seconds']:.1f} s"
        )
    print()


_HEADERS = ("", "runs", "median ms", "p90 ms", "p99 ms", "min ms", "x pytorch")


def _rows(part: Mapping[str, Any]) -> list[Sequence[str]]:
    ratios = part["times_as_fast_as_pytorch"]
    return [
        [name, *_times(latency), "-" if ratios[name] is None else f"{ratios[name]:.2f}"]
        for name, latency in part["latency"].items()
    ]


def _times(latency: Mapping[str, float]) -> list[str]:
    fields = ("median_ms", "p90_ms", "p99_ms", "min_ms")
    return [f"{latency['runs']}", *(f"{latency[field]:.1f}" for field in fields)]


if __name__ == "__main__":
    sys.exit(main())
