"""Calls on alternating sizes, some hundred of the soak's ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import Sample, _growth, main, soak
from tests.runtime.fakes import make_bundle


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_memory_handles_and_threads_do_not_grow(tmp_path: Path, backend: str) -> None:
    make_bundle(tmp_path / "bundle")
    found = soak(tmp_path / "bundle", backend, calls=300, every=20, threads=1)
    first, last = found.samples[len(found.samples) // 2], found.samples[-1]
    assert (first.files, first.threads) == (last.files, last.threads)
    # The images of 140 calls have 2.3 MB, what lies between the graphs much more.
    assert last.resident_bytes - first.resident_bytes < 2.2e6


def test_growth_is_the_slope_of_the_second_half_for_1000_calls() -> None:
    samples = [Sample(10 * i, 10**6 + 30 * i if i >= 5 else 0, 3, 1) for i in range(10)]
    assert _growth(samples, "resident_bytes") == pytest.approx(3000)
    assert _growth(samples, "files") == pytest.approx(0)


def test_too_few_calls_are_refused() -> None:
    assert main(["--calls", "3"]) == 2
