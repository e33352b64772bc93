"""The metric code against OSEDiff's published per-image log on RealSR, and the reader of that log.

Where the published images are not at hand, the log's reader and the comparison are still tested.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import iqa
from benchmarks.errors import DatasetError
from benchmarks.pairs import find_outputs, find_pairs, read_rgb
from benchmarks.proof import (
    MEAN_LIMITS,
    OUTPUTS,
    PER_IMAGE_LIMITS,
    compare,
    find_log,
    main,
    read_log,
)
from rcod_train.errors import MissingPackage
from rcod_train.quality.metrics import psnr_y, ssim_y
from rcod_train.quality.niqe import niqe
from rcod_train.quality.pristine import load_pristine
from tests.benchmarks.conftest import NAMES

# As published: what the log says of five images. Stored here, so that a log that was changed, or
# scores that were made anew from our own code, are noticed.
PUBLISHED = {
    "Canon_001_LR4": (25.793726, 0.851268, 5.673670),
    "Canon_002_LR4": (24.045864, 0.735231, 5.823664),
    "Canon_003_LR4": (23.226414, 0.855968, 7.759458),
    "Canon_023_LR4": (26.045341, 0.711058, 4.333645),
    "Nikon_042_LR4": (26.708328, 0.847515, 8.009505),
}
LINE = (
    "24-10-23 17:29:03 - INFO: results/{name}.png | PSNR: {psnr}; SSIM: 1.0 | Runtime: 1.06 sec\n"
)


def test_metrics_reproduce_published_scores(realsr: Path) -> None:
    pairs = [pair for pair in find_pairs(realsr) if pair.name in PUBLISHED]
    assert len(pairs) == len(PUBLISHED)
    outputs = find_outputs(realsr / OUTPUTS, pairs)
    for pair in pairs:
        sr, hq = read_rgb(outputs[pair.name]), read_rgb(pair.hq)
        psnr, ssim, _ = PUBLISHED[pair.name]
        assert psnr_y(sr, hq) == pytest.approx(psnr, abs=PER_IMAGE_LIMITS["psnr_y"])
        assert ssim_y(sr, hq) == pytest.approx(ssim, abs=PER_IMAGE_LIMITS["ssim_y"])


def test_niqe_reproduces_published_scores(realsr: Path) -> None:
    try:
        pristine = load_pristine()
    except MissingPackage as error:
        pytest.skip(str(error).splitlines()[0])
    found = [niqe(read_rgb(realsr / OUTPUTS / f"{name}.png"), pristine) for name in PUBLISHED]
    expected = [value for _, _, value in PUBLISHED.values()]
    off = sum(found) / sum(expected) - 1
    assert abs(off) < MEAN_LIMITS["niqe"], f"{off:+.3%}: {found} against {expected}"


def test_lpips_and_dists_reproduce_published_scores(realsr: Path) -> None:
    loaded, missing = iqa.load(("lpips", "dists"))
    if missing:
        pytest.skip("; ".join(missing.values()))
    pair = next(pair for pair in find_pairs(realsr) if pair.name == "Canon_001_LR4")
    sr, hq = read_rgb(realsr / OUTPUTS / f"{pair.name}.png"), read_rgb(pair.hq)
    for metric, published in zip(loaded, (0.224819, 0.184311), strict=True):
        assert metric.of_image is not None
        assert metric.of_image(sr, hq) == pytest.approx(published, abs=1e-4)
        assert metric.of_image(hq, hq) == pytest.approx(0, abs=1e-6)


def test_log_holds_the_stored_figures(realsr: Path) -> None:
    log = read_log(find_log(realsr / OUTPUTS / "metrics"))
    assert len(log) == 100
    for name, (psnr, ssim, niqe_value) in PUBLISHED.items():
        assert (log[name]["PSNR"], log[name]["SSIM"]) == (psnr, ssim)
        assert log[name]["NIQE"] == niqe_value


@pytest.fixture
def published(dataset: Path) -> Path:
    """The drawn dataset; every published image is the first one's HR, so not perfect."""
    folder = dataset / OUTPUTS
    (folder / "metrics").mkdir(parents=True)
    for name in NAMES:
        (folder / f"{name}.png").write_bytes((dataset / "HR" / f"{NAMES[0]}.png").read_bytes())
    return dataset


def write_log(dataset: Path, psnr: dict[str, float]) -> None:
    text = "".join(LINE.format(name=name, psnr=f"{value:.6f}") for name, value in psnr.items())
    (dataset / OUTPUTS / "metrics" / "m.log").write_text(text)


def test_command_agrees_with_a_true_log_and_not_with_a_false_one(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (published / "LR" / f"{NAMES[0]}.png").unlink()  # equal images have no finite PSNR
    (published / "HR" / f"{NAMES[0]}.png").unlink()
    true = {
        name: psnr_y(
            read_rgb(published / OUTPUTS / f"{name}.png"),
            read_rgb(published / "HR" / f"{name}.png"),
        )
        for name in NAMES[1:]
    }
    arguments = ["--dataset", str(published), "--metrics", "psnr_y"]
    write_log(published, true)
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["benchmark"], document["passed"]) == ("proof", True)
    assert document["metrics"][0]["largest_difference"] < 1e-6

    write_log(published, {**true, NAMES[2]: true[NAMES[2]] + 0.002})
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "BEYOND" in printed
    document = json.loads(printed.splitlines()[-1])
    assert not document["passed"]
    assert document["metrics"][0]["worst_image"] == NAMES[2]

    write_log(published, {NAMES[1]: true[NAMES[1]]})
    assert main(arguments) == 11
    assert f"{NAMES[2]}: expected its PSNR" in capsys.readouterr().err


def test_a_limit_below_one_is_refused(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", str(published), "--limit", "-1"]) == 2
    assert "--limit -1: expected at least 1" in capsys.readouterr().err


def test_a_value_that_is_no_number_never_agrees() -> None:
    proof = compare("psnr_y", {"a": 20.0, "b": float("nan")}, {"a": 20.0, "b": 21.0})
    assert proof.worst_image == "b"
    assert not proof.passed


def test_mean_is_held_for_niqe() -> None:
    assert compare("niqe", {"a": 5.0, "b": 5.15}, {"a": 5.1, "b": 5.1}).passed
    assert not compare("niqe", {"a": 5.3, "b": 5.3}, {"a": 5.1, "b": 5.1}).passed


def test_logs_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected one published .log file, found 0"):
        find_log(tmp_path)
    (tmp_path / "a.log").write_text("nothing\n")
    with pytest.raises(DatasetError, match="found none"):
        read_log(find_log(tmp_path))
