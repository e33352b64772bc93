"""What a command costs from outside, each in a new process: cold start, import, peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.errors import CommandFailed
from benchmarks.picture import draw_picture
from rcod_runtime.image_io import write_image

UPSCALE = (sys.executable, "-m", "rcod_runtime.cli.upscale")

_IMPORT = """
import json, sys, time
begin = time.perf_counter()
import rcod_runtime
package = time.perf_counter()
rcod_runtime.Upscaler
everything = time.perf_counter()
heavy = [name for name in ("torch", "diffusers", "transformers", "onnx") if name in sys.modules]
print(json.dumps([(package - begin) * 1e3, (everything - begin) * 1e3, heavy]))
"""

# The peak is the kernel's record for this very program (VmHWM): getrusage's would start from
# what the parent had in memory when it forked.
_PEAK = """
import sys
from rcod_runtime.cli.upscale import main
code = main(sys.argv[1:])
try:
    with open("/proc/self/status", encoding="ascii") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
except OSError:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        sys.exit("the peak of a process can't be measured on this system")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
print(peak)
sys.exit(code)
"""


@dataclass(frozen=True)
class ImportTime:
    """``package_ms``: ``import rcod_runtime``; ``upscaler_ms``: that and its Upscaler class."""

    package_ms: float
    upscaler_ms: float
    heavy_modules: tuple[str, ...]


@dataclass(frozen=True)
class PeakMemory:
    """Peak resident memory of one run of rcod-upscale."""

    peak_bytes: int
    seconds: float


def write_photo(folder: Path, side_px: int) -> Path:
    """A square PNG for a command to read."""
    path = folder / f"photo_{side_px}.png"
    write_image(path, draw_picture(side_px, side_px))
    return path


def measure_cold_start(photo: Path, options: Sequence[str], runs: int) -> list[float]:
    """Milliseconds of ``rcod-upscale photo -o out.png`` from process start to process end.

    The first run may also pay for reading programs and weights from the disk.

    Raises:
        CommandFailed: the command failed, or left no image.
    """
    times = []
    for run in range(runs):
        out = photo.with_name(f"out_{run}.png")
        begin = time.perf_counter()
        _run((*UPSCALE, str(photo), "-o", str(out), *options))
        times.append((time.perf_counter() - begin) * 1e3)
        _check_written(out)
    return times


def measure_import(runs: int) -> list[ImportTime]:
    """``import rcod_runtime`` in new interpreters; the interpreter's own start is not in it."""
    times = []
    for _ in range(runs):
        package_ms, upscaler_ms, heavy = json.loads(_run((sys.executable, "-c", _IMPORT)))
        times.append(ImportTime(package_ms, upscaler_ms, tuple(heavy)))
    return times


def measure_peak_memory(photo: Path, options: Sequence[str]) -> PeakMemory:
    """Peak resident memory of ``rcod-upscale photo -o out.png``.

    Raises:
        CommandFailed: the command failed, or left no image.
    """
    out = photo.with_name("out_peak.png")
    begin = time.perf_counter()
    printed = _run((sys.executable, "-c", _PEAK, str(photo), "-o", str(out), *options))
    seconds = time.perf_counter() - begin
    _check_written(out)
    return PeakMemory(int(printed.splitlines()[-1]), seconds)


def measure_contestant(task: dict[str, Any], runs: int) -> dict[str, float | None]:
    """Medians over new processes of benchmarks.contestant: import, load, first and second image in
    milliseconds, peak memory in bytes.

    Raises:
        CommandFailed: it failed.
    """
    command = (sys.executable, "-m", "benchmarks.contestant", json.dumps(task))
    results = [json.loads(_run(command).splitlines()[-1]) for _ in range(runs)]
    return {
        name: None if results[0][name] is None else median(result[name] for result in results)
        for name in results[0]
    }


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise CommandFailed(
            f"{' '.join(command[:3])}: expected exit code 0, found {done.returncode}: {said[-1]}"
        )
    return done.stdout


def _check_written(out: Path) -> None:
    if not out.is_file() or out.stat().st_size == 0:
        raise CommandFailed(f"{out}: expected rcod-upscale to write it, found no image.")
