r"""Latency, start-up and memory of a bundle, against PyTorch running the same checkpoint.

  python -m benchmarks.latency                                  the embedded model alone
  python -m benchmarks.latency --checkpoint checkpoints/nano    with PyTorch beside it
  python -m benchmarks.latency --checkpoint checkpoints/nano --quick \
      --gate benchmarks/gates/nano.json                         judged; for continuous integration

All variants run in turns in one process, on the same image and the same number of threads. Prints
a machine card, tables, and one JSON document as the last line. With a gate the figures are judged
(benchmarks/gate.py describes the file), otherwise reported. Exit codes: 1 a gate's threshold is not
reached (a table says which), those of rcod-upscale, and 11 for what can't be measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.command import Verdict, check_at_least_1, run_command
from benchmarks.eager import EAGER, MODES, Mode
from benchmarks.gate import (
    WHOLE,
    Gate,
    Judgement,
    as_document,
    check_runnable,
    format_judgements,
    judge,
    read_gate,
)
from benchmarks.processes import (
    measure_cold_start,
    measure_contestant,
    measure_import,
    measure_peak_memory,
    write_photo,
)
from benchmarks.steady import Comparison, Opened, check_comparable, open_comparison
from benchmarks.timing import Progress, time_in_turns, times_as_fast
from rcod_runtime import UsageError
from rcod_runtime.backends import BACKENDS, BackendName, installed, precisions
from rcod_runtime.bundle import default_bundle_path
from rcod_runtime.manifest import MANIFEST_FILE, read_manifest
from rcod_runtime.parallel import cpus_available

# 2: ratios are medians of each round's ratio; first calls, contestants, gate. 3: sweep, batch
# 4: one image is in the bundle's tiles, and tile_px says how large; before, always in a single one
# 5: start: contestants_side_px; side_px is the command's alone
SCHEMA_VERSION = 5
COLD_SIDE_PX = 128
MEMORY_SIDE_PX = 1024
PARTS = ("steady", "stages", "start", "memory")
PYTORCH = {
    "eager": MODES[0],
    "nhwc": MODES[1],
    "compile": MODES[2],
    "autocast": MODES[3],
    "autocast-nhwc": MODES[4],
}
QUICK_RUNS, QUICK_WARMUP = 7, 2
IN_THE_TIMER = {
    "steady": "image array in memory -> sr array in memory: tokens, upsampling, all graphs, "
    "blending, colour match; no files, no loading, no compiling",
    "stages": "one graph on inputs that are ready; sums leave out what is between the graphs",
    "start": "rcod-upscale as a new process, from its start to its end, image written; "
    "import: inside a running interpreter; contestants: new processes, numpy already imported",
    "memory": "peak resident memory of rcod-upscale as a new process, reading and writing included",
}


@dataclass(frozen=True)
class LatencyConfig:
    """What is measured, and how often."""

    comparison: Comparison
    sweep: tuple[Comparison, ...]  # the same at other sizes, levels and batches
    runs: int
    warmup: int
    start_runs: int
    parts: tuple[str, ...]
    gate: Gate | None = None


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
    add(
        "--size",
        type=int,
        nargs="+",
        default=[128],
        metavar="PX",
        help="side of the input, upscaled in the bundle's tiles as rcod-upscale does it (128)",
    )
    add("--level", nargs="+", default=["neutral"], help="levels of the bundle (neutral)")
    add(
        "--batch",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="square tiles run together (1). Of several sizes, levels or batches every combination "
        "is a steady state; the other parts measure the first",
    )
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
    add(
        "--pytorch",
        nargs="+",
        choices=PYTORCH,
        help="beside eager fp32, which ratios are to (default: all; with --quick none)",
    )
    add("--threads", type=int, metavar="N", help="of every variant (default: all CPUs)")
    add("--runs", type=int, metavar="N", help=f"timed runs each (30; --quick: {QUICK_RUNS})")
    add("--warmup", type=int, metavar="N", help=f"untimed runs each (5; --quick: {QUICK_WARMUP})")
    add("--start-runs", type=int, default=5, metavar="N", help="new processes (%(default)s)")
    add("--parts", nargs="+", choices=PARTS, help="default: all; --quick: steady, or the gate's")
    add("--gate", type=Path, metavar="FILE", help="thresholds; exit code 1 where one is missed")
    add("--quick", action="store_true", help="few runs of the steady state, eager fp32 alone")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(_config(arguments)), arguments.json)


def _config(arguments: argparse.Namespace) -> LatencyConfig:
    check_at_least_1(arguments, "size", "batch", "runs", "start_runs")
    gate = None if arguments.gate is None else read_gate(arguments.gate)
    if gate is not None and arguments.checkpoint is None:
        raise UsageError("--gate: its ratios are to PyTorch, which needs --checkpoint DIR.")
    usual: tuple[str, ...] = PARTS
    if arguments.quick:
        usual = () if gate is not None else ("steady",)
    parts = set(arguments.parts or usual)
    if gate is not None:  # what it judges is measured, whatever else is
        parts |= {"steady" if stage == WHOLE else "stages" for stage in gate.stages}
    runs, warmup = (QUICK_RUNS, QUICK_WARMUP) if arguments.quick else (30, 5)
    variants = _variants(arguments.backends, arguments.precision)
    comparison, *sweep = (
        Comparison(
            bundle=arguments.bundle,
            checkpoint=arguments.checkpoint,
            side_px=side_px,
            level=level,
            variants=variants,
            threads=arguments.threads or cpus_available(),
            modes=_modes(arguments.pytorch, arguments.quick),
            batch=batch,
        )
        for side_px, level, batch in product(arguments.size, arguments.level, arguments.batch)
    )
    return LatencyConfig(
        comparison,
        tuple(sweep),
        runs=runs if arguments.runs is None else arguments.runs,
        warmup=warmup if arguments.warmup is None else arguments.warmup,
        start_runs=arguments.start_runs,
        parts=tuple(part for part in PARTS if part in parts),
        gate=gate,
    )


def _modes(wanted: Sequence[str] | None, quick: bool) -> tuple[Mode, ...]:
    """The baseline always, and what else of PyTorch was asked for."""
    chosen = wanted or (() if quick else tuple(PYTORCH))
    return tuple(mode for name, mode in PYTORCH.items() if name == "eager" or name in chosen)


def _variants(
    backends: Sequence[BackendName] | None, wanted: Sequence[str] | None
) -> tuple[tuple[str, str], ...]:
    variants = tuple(
        (name, precision)
        for name in backends or filter(installed, BACKENDS)
        # fp32 first: what the others are compared with
        for precision in sorted(precisions(name), key=lambda precision: precision != "fp32")
        if wanted is None or precision in wanted
    )
    if not variants:
        raise UsageError(f"--precision {' '.join(wanted or ())}: no backend has it here.")
    return variants


def run(config: LatencyConfig) -> str | Verdict:
    """Measure the chosen parts, print card and tables, and return the JSON document."""
    card = report.machine_card()
    results: dict[str, Any] = dict.fromkeys(PARTS)
    comparison = config.comparison
    # The manifest alone: what is read of the graphs would be in memory for the first new process.
    manifest = read_manifest((comparison.bundle or default_bundle_path()) / MANIFEST_FILE)
    for each in (comparison, *config.sweep):
        check_comparable(each, manifest)
    model, missing = None, {}
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
            model, missing = opened.model, opened.missing
            if config.gate is not None:
                stages = tuple(opened.model["graph_sha256"])
                check_runnable(config.gate, tuple(opened.whole), stages, _taken())
            if "steady" in config.parts:
                results["steady"] = _steady(opened, comparison, config)
            if "stages" in config.parts:
                results["stages"] = {
                    stage: _timed(variants, config, stage)
                    for stage, variants in opened.stages().items()
                }
    sweep = []
    for other in config.sweep if "steady" in config.parts else ():
        with open_comparison(other) as opened:
            sweep.append(_steady(opened, other, config))
    print(report.format_card(card))
    if model is not None and "int8" in model["graph_precision"].values():
        print("graphs    " + ", ".join(" ".join(pair) for pair in model["graph_precision"].items()))
    _print_results(config, results)
    for point in sweep:
        _print_steady(point)
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    judgements: tuple[Judgement, ...] | None = None
    if config.gate is not None:
        parts = {WHOLE: results["steady"], **(results["stages"] or {})}
        ratios = {stage: part["times_as_fast_as_pytorch"] for stage, part in parts.items() if part}
        judgements = judge(config.gate, ratios, _taken())
        print(f"{format_judgements(judgements)}\n")
    document = report.document(
        "latency",
        SCHEMA_VERSION,
        card,
        config={
            "level": comparison.level,
            "threads": comparison.threads,
            "warmup": config.warmup,
        },
        sweep=sweep,
        model=model,
        in_the_timer={part: IN_THE_TIMER[part] for part in config.parts},
        missing=missing,
        gate=None if judgements is None else as_document(judgements),
        **results,
    )
    return Verdict(document, judgements is None or all(j.passed for j in judgements))


def _taken() -> set[str]:
    """The variants that ``auto`` takes on this machine, one of each backend."""
    return {f"{name} {precisions(name)[-1]}" for name in BACKENDS if installed(name)}


def _steady(opened: Opened, comparison: Comparison, config: LatencyConfig) -> dict[str, Any]:
    return {
        "side_px": comparison.side_px,
        "level": comparison.level,
        "batch": comparison.batch,
        "tile_px": opened.tile_px,
        "agreement": [asdict(agreement) for agreement in opened.agreements],
        "first_call_ms": opened.first_call_ms,
        **_timed(opened.whole, config, "whole"),
    }


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
        "contestants_side_px": config.comparison.side_px,
        "heavy_modules": sorted({name for entry in imports for name in entry.heavy_modules}),
        "contestants": {
            name: measure_contestant(task, config.start_runs)
            for name, task in _contestants(config.comparison).items()
        },
    }


def _contestants(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Tasks of benchmarks.contestant: every backend as it is, and the baseline."""
    common = {
        "bundle": None if comparison.bundle is None else str(comparison.bundle),
        "side_px": comparison.side_px,
        "level": comparison.level,
        "threads": comparison.threads,
    }
    tasks: dict[str, dict[str, Any]] = {
        f"{backend} {precision}": {**common, "backend": backend, "precision": precision}
        for backend, precision in comparison.variants
    }
    if comparison.checkpoint is not None:
        tasks[EAGER] = {**common, "checkpoint": str(comparison.checkpoint), "mode": EAGER}
    return tasks


