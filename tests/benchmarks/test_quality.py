"""The quality benchmark through its command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality import main
from benchmarks.strips import find_detail
from tests.benchmarks.conftest import NAMES, REPOSITORY

QUICK = ("--metrics", "psnr_y", "ssim_y")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    document: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    return document


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert printed.out == ""
    return code, printed.err


def methods(document: dict[str, Any]) -> dict[str, Any]:
    return {method["name"]: method for method in document["methods"]}


@pytest.fixture
def outputs(dataset: Path) -> Path:
    """Finished images: the ground truth itself, written in another order of names."""
    folder = dataset.parent / "perfect"
    folder.mkdir()
    for name in reversed(NAMES):
        shutil.copy(dataset / "HR" / f"{name}.png", folder / f"{name}.png")
    return folder


def test_outputs_are_scored_against_the_image_of_the_same_name(
    dataset: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run(capsys, "--dataset", dataset, "--outputs", outputs, *QUICK)
    assert document["model"] is None
    assert document["dataset"] == {"name": "drawn", "pairs": 3}
    found = methods(document)
    assert list(found) == ["bicubic", "perfect", "hq"]
    assert set(found["perfect"]["images"]) == set(NAMES)
    assert all(s["ssim_y"] == pytest.approx(1.0) for s in found["perfect"]["images"].values())
    assert found["bicubic"]["mean"]["psnr_y"] < 40
    assert found["hq"]["mean"] == {"psnr_y": None, "ssim_y": None}


def test_every_level_of_a_bundle_gets_a_row(
    dataset: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dataset", dataset, "--bundle", tiny_bundle, "--limit", 1, *QUICK)
    document = run(capsys, *arguments, "--json", tmp_path / "r.json")
    assert list(methods(document)) == ["bicubic", "fidelity", "neutral", "realism", "hq"]
    assert document["model"]["name"] == "tiny"
    assert json.loads((tmp_path / "r.json").read_text()) == document
    chosen = run(capsys, *arguments, "--levels", "realism", "0.25")
    assert list(methods(chosen)) == ["bicubic", "realism", "0.25", "hq"]
    level = methods(chosen)["realism"]["mean"]
    assert level == methods(document)["realism"]["mean"], "the same image has another score"


def test_names_choose_images(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--names-ending", "5", "0", "--outputs", dataset / "HR")
    document = run(capsys, "--dataset", dataset, *chosen, *QUICK)
    assert set(methods(document)["bicubic"]["images"]) == {NAMES[0], NAMES[2]}


def test_strips_show_every_method_and_only_for_chosen_images(
    dataset: Path, outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strips = ("--strips", f"{NAMES[1]}.png", "--strips-dir", tmp_path / "strips")
    run(capsys, "--dataset", dataset, "--outputs", outputs, *strips, *QUICK)
    (path,) = (tmp_path / "strips").iterdir()
    assert path.name == f"{NAMES[1]}.png"
    with Image.open(path) as strip:
        assert strip.mode == "RGB"
        assert strip.width == 4 * (256 + 6) + 6  # lq, bicubic, perfect, hq
        columns = [np.asarray(strip.crop((6 + i * 262, 6, 262 + i * 262, 170))) for i in range(4)]
    assert np.array_equal(columns[2], columns[3]), "the perfect output looks unlike hq"
    assert not np.array_equal(columns[1], columns[3])


def test_strips_that_have_no_folder_are_found_before_the_work(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.quality.gather", lambda *_: pytest.fail("it was scored"))
    (tmp_path / "strips").write_bytes(b"a file")
    strips = ("--strips", NAMES[0], "--strips-dir", tmp_path / "strips")
    code, said = failure(capsys, "--dataset", dataset, "--outputs", dataset / "HR", *strips, *QUICK)
    assert code == 6
    assert "strips: expected a folder, or a place for a new one" in said


def test_detail_is_where_the_texture_is() -> None:
    image = np.full((100, 140, 3), 128, np.uint8)
    image[60:80:2, 90:120:2] = 255
    top, left = find_detail(image, 32)
    assert top <= 60 and top + 32 >= 79
    assert left <= 90 and left + 32 >= 119


@pytest.mark.parametrize("folder", ["LR", "HR"])
def test_a_missing_partner_stops_before_anything_is_scored(
    dataset: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset / folder / f"{NAMES[1]}.png").unlink()
    code, said = failure(capsys, "--dataset", dataset, *QUICK)
    assert code == 11
    assert said.startswith("DatasetError: ")
    assert f"{NAMES[1]}.png: expected a partner" in said
    assert "Traceback" not in said


def test_an_output_of_another_size_is_an_error(
    dataset: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = outputs / f"{NAMES[0]}.png"
    Image.new("RGB", (280, 192)).save(path)
    code, said = failure(capsys, "--dataset", dataset, "--outputs", outputs, *QUICK)
    assert code == 11
    assert "expected 288 x 192 px" in said and "found 280 x 192 px" in said


def test_a_pair_that_is_not_one_enlargement_is_an_error(
    dataset: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (70, 48)).save(dataset / "LR" / f"{NAMES[0]}.png")
    code, said = failure(capsys, "--dataset", dataset, "--outputs", outputs, *QUICK)
    assert code == 11
    assert "enlarged by one factor" in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--strips", NAMES[0]), 2, "--strips-dir"),
        (("--strips", "no_such", "--strips-dir", "s"), 2, "--strips no_such: expected one of"),
        (("--limit", 0), 2, "--limit 0"),
        (("--report", "."), 2, "--report .: expected the path of its files without a suffix"),
        (("--names-ending", "x"), 11, "no pair is left"),
        (("--bundle", "no_such"), 4, "no_such"),
        (("--outputs", "no_such"), 11, "no_such: expected a folder"),
        (("--niqe-params", "no.npz", "--metrics", "niqe"), 11, "no.npz: expected a file"),
        (("--json", "no_such/r.json"), 6, "expected a file name"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    code: int,
    said: str,
) -> None:
    metrics = () if "--metrics" in arguments else QUICK
    found = failure(capsys, "--dataset", dataset, *metrics, *arguments)
    assert found[0] == code
    assert said in found[1]


def test_two_rows_of_one_name_are_an_error(
    dataset: Path, outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(outputs, tmp_path / "b" / "perfect")
    code, said = failure(capsys, "--dataset", dataset, "--outputs", outputs, other, *QUICK)
    assert code == 2
    assert "'perfect'" in said


@pytest.mark.parametrize("module", ["quality", "latency", "proof", "peers", "accounting"])
def test_help_needs_no_torch(module: str) -> None:
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['{module}', '--help']\n"
        f"runpy.run_module('benchmarks.{module}', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--json FILE" in done.stdout
