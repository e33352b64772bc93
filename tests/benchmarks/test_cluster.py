"""The benchmark of one process against Ray: its phases and its document."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import cluster
from benchmarks.errors import CommandFailed
from benchmarks.picture import draw_picture
from rcod_runtime.image_io import write_image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        write_image(folder / f"{i}.png", draw_picture(9, 8 + i))
    return folder


def test_a_run_is_split_by_its_first_and_last_image(photos: Path, tmp_path: Path) -> None:
    begin = time.perf_counter()
    row = cluster.timed_run(photos, tmp_path / "out", ["--jobs", "1"], 3)
    passed = time.perf_counter() - begin
    assert list(row) == list(cluster.PHASES)
    assert min(row.values()) > 0 and sum(row.values()) <= passed


def test_a_run_that_does_not_do_all_images_is_no_measurement(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="exit code 0 and 4 images, found 0 and 3"):
        cluster.timed_run(photos, tmp_path / "out", [], 4)
    (photos / "bad.png").write_bytes(b"nothing")
    with pytest.raises(CommandFailed, match="found 10 and 3: PartialFailure: 1 of 4"):
        cluster.timed_run(photos, tmp_path / "out", [], 4)


def test_the_document_holds_medians_and_the_gain_within_each_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # one process, ray; ray, one process: neither is always the first of a round
    ways: list[list[str]] = []
    rows = iter([(1, 10, 1), (5, 5, 2), (6, 4, 2), (2, 12, 1), (3, 11, 1), (7, 11, 2)])

    def timed_run(photos: Path, out: Path, options: list[str], count: int) -> dict[str, float]:
        assert len(list(photos.iterdir())) == count == 12
        ways.append(options)
        out.mkdir()
        return dict(zip(cluster.PHASES, map(float, next(rows)), strict=True))

    monkeypatch.setattr(cluster, "timed_run", timed_run)
    assert cluster.main(["--photos", "12", "--size", "8", "--jobs", "3"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["benchmark"], document["schema_version"]) == ("cluster", 2)
    assert document["ways"]["one process"] == {
        "start_s": 2.0, "images_s": 11.0, "end_s": 1.0, "whole_s": 15.0, "images_per_s": 1.0,
    }  # fmt: skip
    assert ways[0] == ["--jobs", "3", "--threads", "3"], "as many threads as the three actors have"
    assert ways[1] == ["--ray", "local", "--jobs", "3", "--threads", "1"]
    assert document["ways"]["ray"]["start_s"] == 6.0
    assert document["times_as_fast"] == 2.0 and document["times_as_fast_range"] == [1.0, 3.0]


def test_too_few_photos_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["--photos", "2"]) == 2
    assert "--photos 2: expected at least 3" in capsys.readouterr().err
