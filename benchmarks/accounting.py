"""Where the work of a bundle lies, and how far a run is from what the machine allows.

  python -m benchmarks.accounting                          the embedded model
  python -m benchmarks.accounting --bundle DIR --only-work any other, nothing run
  python -m benchmarks.accounting --full-size              RCOD_O's networks, without weights

For each graph at the bundle's tile, batch 1: multiply-accumulates, weight bytes, bytes that its
products (convolutions, matrix products, attention) read and write, its share of all work, and the
time floor on named GPUs from their data sheets. Then the floor on this CPU, from the rate of the
fastest matrix product and of copies measured in the same turns as the graphs, and measured/floor.
A floor is arithmetic at that rate, or weights, inputs and outputs once through memory, whichever
takes longer; Winograd convolutions need fewer products and may go below it. Prints a machine card,
tables and one JSON document as the last line. Exit codes: those of rcod-upscale, and 11.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.command import check_at_least_1, run_command
from benchmarks.errors import MissingPackage
from benchmarks.rates import COPY_BYTES, MACS, copy_call, matmul_calls
from benchmarks.timing import time_in_turns
from rcod_runtime.backends import BackendName, precisions
from rcod_runtime.parallel import cpus_available

SCHEMA_VERSION = 1
PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention")
BACKEND: BackendName = "openvino"
FULL_SIZE_TILE_PX = 512


@dataclass(frozen=True)
class Work:
    """One graph, one call. ``product_bytes``: activations that products read and write, as fp32."""

    macs: int
    parameters: int
    weight_bytes: int
    io_bytes: int
    product_bytes: int
    gpu_floor_ms: dict[str, float]  # by GPU, products in fp16


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accounting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    add("--full-size", action="store_true", help="RCOD_O's geometry; its graphs are not run")
    add("--only-work", action="store_true", help="count, but run and measure nothing")
    add("--threads", type=int, metavar="N", help="default: all CPUs")
    add("--runs", type=int, default=15, metavar="N", help="timed runs each (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> str:
    """Count, measure, print card and tables, and return the JSON document."""
    check_at_least_1(arguments, "runs")
    card = report.machine_card()
    threads = arguments.threads or cpus_available()
    if arguments.full_size:
        name, tile_px, work = count_full_size_work()
    else:
        name, tile_px, work = count_work(arguments.bundle)
    print(report.format_card(card))
    print(f"\n{name}, tile {tile_px} px, batch 1\n\n{work_table(work)}")
    measured: dict[str, Any] | None = None
    if not arguments.only_work:
        calls = {} if arguments.full_size else graph_calls(arguments.bundle, tile_px, threads)
        measured = measure(work, calls, threads, arguments.runs)
        print(f"\n{measured_table(measured, work)}\n")
    return report.document(
        "accounting",
        SCHEMA_VERSION,
        card,
        bundle=name,
        tile_px=tile_px,
        threads=threads,
        work={stage: asdict(part) for stage, part in work.items()},
        measured=measured,
    )


def count_work(bundle_path: Path | None) -> tuple[str, int, dict[str, Work]]:
    """Name, tile and the work of every graph of a bundle.

    Raises:
        MissingPackage: the graphs can't be read without the export extra.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as exc:
        raise MissingPackage(
            'counting work needs onnx, which is not installed: pip install "rcod[export]"'
        ) from exc
    from rcod_export.cost import GPUS, measure_cost
    from rcod_runtime.bundle import open_bundle

    bundle = open_bundle(bundle_path)
    tile = bundle.manifest.image.tile_px
    work = {}
    for name, graph in bundle.manifest.graphs.items():
        shapes = {t.name: t.sized(1, tile, tile) for t in graph.inputs}
        cost = measure_cost(bundle.graph_path(name), shapes)
        work[name] = Work(
            cost.macs,
            cost.parameters,
            cost.weight_bytes,
            cost.io_bytes,
            product_bytes(bundle.graph_path(name), shapes),
            {gpu.name: 1e3 * cost.floor_s(gpu, half=True) for gpu in GPUS},
        )
    return bundle.manifest.identity.name, tile, work


