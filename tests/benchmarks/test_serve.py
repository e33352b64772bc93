"""``benchmarks.serve``: a short load on the real server, and its figures."""

from __future__ import annotations

import json

import pytest

from benchmarks.serve import main, percentiles

pytest.importorskip("uvicorn")


def test_percentiles() -> None:
    found = percentiles([i / 1000 for i in range(1, 101)])
    assert found == pytest.approx({"median": 50.5, "p99": 99.01, "max": 100.0})
    assert percentiles([0.002]) == {"median": 2.0, "p99": 2.0, "max": 2.0}


def test_a_short_load_counts_every_answer_and_overload_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--requests", "20", "--photo-px", "16", "--queue", "2", "--clients", "12"]
    assert main([*argv, "--overload", "2"]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document["benchmark"] == "serve"
    assert document["steady"]["statuses"] == {"200": 20}
    assert document["steady"]["answers_per_s"] > 0
    statuses = document["overload"]["statuses"]
    assert statuses.keys() == {"200", "503"} and statuses["503"] > 0
    assert "overload" in printed and "p99 of 503" in printed
