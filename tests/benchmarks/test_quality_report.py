"""The report: a page without anything from outside, the paper beside it, missing metrics named."""

from __future__ import annotations

import json
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import iqa, paper
from benchmarks.plot import Point, draw_plot, ticks
from benchmarks.quality import main
from benchmarks.quality_report import paper_document
from rcod_runtime import OutputError
from tests.benchmarks.conftest import NAMES

BUILT_IN = ("--metrics", "psnr_y", "ssim_y")
SHOWN = sorted(NAMES)[:2]


def run(dataset: Path, *arguments: object) -> int:
    return main(["--dataset", str(dataset), *map(str, arguments)])


class Page(HTMLParser):
    """Tags with their attributes, and whether every tag is closed in order."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def report(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    outputs = dataset.rename(dataset.parent / "<b>drawn") / "HR"
    path = tmp_path / "report"
    arguments = ("--outputs", outputs, "--paper", "RealSR", "--report", path, "--limit", 2)
    assert run(outputs.parent, *arguments, *BUILT_IN) == 0
    capsys.readouterr()
    return path


def test_page_is_whole_and_loads_nothing_from_outside(report: Path) -> None:
    text = report.with_suffix(".html").read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        assert "src" not in attributes and "href" not in attributes
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy
    assert "<b>drawn" not in text, "a folder's name reached the page as markup"
    assert "&lt;b&gt;drawn" in text


def test_comparisons_can_be_used_by_keyboard_and_hold_every_method(report: Path) -> None:
    text = report.with_suffix(".html").read_text()
    tags = Page(text).tags
    sliders = [a for tag, a in tags if tag == "input"]
    assert len(sliders) == 2  # a range input takes arrow keys, Home and End by itself
    assert all(a["type"] == "range" and a["aria-label"] in NAMES for a in sliders)
    assert all(a.get("aria-label") for tag, a in tags if tag == "select")
    found = re.search(r"const images = (\{.*\});", text)
    assert found
    images = json.loads(found[1])
    assert set(images) == set(SHOWN)
    for methods in images.values():
        assert set(methods) == {"bicubic", "HR", "hq"}
        assert all(uri.startswith("data:image/jpeg;base64,/9j/") for uri in methods.values())


def test_three_files_agree_and_caution_about_the_paper(report: Path) -> None:
    document = json.loads(report.with_suffix(".json").read_text())
    assert document["schema_version"] == 3
    assert document["paper"]["caution"].endswith("means of 2 pairs, the paper's of 100.")
    markdown = report.with_suffix(".md").read_text()
    for name in (*SHOWN, "paper: RCOD_O-Neu.", "Not comparable as it stands"):
        assert name in markdown
        assert name in report.with_suffix(".html").read_text()
    bicubic = document["methods"][0]["mean"]["psnr_y"]
    assert f"| bicubic | {bicubic:.3f} |" in markdown.replace("*", "")  # the best one is bold


def test_the_papers_rows_are_means_of_its_whole_set_and_compared_with_nothing_less() -> None:
    def caution(dataset: paper.Dataset, pairs: int) -> str | None:
        document = paper_document(dataset, pairs)
        assert document is not None
        found: str | None = document["caution"]
        return found

    assert caution("RealSR", 100) is None
    assert "means of 3 pairs, the paper's of 100" in (caution("RealSR", 3) or "")
    assert "the paper's of a number that is not known here" in (caution("DRealSR", 100) or "")


def test_a_report_that_fails_after_the_work_leaves_the_document(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OutputError(f"{path}: can't be written (no space).")

    monkeypatch.setattr("benchmarks.quality_report.write_whole", full)
    files = ("--report", tmp_path / "r", "--json", tmp_path / "q.json")
    assert run(dataset, "--outputs", dataset / "HR", *files, *BUILT_IN) == 6
    printed = capsys.readouterr()
    assert "r.json: can't be written" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["dataset"]["pairs"] == 3
    assert (tmp_path / "q.json").read_text() == f"{printed.out.splitlines()[-1]}\n"


def test_a_report_that_cannot_be_written_is_found_before_the_work(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dataset, "--report", tmp_path / "no" / "r", "--outputs", dataset / "HR") == 6
    assert "r.html: expected a file name" in capsys.readouterr().err


def test_without_pyiqa_its_metrics_are_missing_with_the_pip_line(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    arguments = ("--outputs", dataset / "HR", "--metrics", "psnr_y", "musiq", "fid")
    assert run(dataset, *arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["missing"]) == {"musiq", "fid"}
    assert iqa.INSTALL_PYIQA in document["missing"]["musiq"]
    assert list(document["metrics"]) == ["psnr_y"]


def test_piqe_is_there_where_its_package_is(
    monkeypatch: pytest.MonkeyPatch, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pypiqe", reason=iqa.INSTALL_PYPIQE)
    assert run(dataset, "--outputs", dataset / "HR", "--metrics", "piqe") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = {method["name"]: method["mean"]["piqe"] for method in document["methods"]}
    assert 0 <= scores["HR"] < scores["bicubic"] <= 100  # blur is a distortion, less is better
    assert not document["metrics"]["piqe"]["higher_is_better"]
    monkeypatch.setitem(sys.modules, "pypiqe", None)
    assert run(dataset, "--outputs", dataset / "HR", "--metrics", "psnr_y", "piqe") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert iqa.INSTALL_PYPIQE in document["missing"]["piqe"]


def test_piqe_is_that_of_a_pictures_own_grey() -> None:
    """It was the grey of red and blue swapped: pypiqe takes channels in OpenCV's order."""
    pytest.importorskip("pypiqe", reason=iqa.INSTALL_PYPIQE)
    (loaded,), _ = iqa.load(["piqe"])
    assert loaded.of_image is not None
    noise = np.random.default_rng(0)
    picture = np.full((48, 64, 3), 128, np.uint8)
    picture[..., 0] = noise.integers(60, 200, (48, 64))
    picture[..., 1] = noise.integers(110, 146, (48, 64))
    grey = np.rint(picture @ [0.299, 0.587, 0.114]).astype(np.uint8)
    of_grey = loaded.of_image(np.repeat(grey[..., None], 3, axis=2), picture)
    assert loaded.of_image(picture, picture) == pytest.approx(of_grey, abs=0.05)
    assert abs(loaded.of_image(picture[..., ::-1], picture) - of_grey) > 1


