"""A folder through one process with --jobs and through actors on a local Ray cluster, in turns.

  python -m benchmarks.cluster

Both do the same images with as many in work at once and as many threads. Each run is split by when
the written images are told: until the first one (starting up, opening the bundle), from the first
to the last, and until the process has ended. Prints a machine card, a table, and one JSON document
as the last line. Exit codes: those of rcod-upscale, and 11 for what can't be measured.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import report
from benchmarks.command import run_command
from benchmarks.errors import CommandFailed
from benchmarks.picture import draw_picture
from benchmarks.processes import UPSCALE
from rcod_runtime import UsageError
from rcod_runtime.image_io import write_image

SCHEMA_VERSION = 2  # 2: the one process had all processors before, not a thread for each job
PHASES = ("start", "images", "end")
MIN_PHOTOS = 3


@dataclass(frozen=True)
class ClusterConfig:
    """side_px: of the input photos; jobs: images in work at once, and threads that compute: one for
    each actor, shared by the images of the one process."""

    side_px: int
    photos: int
    jobs: int
    runs: int


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", type=int, default=128, metavar="PX", help="of the photos (default: %(default)s)")
    add("--photos", type=int, default=100, metavar="N", help="default: %(default)s")
    add("--jobs", type=int, default=2, metavar="N", help="at once (default: %(default)s)")
    add("--runs", type=int, default=3, metavar="N", help="of both (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(_config(arguments)), arguments.json)


def _config(arguments: argparse.Namespace) -> ClusterConfig:
    for name, least in (("size", 1), ("photos", MIN_PHOTOS), ("jobs", 1), ("runs", 1)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name} {getattr(arguments, name)}: expected at least {least}.")
    return ClusterConfig(arguments.size, arguments.photos, arguments.jobs, arguments.runs)


def run(config: ClusterConfig) -> str:
    """Measure, print card and table, and return the JSON document."""
    card = report.machine_card()
    ways = {
        "one process": ["--jobs", str(config.jobs), "--threads", str(config.jobs)],
        "ray": ["--ray", "local", "--jobs", str(config.jobs), "--threads", "1"],
    }
    times: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder, "photos"), Path(folder, "out")
        photos.mkdir()
        for i in range(config.photos):
            picture = draw_picture(config.side_px + i, config.side_px)[i:]
            write_image(photos / f"{i:04}.png", picture)
        order = list(ways)
        for _ in range(config.runs):
            for way in order:
                times[way].append(timed_run(photos, out, ways[way], config.photos))
                shutil.rmtree(out)
            order.reverse()  # neither always follows the other
    results = {way: _summary(rows, config.photos) for way, rows in times.items()}
    print(report.format_card(card))
    print(f"\n{config.photos} photos of {config.side_px} x {config.side_px} px, "
          f"{config.jobs} in work at once, medians of {config.runs}")  # fmt: skip
    _print_results(results)
    gains = [
        one["images"] / ray["images"]
        for one, ray in zip(times["one process"], times["ray"], strict=True)
    ]
    print(f"ray, from the first image to the last: {median(gains):.2f} times as fast "
          f"({min(gains):.2f} to {max(gains):.2f})\n")  # fmt: skip
    return report.document(
        "cluster", SCHEMA_VERSION, card, photos=config.photos, side_px=config.side_px,
        jobs=config.jobs, runs=config.runs, ways=results, times_as_fast=median(gains),
        times_as_fast_range=(min(gains), max(gains)),
    )  # fmt: skip


def timed_run(photos: Path, out: Path, options: Sequence[str], count: int) -> dict[str, float]:
    """Seconds of each phase of rcod-upscale on a folder.

    Raises:
        CommandFailed: it failed, or did not tell ``count`` images.
    """
    begin = time.perf_counter()
    told: list[float] = []
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(
            [*UPSCALE, str(photos), "-o", str(out), *options],
            stdout=subprocess.PIPE, stderr=messages, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        with process.stdout:
            for _ in process.stdout:
                told.append(time.perf_counter() - begin)
        code = process.wait()
        whole = time.perf_counter() - begin
        messages.seek(0)
        said = messages.read().strip().splitlines() or ["nothing on stderr"]
    if code != 0 or len(told) != count:
        raise CommandFailed(
            f"rcod-upscale {' '.join(options)}: expected exit code 0 and {count} images, found "
            f"{code} and {len(told)}: {said[-1]}"
        )
    return {"start": told[0], "images": told[-1] - told[0], "end": whole - told[-1]}


def _summary(rows: Sequence[Mapping[str, float]], count: int) -> dict[str, float]:
    seconds = {f"{phase}_s": median(row[phase] for row in rows) for phase in PHASES}
    rate = median((count - 1) / row["images"] for row in rows)
    return seconds | {"whole_s": median(sum(row.values()) for row in rows), "images_per_s": rate}


def _print_results(results: Mapping[str, Mapping[str, float]]) -> None:
    rows = [[way, *(f"{value:.2f}" for value in row.values())] for way, row in results.items()]
    head = ("", "to the first, s", "images, s", "to the end, s", "whole, s", "images a second")
    print(report.format_table(head, rows))


if __name__ == "__main__":
    sys.exit(main())
