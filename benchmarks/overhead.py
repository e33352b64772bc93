"""What a run costs beside the graphs, and what several images in work at once gain.

  python -m benchmarks.overhead

Two parts. "large": one image from file to file in this process, and how much of it no graph runs:
reading, writing, and what of upsampling, blending and colours is not done while graphs run (those
take a little longer for it). "folder": rcod-upscale on a folder as a
process, one image after another and with --jobs, in turns; with the processor time used, which
says what is left to gain. Prints a machine card, tables, and one JSON document as the last line.
Exit codes: those of rcod-upscale, and 11 for what can't be measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.command import check_at_least_1, run_command
from benchmarks.errors import CommandFailed
from benchmarks.picture import draw_picture
from benchmarks.processes import UPSCALE, write_photo
from rcod_runtime import Upscaler
from rcod_runtime.backends import Array, Session, Shapes
from rcod_runtime.chain import HostChain
from rcod_runtime.image_io import read_image, write_image

# 2: around_graphs is what no graph ran beside; before, tiles_blending_colours was all such work
SCHEMA_VERSION = 2
PARTS = ("large", "folder")


@dataclass(frozen=True)
class OverheadConfig:
    """What is measured, and how often. Sides in pixels of the input."""

    bundle: Path | None
    backend: str
    large_px: int
    photo_px: int
    photos: int
    jobs: int
    runs: int
    parts: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    add("--backend", default="openvino", help="default: %(default)s")
    add("--large", type=int, default=1024, metavar="PX", help="side (default: %(default)s)")
    add("--size", type=int, default=512, metavar="PX", help="of the folder's (%(default)s)")
    add("--photos", type=int, default=8, metavar="N", help="in the folder (%(default)s)")
    add("--jobs", type=int, default=2, metavar="N", help="at once (default: %(default)s)")
    add("--runs", type=int, default=5, metavar="N", help="of everything (default: %(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(_config(arguments)), arguments.json)


def _config(arguments: argparse.Namespace) -> OverheadConfig:
    check_at_least_1(arguments, "large", "size", "photos", "jobs", "runs")
    return OverheadConfig(
        arguments.bundle,
        arguments.backend,
        arguments.large,
        arguments.size,
        arguments.photos,
        arguments.jobs,
        arguments.runs,
        tuple(part for part in PARTS if part in arguments.parts),
    )


def run(config: OverheadConfig) -> str:
    """Measure, print card and tables, and return the JSON document."""
    card = report.machine_card()
    results: dict[str, Any] = dict.fromkeys(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        if "large" in config.parts:
            results["large"] = measure_large(config, Path(folder))
        if "folder" in config.parts:
            results["folder"] = measure_folder(config, Path(folder))
    print(report.format_card(card))
    _print_results(config, results)
    return report.document("overhead", SCHEMA_VERSION, card, backend=config.backend, **results)


def measure_large(config: OverheadConfig, folder: Path) -> dict[str, Any]:
    """Seconds of each step from file to file, medians, and the share in which no graph ran, taken
    within each run. One run before them compiles the graphs and is not counted."""
    photo, out = write_photo(folder, config.large_px), folder / "large.png"
    spent: Counter[str] = Counter()
    rows: list[dict[str, float]] = []
    with Upscaler(config.bundle, "cpu", config.backend) as upscaler:
        chosen = upscaler.backend  # with the precision that it chose
        chain = upscaler._chain
        assert isinstance(chain, HostChain), "the CPU's backends are host chains"
        chain._sessions = {
            name: _Timed(session, spent) for name, session in chain._sessions.items()
        }
        for _ in range(1 + config.runs):
            spent.clear()
            begin = time.perf_counter()
            pixels = read_image(photo).pixels
            read = time.perf_counter()
            sr = upscaler(pixels)
            upscaled = time.perf_counter()
            write_image(out, sr)
            written = time.perf_counter()
            rows.append(
                {
                    "read": read - begin,
                    "graphs": spent["graphs"],
                    "around_graphs": upscaled - read - spent["graphs"],
                    "write": written - upscaled,
                    "whole": written - begin,
                }
            )
    shares = [1.0 - row["graphs"] / row["whole"] for row in rows[1:]]
    return {
        "side_px": config.large_px,
        "runs": config.runs,
        "backend": chosen,
        "seconds": {name: median(row[name] for row in rows[1:]) for name in rows[0]},
        "outside_share": median(shares),
        "outside_share_range": (min(shares), max(shares)),
        "file_bytes": out.stat().st_size,
    }


class _Timed:
    """A session that adds the time of its runs to an account."""

    def __init__(self, session: Session, spent: Counter[str]) -> None:
        self._session, self._spent = session, spent

    def bind(self, shapes: Shapes, outputs: Shapes | None = None, common: bool = True) -> None:
        self._session.bind(shapes, outputs, common)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        begin = time.perf_counter()
        outputs = self._session.run(feeds)
        self._spent["graphs"] += time.perf_counter() - begin  # type: ignore[assignment]
        return outputs


def measure_folder(config: OverheadConfig, folder: Path) -> dict[str, Any]:
    """Seconds and processor seconds of rcod-upscale on a folder of photos, by --jobs.

    Raises:
        CommandFailed: the command failed.
    """
    photos = folder / "photos"
    photos.mkdir()
    for i in range(config.photos):
        write_image(photos / f"{i}.png", draw_picture(config.photo_px + i, config.photo_px)[i:])
    times: dict[int, list[tuple[float, float]]] = {1: [], config.jobs: []}
    order = list(times)
    for _ in range(config.runs):
        for jobs in order:
            times[jobs].append(_timed_command(config, photos, folder / "out", jobs))
        order.reverse()  # neither always follows the other
    gains = [
        one / several for (one, _), (several, _) in zip(times[1], times[config.jobs], strict=True)
    ]
    return {
        "side_px": config.photo_px,
        "photos": config.photos,
        "runs": config.runs,
        "jobs": {
            str(jobs): {
                "seconds": median(wall for wall, _ in measured),
                "cpu_seconds": median(cpu for _, cpu in measured),
                "cpus_busy": median(cpu / wall for wall, cpu in measured),
            }
            for jobs, measured in times.items()
        },
        "times_as_fast": median(gains),
        "times_as_fast_range": (min(gains), max(gains)),
    }


def _timed_command(
    config: OverheadConfig, photos: Path, out: Path, jobs: int
) -> tuple[float, float]:
    bundle = [] if config.bundle is None else ["--bundle", str(config.bundle)]
    options = ["--backend", config.backend, "--jobs", str(jobs), *bundle]
    before, begin = os.times(), time.perf_counter()
    done = subprocess.run(
        [*UPSCALE, str(photos), "-o", str(out), *options], capture_output=True, text=True
    )
    wall, after = time.perf_counter() - begin, os.times()
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise CommandFailed(
            f"rcod-upscale --jobs {jobs}: expected exit code 0, found {done.returncode}: {said[-1]}"
        )
    cpu = after.children_user + after.children_system
    return wall, cpu - before.children_user - before.children_system


def _print_results(config: OverheadConfig, results: Mapping[str, Any]) -> None:
    large, folder = (results[part] for part in PARTS)
    if large is not None:
        print(f"\nlarge, {config.large_px} x {config.large_px} px, {config.backend}: file to file")
        rows = [[name, f"{seconds:.3f}"] for name, seconds in large["seconds"].items()]
        print(report.format_table(("", "median s"), rows))
        low, high = large["outside_share_range"]
        print(f"outside the graphs {large['outside_share']:.1%} ({low:.1%} to {high:.1%})")
    if folder is not None:
        print(f"\nfolder, {config.photos} photos of {config.photo_px} x {config.photo_px} px")
        rows = [
            [jobs, *(f"{row[name]:.2f}" for name in ("seconds", "cpu_seconds", "cpus_busy"))]
            for jobs, row in folder["jobs"].items()
        ]
        print(report.format_table(("jobs", "median s", "processor s", "processors busy"), rows))
        low, high = folder["times_as_fast_range"]
        print(f"{folder['times_as_fast']:.2f} times as fast ({low:.2f} to {high:.2f})")
    print()


if __name__ == "__main__":
    sys.exit(main())
