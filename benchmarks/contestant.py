"""One contestant in a process of its own: what it costs to begin, and its peak memory.

Run by benchmarks.processes with one JSON argument; prints one JSON line. Importing, loading and the
first image are timed apart. numpy and the helpers that both sides use are imported before.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.picture import draw_picture


def open_runtime(task: dict[str, Any]) -> Callable[[Any], object]:
    from rcod_runtime import Upscaler

    upscaler = Upscaler(
        task["bundle"], "cpu", task["backend"],
        precision=task["precision"], threads=task["threads"],
    )  # fmt: skip
    return lambda lq: upscaler(lq, task["level"])


def open_pytorch(task: dict[str, Any]) -> Callable[[Any], object]:
    from benchmarks.eager import MODES, EagerPipeline
    from rcod_runtime.bundle import default_bundle_path
    from rcod_runtime.manifest import MANIFEST_FILE, read_manifest

    bundle = default_bundle_path() if task["bundle"] is None else Path(task["bundle"])
    manifest = read_manifest(bundle / MANIFEST_FILE)  # its graphs are the other side's to load
    (mode,) = (mode for mode in MODES if mode.name == task["mode"])
    return EagerPipeline(Path(task["checkpoint"]), manifest, task["level"], task["threads"], mode)


def open_other(task: dict[str, Any]) -> Callable[[Any], object]:
    from benchmarks.peer_models import PEERS, open_peer
    from benchmarks.scores import bicubic

    if "bicubic" in task:
        scale = task["bicubic"]
        return lambda lq: bicubic(lq, (lq.shape[0] * scale, lq.shape[1] * scale))
    (peer,) = (peer for peer in PEERS if peer.name == task["peer"])
    return open_peer(peer, task["engine"], task["threads"])


def opened(task: dict[str, Any]) -> Callable[[Any], object]:
    if "mode" in task:
        return open_pytorch(task)
    return open_runtime(task) if "backend" in task else open_other(task)


def import_libraries(task: dict[str, Any]) -> None:
    if "mode" in task:
        import torch  # noqa: F401

        import rcod_train.checkpoint  # noqa: F401
    elif "bicubic" in task:
        import rcod_runtime.resample  # noqa: F401
    elif task.get("engine") == "ncnn fp32":
        import ncnn  # noqa: F401
    elif task.get("backend") == "onnxruntime":
        import onnxruntime  # noqa: F401

        import rcod_runtime.upscaler  # noqa: F401
    else:
        import openvino  # noqa: F401

        import rcod_runtime.upscaler  # noqa: F401


def peak_bytes() -> int | None:
    """The kernel's record for this very program; None where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def main() -> int:
    task = json.loads(sys.argv[1])
    lq = draw_picture(task["side_px"], task["side_px"])
    marks = [time.perf_counter()]
    import_libraries(task)
    marks.append(time.perf_counter())
    call = opened(task)
    marks.append(time.perf_counter())
    for _ in range(2):
        call(lq)
        marks.append(time.perf_counter())
    names = ("import_ms", "load_ms", "first_ms", "second_ms")
    spent = {
        name: (end - begin) * 1e3 for name, begin, end in zip(names, marks, marks[1:], strict=False)
    }
    print(json.dumps({**spent, "peak_bytes": peak_bytes()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
