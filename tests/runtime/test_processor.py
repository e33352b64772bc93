"""Which precision auto takes is read off the processor: its vendor and its flags."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcod_runtime import parallel
from rcod_runtime.backends import openvino_backend, precisions
from rcod_runtime.processor import Processor, read_processor

CPUINFO = "rcod_runtime.processor.CPUINFO"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file in the place of Linux's, not there yet; the processor has bf16."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(CPUINFO, path)
    monkeypatch.setattr(openvino_backend, "has_native_bf16", lambda: True)
    read_processor.cache_clear()
    yield path
    read_processor.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "flags", "auto"),
    [
        ("GenuineIntel", "avx2 avx512_bf16", "fp32"),
        ("GenuineIntel", "avx2 avx512_bf16 amx_bf16", "bf16"),
        ("AuthenticAMD", "avx2 avx512_bf16", "bf16"),
    ],
)
def test_auto_takes_bf16_where_it_is_faster(
    cpuinfo: Path, vendor: str, flags: str, auto: str
) -> None:
    one = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: X\nflags\t\t: {flags}\n\n"
    cpuinfo.write_text(one + one.replace("X", "Y"))
    assert read_processor() == Processor("X", vendor, frozenset(flags.split()))
    assert precisions("openvino")[-1] == auto
    assert set(precisions("openvino")) == {"fp32", "bf16"}


def test_arm_is_believed_and_what_is_unknown_is_not(cpuinfo: Path) -> None:
    """Windows tells nothing: bf16 there may be of a laptop, which is slower for it."""
    assert read_processor() == Processor()
    assert precisions("openvino") == ("bf16", "fp32")
    read_processor.cache_clear()
    cpuinfo.write_text("Features\t: asimd bf16\n")
    assert read_processor().flags == {"asimd", "bf16"}
    assert precisions("openvino")[-1] == "bf16"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "25600000 100000"}, 256),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_of_processor_time_counts(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    files: dict[str, str],
    cpus: int | None,
) -> None:
    """The libraries see all processors of its host."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(parallel, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)), raising=False)
    parallel.cpu_quota.cache_clear()
    request.addfinalizer(parallel.cpu_quota.cache_clear)
    assert parallel.cpu_quota() == cpus
    assert parallel.cpus_available() == min(cpus or 128, 128)
    assert parallel.threads_allowed() == (cpus if cpus and cpus < 128 else 0)


@pytest.mark.parametrize("allowed", range(4))
def test_every_part_is_worked_on_once_where_a_thread_cannot_be_begun(
    monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """As by a limit of processes, or at the end of the interpreter."""
    start, count = threading.Thread.start, itertools.count()
    seen: list[int] = []

    def limited(self: threading.Thread) -> None:
        if next(count) >= allowed:
            raise RuntimeError("can't start new thread")
        start(self)

    def work(number: int) -> int:
        seen.append(number)
        return number * number

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr(parallel, "cpus_available", lambda: 4)
    assert parallel.in_parallel(work, range(20)) == [n * n for n in range(20)]
    assert sorted(seen) == list(range(20))


def test_after_an_error_no_part_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cpus_available", lambda: 2)
    seen: list[int] = []

    def work(number: int) -> None:
        seen.append(number)
        if number == 2:
            raise KeyboardInterrupt
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        parallel.in_parallel(work, range(100))
    assert len(seen) <= 5
