"""The overhead benchmark through its command, on a model too small to say anything about speed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import overhead
from benchmarks.overhead import OverheadConfig, main

FAST = ("--large", "24", "--size", "16", "--photos", "2", "--runs", "1")


def test_steps_add_up_and_folders_are_timed_by_jobs(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--bundle", str(tiny_bundle), *FAST])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    document = json.loads(printed.out.splitlines()[-1])
    assert (document["benchmark"], document["schema_version"]) == ("overhead", 2)
    seconds = document["large"]["seconds"]
    whole = seconds.pop("whole")
    assert sum(seconds.values()) == pytest.approx(whole) and min(seconds.values()) > 0
    outside = 1 - seconds["graphs"] / whole
    assert document["large"]["outside_share"] == pytest.approx(outside)
    one, two = (document["folder"]["jobs"][jobs] for jobs in "12")
    assert document["folder"]["times_as_fast"] == pytest.approx(one["seconds"] / two["seconds"])
    assert 0 < one["cpus_busy"] == pytest.approx(one["cpu_seconds"] / one["seconds"])


def test_neither_number_of_jobs_is_always_the_first_of_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def timed(config: OverheadConfig, photos: Path, out: Path, jobs: int) -> tuple[float, float]:
        order.append(jobs)
        return 1.0, 1.0

    monkeypatch.setattr(overhead, "_timed_command", timed)
    config = OverheadConfig(None, "openvino", 8, 8, photos=1, jobs=2, runs=3, parts=("folder",))
    overhead.measure_folder(config, tmp_path)
    assert order == [1, 2, 2, 1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--photos", "0"), 2, "--photos 0: expected at least 1"),
        (("--bundle", "none", "--parts", "folder"), 11, "found 4: .*none"),
    ],
)
def test_what_cannot_be_measured_is_named(
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    assert main(["--bundle", str(tiny_bundle), *FAST, *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(said, printed.err)
