"""Times of several variants of one job, taken in turns so that drift hits all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.errors import BenchmarkError

Call = Callable[[], object]
Progress = Callable[[int], object]

# Untimed rest between two calls: worker threads of one library go on spinning for a few
# milliseconds after it has answered, and would take the CPU from the next one.
REST_S = 0.02


def time_in_turns(
    variants: Mapping[str, Call], runs: int, warmup: int, progress: Progress | None = None
) -> dict[str, list[float]]:
    """Milliseconds of ``runs`` calls of each variant, after ``warmup`` calls of each.

    Every round calls each variant once, in an order drawn anew from a fixed seed: none of them
    always follows the same other one. Warm-up rounds are the same code, their times are dropped.

    Args:
        progress: called with the number of calls done since the last time.
    """
    if runs < 1 or warmup < 0:
        raise BenchmarkError(f"expected runs >= 1 and warm-ups >= 0, found {runs} and {warmup}.")
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    for turn in range(warmup + runs):
        shuffle(order)
        for name in order:
            time.sleep(REST_S)
            begin = time.perf_counter()
            variants[name]()
            elapsed_ms = (time.perf_counter() - begin) * 1e3
            if turn >= warmup:
                times[name].append(elapsed_ms)
            if progress is not None:
                progress(1)
    return times


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one variant is as another, over rounds."""

    median: float
    p10: float
    p90: float


def times_as_fast(times_ms: Sequence[float], baseline_ms: Sequence[float]) -> Ratio:
    """``baseline_ms`` over ``times_ms``, round by round: the load of one round is in both."""
    rounds = np.asarray(baseline_ms, np.float64) / np.asarray(times_ms, np.float64)
    p10, median, p90 = np.percentile(rounds, (10, 50, 90))
    return Ratio(float(median), float(p10), float(p90))