def fake_pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface, with metrics simple enough to work out: a mean, a distance, a count."""

    def create(name: str, device: str) -> Any:
        if name == "musiq":
            raise OSError("no network")

        def metric(sr: Any, hq: Any = None) -> Any:
            if name == "fid":
                return float(len(list(Path(sr).iterdir())) + 10 * len(list(Path(hq).iterdir())))
            assert sr.shape[:2] == (1, 3) and 0 <= float(sr.min()) <= float(sr.max()) <= 1
            return sr.mean() if hq is None else (sr - hq).abs().mean()

        return metric

    module = types.ModuleType("pyiqa")
    module.create_metric = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyiqa", module)


def test_pyiqas_metrics_get_images_and_folders_of_the_right_pair(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pyiqa(monkeypatch)
    arguments = ("--outputs", dataset / "HR", "--metrics", "musiq", "clipiqa", "fid")
    assert run(dataset, *arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["missing"] == {"musiq": "its weights can't be had here (no network)"}
    _, perfect, reference = document["methods"]
    assert (perfect["mean"]["fid"], reference["mean"]["fid"]) == (33.0, None)
    assert 0 < perfect["images"][NAMES[0]]["clipiqa"] < 1
    assert document["metrics"]["fid"]["whole_set"] is True


def test_the_papers_tables_are_whole() -> None:
    rows = {row.method: row.values for row in paper.table_2("RealSR")}
    assert len(rows) == 13
    assert rows["OSEDiff"]["psnr_y"] == 25.15 and rows["RCOD_O-Fid."]["niqe"] == 5.911
    drealsr = [row.method for row in paper.table_2("DRealSR")]
    assert "InvSR" not in drealsr and len(drealsr) == 12  # its row repeats SinSR's
    seconds = {row.method: row.seconds for row in paper.table_3()}
    assert seconds["RCOD_O-Fid."] == 0.09
    # From fidelity to realism every row loses PSNR and gains CLIPIQA, on both sets.
    for dataset in paper.DATASETS:
        by_name = {row.method: row.values for row in paper.table_2(dataset)}
        for model in ("RCOD_O", "RCOD_S"):
            levels = [by_name[f"{model}-{level}."] for level in ("Fid", "Neu", "Real")]
            assert all(a["psnr_y"] > b["psnr_y"] for a, b in zip(levels, levels[1:], strict=False))
            assert all(
                a["clipiqa"] < b["clipiqa"] for a, b in zip(levels, levels[1:], strict=False)
            )


def test_better_is_up_whichever_way_a_metric_goes() -> None:
    points = [Point("a", 20.0, 5.0, "model"), Point("<b>", 25.0, 9.0, "paper")]
    for turned in (False, True):
        svg = ElementTree.fromstring(draw_plot(points, "PSNR", "NIQE", turned))
        circles = [c for c in svg.iter() if c.tag.endswith("circle")]
        height = {c[0].text.split(":")[0]: float(c.get("cy", "nan")) for c in circles if c[0].text}
        assert (height["a"] < height["<b>"]) == turned


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [-1.0, 3.0], [24.07, 26.81], [1e-4, 2e-4]])
def test_ticks_are_even_and_hold_every_value(values: list[float]) -> None:
    found = ticks(values)
    assert found[0] <= min(values) and max(values) <= found[-1]
    assert 2 <= len(found) <= 12
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])