def product_bytes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of fp32 activations (not weights) that the products of a graph read and write."""
    from rcod_runtime.backends.openvino_backend import shared_core

    model = shared_core().read_model(path)
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    numbers = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() in PRODUCTS:
            ends = [end for end in op.input_values() if not _is_weight(end.get_node())]
            numbers += sum(math.prod(end.shape) for end in (*ends, op.output(0)))
    return 4 * numbers


def _is_weight(node: Any) -> bool:
    """A constant, or one behind a conversion or a reshape of constants."""
    inputs = [end.get_node() for end in node.input_values()]
    kind = node.get_type_name()
    return kind == "Constant" or (bool(inputs) and all(_is_weight(node) for node in inputs))


def count_full_size_work() -> tuple[str, int, dict[str, Work]]:
    """The same for RCOD_O's networks, weights in fp16.

    Raises:
        MissingPackage: PyTorch and diffusers are not installed.
    """
    try:
        from benchmarks.full_size_work import count_full_size
        from rcod_export.cost import GPUS, Cost
    except ImportError as exc:
        raise MissingPackage(
            f"the full-size networks need {exc.name}, which is not installed: "
            'pip install "rcod[export]"'
        ) from exc
    work = {}
    for name, stage in count_full_size(FULL_SIZE_TILE_PX).items():
        cost = Cost({}, stage.parameters, stage.macs, 2 * stage.parameters, 4 * stage.io)
        work[name] = Work(
            cost.macs,
            cost.parameters,
            cost.weight_bytes,
            cost.io_bytes,
            4 * stage.activations,
            {gpu.name: 1e3 * cost.floor_s(gpu, half=True) for gpu in GPUS},
        )
    return "RCOD_O, full size", FULL_SIZE_TILE_PX, work


def graph_calls(
    bundle_path: Path | None, tile_px: int, threads: int
) -> dict[str, Callable[[], object]]:
    """ "GRAPH PRECISION" -> one call of that graph on a whole tile."""
    from benchmarks.graphs import graph_stages
    from benchmarks.picture import draw_picture
    from rcod_runtime.bundle import open_bundle

    manifest = open_bundle(bundle_path).manifest
    side = tile_px // manifest.image.scale
    calls: dict[str, Callable[[], object]] = {}
    for precision in precisions(BACKEND):
        stages = graph_stages(
            bundle_path, BACKEND, precision, threads, draw_picture(side, side),
            manifest.levels[0].name, tile_px,
        )  # fmt: skip
        calls |= {f"{stage} {precision}": call for stage, call in stages.items()}
    return calls


def measure(
    work: Mapping[str, Work], graphs: Mapping[str, Callable[[], object]], threads: int, runs: int
) -> dict[str, Any]:
    """Rates of this CPU and times of the graphs, in turns; floors and ratios within rounds.

    Without ``graphs`` the floors alone.
    """
    kinds = tuple(precisions(BACKEND))
    matmuls = matmul_calls(threads, kinds)
    calls: dict[str, Callable[[], object]] = {"copy": copy_call(threads), **graphs}
    for precision, libraries in matmuls.items():
        calls |= {f"matmul {precision} {library}": call for library, call in libraries.items()}
    times = {
        name: np.asarray(values) * 1e-3
        for name, values in time_in_turns(calls, runs, warmup=3).items()
    }
    copy_rate = 2 * COPY_BYTES / times["copy"]
    by_precision = {}
    for precision in kinds:
        library = min(
            matmuls[precision], key=lambda name: median(times[f"matmul {precision} {name}"])
        )
        rate = MACS / times[f"matmul {precision} {library}"]
        floors = {
            stage: np.maximum(part.macs / rate, (part.weight_bytes + part.io_bytes) / copy_rate)
            for stage, part in work.items()
        }
        spent = {stage: times.get(f"{stage} {precision}") for stage in work}
        by_precision[precision] = {
            "matmul_library": library,
            "gmacs_per_s": median(rate) / 1e9,
            "stages": {stage: _against(spent[stage], floors[stage]) for stage in work},
            "all": _against(sum(spent.values()) if graphs else None, sum(floors.values())),
        }
    return {
        "backend": BACKEND,
        "runs": runs,
        "copy_gb_per_s": median(copy_rate) / 1e9,
        "matmul_ms": {
            name: 1e3 * median(values) for name, values in times.items() if "matmul" in name
        },
        "precisions": by_precision,
    }


def _against(seconds: Any, floors: Any) -> dict[str, float | None]:
    """Medians over rounds; ``seconds`` None: not run."""
    return {
        "median_ms": None if seconds is None else 1e3 * median(seconds),
        "floor_ms": 1e3 * median(floors),
        "measured_to_floor": None if seconds is None else median(seconds / floors),
    }


def work_table(work: Mapping[str, Work]) -> str:
    total = sum(part.macs for part in work.values())
    gpus = list(next(iter(work.values())).gpu_floor_ms)
    headers = ("graph", "GMAC", "share", "M parameters", "weights MB", "in+out MB", "products MB",
               *(f"{gpu} ms" for gpu in gpus))  # fmt: skip
    rows = [
        [
            name,
            f"{part.macs / 1e9:.2f}",
            f"{part.macs / total:.1%}",
            f"{part.parameters / 1e6:.2f}",
            f"{part.weight_bytes / 1e6:.1f}",
            f"{part.io_bytes / 1e6:.1f}",
            f"{part.product_bytes / 1e6:.1f}",
            *(f"{part.gpu_floor_ms[gpu]:.3f}" for gpu in gpus),
        ]
        for name, part in work.items()
    ]
    sums = [sum(getattr(part, field) for part in work.values())
            for field in ("parameters", "weight_bytes", "io_bytes", "product_bytes")]  # fmt: skip
    floors = [sum(part.gpu_floor_ms[gpu] for part in work.values()) for gpu in gpus]
    rows.append(
        [
            "all",
            f"{total / 1e9:.2f}",
            "",
            f"{sums[0] / 1e6:.2f}",
            *(f"{value / 1e6:.1f}" for value in sums[1:]),
            *(f"{floor:.3f}" for floor in floors),
        ]
    )
    return report.format_table(headers, rows)


def measured_table(measured: Mapping[str, Any], work: Mapping[str, Work]) -> str:
    """Measured times against floors, and the rates that these come from."""
    rows = []
    for precision, part in measured["precisions"].items():
        for stage in (*work, "all"):
            found = part["all"] if stage == "all" else part["stages"][stage]
            rows.append(
                [
                    f"{stage} {precision}",
                    *(
                        "-" if found[key] is None else f"{found[key]:.2f}"
                        for key in ("median_ms", "floor_ms", "measured_to_floor")
                    ),
                ]
            )
    rates = ", ".join(
        f"{precision} {part['gmacs_per_s']:.0f} GMAC/s ({part['matmul_library']})"
        for precision, part in measured["precisions"].items()
    )
    table = report.format_table(
        (measured["backend"], "median ms", "floor ms", "measured/floor"), rows
    )
    return f"products {rates}; copies {measured['copy_gb_per_s']:.1f} GB/s\n\n{table}"


if __name__ == "__main__":
    sys.exit(main())
