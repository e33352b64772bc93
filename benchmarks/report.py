"""What every benchmark prints: a machine card, a table, and one JSON document as the last line."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from rcod_runtime.parallel import cpus_available
from rcod_runtime.processor import read_processor

PACKAGES = (
    "rcod", "numpy", "pillow", "openvino", "onnxruntime", "torch", "diffusers", "scipy",
)  # fmt: skip
# Instruction sets that decide how fast a graph can be on a CPU.
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")
BUSY = 0.5  # load per CPU, before the benchmark starts, that other work must be behind
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class MachineCard:
    """The machine and the software a figure was measured on. None where it can't be known."""

    cpu: str | None
    cpu_features: tuple[str, ...]
    cpus_available: int
    memory_bytes: int | None
    gpu: str | None
    os: str
    python: str
    packages: dict[str, str | None]
    commit: str | None
    commit_is_clean: bool | None
    load_average_1min: float | None
    date_utc: str


@dataclass(frozen=True)
class Latency:
    """Times of repeated runs of one thing."""

    runs: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float


def machine_card() -> MachineCard:
    """Describe this machine, now. Nothing in it names the machine or its user."""
    cpu, features = _cpu()
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return MachineCard(
        cpu=cpu,
        cpu_features=features,
        cpus_available=cpus_available(),
        memory_bytes=_memory_bytes(),
        gpu=_gpu(),
        os=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        commit=commit or None,
        commit_is_clean=None if changes is None or not commit else not changes,
        load_average_1min=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        date_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def summarise(times_ms: Sequence[float]) -> Latency:
    """Percentiles of at least one time; between two runs they are interpolated."""
    median, p90, p99 = np.percentile(np.asarray(times_ms, np.float64), (50, 90, 99))
    return Latency(
        runs=len(times_ms),
        median_ms=float(median),
        p90_ms=float(p90),
        p99_ms=float(p99),
        min_ms=float(min(times_ms)),
        max_ms=float(max(times_ms)),
    )


def format_card(card: MachineCard) -> str:
    """The card as lines of text."""
    memory = "unknown" if card.memory_bytes is None else f"{card.memory_bytes / 2**30:.1f} GiB"
    versions = ", ".join(f"{name} {v}" for name, v in card.packages.items() if v is not None)
    commit = "unknown" if card.commit is None else card.commit[:12]
    if card.commit_is_clean is False:
        commit += " with changes"
    busy = (
        card.load_average_1min is not None and card.load_average_1min > BUSY * card.cpus_available
    )
    note = " (other work competes: don't quote times)" if busy else ""
    return "\n".join(
        (
            f"machine   {card.cpu or 'unknown CPU'}, {card.cpus_available} CPUs, {memory}",
            f"          {' '.join(card.cpu_features) or 'instruction sets unknown'}",
            f"gpu       {card.gpu or 'none'}",
            f"software  {card.os}, Python {card.python}, {versions}",
            f"commit    {commit}, {card.date_utc}, load {card.load_average_1min}{note}",
        )
    )


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns with two blanks between; the first one left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join((first, *rest)).rstrip()

    return "\n".join((line(headers), line(["-" * width for width in widths]), *map(line, rows)))


def document(benchmark: str, schema_version: int, card: MachineCard, **content: Any) -> str:
    """The one-line JSON document of a benchmark; unknown, NaN and infinity become null.

    Every document has ``benchmark``, ``schema_version`` and ``card``; the version goes up when a
    field changes its meaning or goes away.
    """
    whole = {
        "benchmark": benchmark,
        "schema_version": schema_version,
        "card": asdict(card),
        **content,
    }
    return json.dumps(_plain(whole), allow_nan=False, separators=(", ", ": "))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str | None, tuple[str, ...]]:
    processor = read_processor()
    name = processor.name or platform.processor() or None
    return name, tuple(feature for feature in CPU_FEATURES if feature in processor.flags)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu() -> str | None:
    query = ("nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader")
    return _output(*query) or None


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(REPOSITORY), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
