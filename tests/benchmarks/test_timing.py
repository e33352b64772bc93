"""Variants take turns, and warm-ups don't count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import benchmarks.timing
from benchmarks.errors import BenchmarkError
from benchmarks.timing import time_in_turns, times_as_fast


def test_every_round_calls_every_variant_once_in_changing_order() -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    done: list[int] = []
    times = time_in_turns(variants, runs=6, warmup=2, progress=done.append)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 8
    assert all(set(each) == set("abc") for each in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 6}
    assert sum(done) == 24


def test_warm_up_is_left_out_and_time_is_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, delays = 7.0, iter([0.25, 0.03125, 0.0625])

    def call() -> None:
        nonlocal now
        now += next(delays)

    clock = SimpleNamespace(perf_counter=lambda: now, sleep=lambda _: None)
    monkeypatch.setattr(benchmarks.timing, "time", clock)
    (times,) = time_in_turns({"a": call}, runs=2, warmup=1).values()
    assert times == [31.25, 62.5]


def test_no_runs_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="runs >= 1"):
        time_in_turns({"a": lambda: None}, runs=0, warmup=0)


def test_ratios_are_taken_within_rounds() -> None:
    ratio = times_as_fast([1.0, 10.0, 2.0], [3.0, 20.0, 4.0])  # 3, 2, 2
    assert ratio.median == 2.0
    assert 2.0 <= ratio.p10 <= ratio.median <= ratio.p90 <= 3.0
    assert times_as_fast([1.0, 50.0], [2.0, 100.0]).median == 2.0, "a slow round slows both sides"
