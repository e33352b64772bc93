"""The data benchmark through its command, on samples too small to say anything about speed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.datarate import main

FAST = ("--side", "64", "--samples", "3", "--runs", "2", "--workers", "1")


def test_every_preset_has_a_rate_and_its_processor_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(list(FAST))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    document = json.loads(printed.out.splitlines()[-1])
    assert (document["benchmark"], document["schema_version"]) == ("datarate", 1)
    assert document["settings"] == {
        "workers": 1, "side_px": 64, "samples": 3, "runs": 2, "drawn_photos": True,
    }  # fmt: skip
    assert list(document["presets"]) == ["mild", "osediff", "s3diff"]
    for figures in document["presets"].values():
        low, high = figures["samples_per_s_range"]
        assert 0 < low <= figures["samples_per_s"] <= high
        assert figures["degrade_cpu_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--samples", "0"), 2, "--samples 0: expected at least 1"),
        (("--side", "66"), 2, "--side 66: expected a multiple of 4"),
        (("--data", "none"), 11, "DataError: none: expected a folder of photos"),
    ],
)
def test_what_cannot_be_measured_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FAST, *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(said, printed.err)