def _timed(variants: Mapping[str, Any], config: LatencyConfig, title: str) -> dict[str, Any]:
    """Latencies of variants, and how many times as fast as PyTorch as it comes each is: the median
    of the rounds' ratios, so that what slows a round slows both sides of it."""
    with _progress(title, len(variants) * (config.runs + config.warmup)) as progress:
        times = time_in_turns(variants, config.runs, config.warmup, progress)
    latencies = {name: report.summarise(values) for name, values in times.items()}
    ratios = {
        name: times_as_fast(values, times[EAGER]) if EAGER in times else None
        for name, values in times.items()
    }
    return {
        "latency": {name: asdict(latency) for name, latency in latencies.items()},
        "times_as_fast_as_pytorch": {name: r and r.median for name, r in ratios.items()},
        "times_as_fast_p10_p90": {name: r and (r.p10, r.p90) for name, r in ratios.items()},
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
        print(f"\nwhole: {IN_THE_TIMER['steady']}")
        _print_steady(steady)
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
        print(f"\nnew processes, {comparison.side_px} x {comparison.side_px} px, medians:")
        rows = [
            [
                name,
                *(f"{cost[key]:.0f}" for key in ("import_ms", "load_ms", "first_ms", "second_ms")),
                "-" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 1e6:.0f}",
            ]
            for name, cost in start["contestants"].items()
        ]
        headers = ("", "import ms", "load ms", "first image ms", "second ms", "peak MB")
        print(report.format_table(headers, rows))
        print(f"torch and the like imported: {', '.join(start['heavy_modules']) or 'none'}")
    if memory is not None:
        print(
            f"\npeak memory, {MEMORY_SIDE_PX} x {MEMORY_SIDE_PX} px in: "
            f"{memory['peak_bytes'] / 1e6:.0f} MB, in {memory['seconds']:.1f} s"
        )
    print()


def _print_steady(steady: Mapping[str, Any]) -> None:
    side, batch = steady["side_px"], steady["batch"]
    tiles = "" if batch == 1 else f"{batch} tiles of "
    print(f"\nsteady state, {steady['level']}, {tiles}{side} x {side} px in")
    print(report.format_table(_HEADERS, _rows(steady)))
    first = steady["first_call_ms"].items()
    print("very first image, ms: " + ", ".join(f"{name} {ms:.0f}" for name, ms in first))
    for pair in steady["agreement"]:
        print(
            f"{pair['a']} and {pair['b']}: {pair['psnr_db']:.1f} dB, "
            f"at most {pair['max_abs_u8']} of 255 apart"
        )


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
