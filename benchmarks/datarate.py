"""How many training samples the data workers make in a second.

  python -m benchmarks.datarate

A sample is one photo decoded, cut, mirrored, degraded to a quarter of its sides and enlarged again,
with the thumbnails for the visual tokens: everything up to the batch that a training step takes,
in worker processes as in a training. Nothing consumes the batches but the clock. Photos are drawn
and saved as JPEG, unless --data names some. Beside the rate, the processor time of the degradation
alone, in this process and on one thread: it holds on a busy machine too. Prints a machine card, a
table, and one JSON document as the last line. Exit codes: 0, 2 wrong arguments, 11 what can't be
measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import report
from benchmarks.command import check_at_least_1, run_command
from benchmarks.picture import draw_picture
from rcod_runtime import UsageError
from rcod_train.config import LoopConfig
from rcod_train.data import PhotoBatches, batches
from rcod_train.degradation import PRESETS, degrade
from rcod_train.photos import SCALE, Photo, find_photos

SCHEMA_VERSION = 1
TARGET = 6.0  # samples of 512 x 512 a second from two workers, on two processors
TOKENS_PX = 224  # the thumbnails of RCOD_O and RCOD_S
MARGIN_PX = 64  # by which drawn photos are larger than a sample
PHOTOS = 8


@dataclass(frozen=True)
class DatarateConfig:
    """What is measured, and how often. ``side_px`` is that of a sample."""

    presets: tuple[str, ...]
    workers: int
    side_px: int
    samples: int
    runs: int
    data: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.datarate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", nargs="+", choices=sorted(PRESETS), default=sorted(PRESETS))
    add("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    add("--side", type=int, default=512, metavar="PX", help="of a sample (default: %(default)s)")
    add("--samples", type=int, default=60, metavar="N", help="in a run (default: %(default)s)")
    add("--runs", type=int, default=3, metavar="N", help="of each preset (default: %(default)s)")
    add("--data", nargs="+", default=[], metavar="DIR", help="photos; default: drawn ones")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(_config(arguments)), arguments.json)


def _config(arguments: argparse.Namespace) -> DatarateConfig:
    check_at_least_1(arguments, "workers", "side", "samples", "runs")
    if arguments.side % SCALE:
        raise UsageError(f"--side {arguments.side}: expected a multiple of {SCALE}.")
    return DatarateConfig(
        tuple(arguments.presets),
        arguments.workers,
        arguments.side,
        arguments.samples,
        arguments.runs,
        tuple(arguments.data),
    )


def run(config: DatarateConfig) -> str:
    """Measure, print card and table, and return the JSON document."""
    card = report.machine_card()
    with tempfile.TemporaryDirectory() as folder:
        if not config.data:
            write_photos(Path(folder), config.side_px)
        photos = find_photos(config.data or (folder,), config.side_px)
        results = {preset: measure(config, photos, preset) for preset in config.presets}
    print(report.format_card(card))
    print(f"\n{config.workers} workers, samples of {config.side_px} x {config.side_px} px")
    rows = [
        [preset, f"{r['samples_per_s']:.1f}", "{:.1f} to {:.1f}".format(*r["samples_per_s_range"]),
         f"{r['degrade_cpu_ms']:.0f}"]
        for preset, r in results.items()
    ]  # fmt: skip
    headers = ("preset", "samples/s", "range", "degrade, processor ms")
    print(report.format_table(headers, rows))
    print(f"target: {TARGET:.0f} samples of 512 x 512 a second on two processors\n")
    settings = {k: v for k, v in asdict(config).items() if k not in ("presets", "data")}
    settings["drawn_photos"] = not config.data
    return report.document(
        "datarate", SCHEMA_VERSION, card, settings=settings, target=TARGET, presets=results
    )


def write_photos(folder: Path, side_px: int) -> None:
    """JPEGs of quality 95, all different, larger than a sample."""
    for i in range(PHOTOS):
        picture = draw_picture(side_px + MARGIN_PX, side_px + MARGIN_PX)
        Image.fromarray(np.roll(picture, 37 * i, axis=1)).save(folder / f"{i}.jpg", quality=95)


def measure(config: DatarateConfig, photos: list[Photo], preset: str) -> dict[str, Any]:
    """Samples a second from the workers, medians over the runs, and what degrading costs."""
    sample = LoopConfig(
        photos_per_batch=1, crops_per_photo=1, crop_px=config.side_px, context_px=config.side_px
    )
    rates = []
    for i in range(config.runs):
        dataset = PhotoBatches(photos, sample, i, TOKENS_PX, {preset: 1.0})
        rates.append(_rate(dataset, config.samples, config.workers))
    return {
        "samples_per_s": median(rates),
        "samples_per_s_range": (min(rates), max(rates)),
        "degrade_cpu_ms": 1e3 * _degrade_cpu_s(photos, preset, config),
    }


def _rate(dataset: PhotoBatches, samples: int, workers: int) -> float:
    """Between the arrivals of two samples, with every worker at work before, between and after."""
    lead = 2 * workers
    times = []
    for _ in batches(dataset, range(samples + 2 * lead), workers):
        times.append(time.perf_counter())
    return samples / (times[lead + samples - 1] - times[lead - 1])


def _degrade_cpu_s(photos: list[Photo], preset: str, config: DatarateConfig) -> float:
    """Mean over as many draws as samples: what they cost differs by more than tenfold."""
    hq = photos[0].read()[: config.side_px, : config.side_px]
    degrade(hq, PRESETS[preset], np.random.default_rng(0), SCALE)
    begin = time.process_time()
    for seed in range(config.samples):
        degrade(hq, PRESETS[preset], np.random.default_rng(seed), SCALE)
    return (time.process_time() - begin) / config.samples


if __name__ == "__main__":
    sys.exit(main())
