"""Calls on alternating sizes, some hundred of the soak's ten thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import Sample, _growth, main


def test_memory_handles_and_threads_do_not_grow(tmp_path: Path) -> None:
    """In a new process: what other tests left in this one moves its memory too."""
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--calls", "840", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    backends = json.loads(out.read_text())["backends"]
    assert [row["backend"].split()[0] for row in backends] == ["openvino", "onnxruntime"]
    for row in backends:
        samples = row["samples"]
        first, last = samples[len(samples) // 2], samples[-1]
        assert (first["files"], first["threads"]) == (last["files"], last["threads"])
        # The images of 420 calls have 6.9 MB, what lies between the graphs much more.
        assert last["resident_bytes"] - first["resident_bytes"] < 5e6, row["backend"]


def test_growth_is_the_slope_of_the_second_half_for_1000_calls() -> None:
    samples = [Sample(10 * i, 10**6 + 30 * i if i >= 5 else 0, 3, 1) for i in range(10)]
    assert _growth(samples, "resident_bytes") == pytest.approx(3000)
    assert _growth(samples, "files") == pytest.approx(0)


def test_too_few_calls_are_refused() -> None:
    assert main(["--calls", "3"]) == 2
