"""Many calls on alternating sizes: memory, handles and threads must not grow.

  python -m benchmarks.soak                       10000 calls on each backend

A tiny bundle takes images of several sizes in tiles of more sizes than a backend keeps compiled, so
that compiling and forgetting is in the loop too. Prints a machine card, a table, and one JSON
document as the last line; growth is the slope of a line through the samples of the second half.
Exit codes: those of rcod-upscale, 11 what can't be measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.command import run_command
from benchmarks.errors import BenchmarkError
from benchmarks.picture import draw_picture
from rcod_runtime import Upscaler, UsageError
from rcod_runtime.backends import BACKENDS, installed

SCHEMA_VERSION = 1
SIZES = ((8, 8), (8, 16), (16, 8), (24, 8), (8, 32), (40, 40), (5, 7))  # height, width
REALISM = ("fidelity", "adaptive", 0.7)
TILES_PX = (32, 64, 96, 128, 160)  # one more than openvino keeps compiled


@dataclass(frozen=True)
class Sample:
    """What the process holds after ``calls`` calls."""

    calls: int
    resident_bytes: int
    files: int
    threads: int


@dataclass(frozen=True)
class Soak:
    """One backend. Growth is for 1000 calls, over the second half of them."""

    backend: str
    samples: tuple[Sample, ...]
    resident_bytes_growth: float
    files_growth: float
    threads_growth: float


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--calls", type=int, default=10000, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(arguments.calls), arguments.json)


def run(calls: int) -> str:
    """Soak every installed backend, print card and table, return the JSON document."""
    from tests.runtime.fakes import make_bundle

    if calls < 40:
        raise UsageError(f"--calls {calls}: expected at least 40.")
    card = report.machine_card()
    soaks = []
    with tempfile.TemporaryDirectory() as folder:
        make_bundle(Path(folder) / "bundle")
        for backend in filter(installed, BACKENDS):
            soaks.append(soak(Path(folder) / "bundle", backend, calls, max(1, calls // 40)))
    print(report.format_card(card))
    rows = [
        [
            s.backend,
            *(f"{sample.resident_bytes / 2**20:.1f}" for sample in _three(s.samples)),
            f"{s.resident_bytes_growth / 1024:.1f}",
            f"{s.samples[0].files} to {s.samples[-1].files}",
            f"{s.samples[0].threads} to {s.samples[-1].threads}",
        ]
        for s in soaks
    ]
    print(report.format_table(_HEADERS, rows))
    return report.document(
        "soak",
        SCHEMA_VERSION,
        card,
        config={"calls": calls, "sizes": SIZES, "realism": REALISM, "tiles_px": TILES_PX},
        backends=[asdict(s) for s in soaks],
    )


_HEADERS = (
    "", "MB, start", "half", "end", "KB in 1000 calls", "open files", "threads",
)  # fmt: skip


def _three(samples: Sequence[Sample]) -> tuple[Sample, Sample, Sample]:
    return samples[0], samples[len(samples) // 2], samples[-1]


def soak(bundle: Path, backend: str, calls: int, every: int) -> Soak:
    """Call an Upscaler on alternating sizes; the first round of all comes before the samples.

    Raises:
        BenchmarkError: this system doesn't tell what a process holds.
    """
    images = [draw_picture(height, width) for height, width in SIZES]
    samples = []
    with Upscaler(bundle, backend=backend, precision="fp32") as upscaler:
        for number in range(-len(SIZES) * len(TILES_PX) * len(REALISM), calls + 1):
            if number >= 0 and number % every == 0:
                samples.append(_sample(number))
            upscaler(
                images[number % len(images)],
                REALISM[number % len(REALISM)],
                tile_px=TILES_PX[number // len(images) % len(TILES_PX)],
                overlap_px=0,
            )
        name = upscaler.backend
    return Soak(
        name,
        tuple(samples),
        *(_growth(samples, field) for field in ("resident_bytes", "files", "threads")),
    )


def _sample(calls: int) -> Sample:
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        files = len(os.listdir("/proc/self/fd"))
        threads = len(os.listdir("/proc/self/task"))
    except OSError as exc:
        raise BenchmarkError(f"/proc/self: can't be read ({exc.strerror}); Linux has it.") from exc
    return Sample(calls, pages * os.sysconf("SC_PAGE_SIZE"), files, threads)


def _growth(samples: Sequence[Sample], field: str) -> float:
    """Least squares over the second half, for 1000 calls."""
    half = samples[len(samples) // 2 :]
    calls = np.array([sample.calls for sample in half], np.float64)
    values = np.array([getattr(sample, field) for sample in half], np.float64)
    return float(np.polyfit(calls, values, 1)[0] * 1000)


if __name__ == "__main__":
    sys.exit(main())
