"""``benchmarks.figures``: what of a quality document is drawn, and what is called worst."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.figures import _write_names, lines, main, points, worst


def method(
    name: str, kind: str, psnr: float, niqe: float, ssim: tuple[float, ...]
) -> dict[str, Any]:
    images = {n: {"ssim_y": s} for n, s in zip("abc", ssim, strict=True)}
    return {"name": name, "kind": kind, "mean": {"psnr_y": psnr, "niqe": niqe}, "images": images}


DOCUMENT: dict[str, Any] = {
    "benchmark": "quality",
    "dataset": {"name": "realsr", "pairs": 3},
    "model": {"name": "nano"},
    "paper": {"table_2": [{"method": "SinSR", "values": {"psnr_y": 26.3, "niqe": 6.3}},
                          {"method": "unmeasured", "values": {"psnr_y": 26.3}}]},
    "methods": [
        method("bicubic", "baseline", 27.1, 9.1, (0.8, 0.7, 0.6)),
        method("0", "model", 27.2, 7.5, (0.8, 0.7, 0.6)),
        method("adaptive", "model", 27.0, 7.0, (0.8, 0.7, 0.6)),
        method("1", "model", 25.0, 5.5, (0.7, 0.3, 0.5)),
        {**method("hq", "reference", 0.0, 6.3, (1, 1, 1)), "mean": {"niqe": 6.3}},
    ],
}  # fmt: skip


def test_levels_make_the_line_and_what_has_both_figures_a_point() -> None:
    found = points(DOCUMENT)
    assert found["model"] == [("0", 27.2, 7.5), ("1", 25.0, 5.5)]
    assert [row[0] for row in found["other"]] == ["bicubic", "adaptive"]
    assert [row[0] for row in found["paper"]] == ["SinSR"]


def test_the_papers_rows_are_left_out_where_they_can_not_be_compared() -> None:
    paper = {**DOCUMENT["paper"], "caution": "Not comparable as it stands"}
    assert points({**DOCUMENT, "paper": paper})["paper"] == []


def test_the_worst_are_those_that_lose_most_structure() -> None:
    assert worst(DOCUMENT, 2) == ["b", "a"]
    assert worst({**DOCUMENT, "methods": DOCUMENT["methods"][1:]}, 2) == []
    without_ssim = [{**m, "images": {n: {} for n in m["images"]}} for m in DOCUMENT["methods"]]
    assert worst({**DOCUMENT, "methods": without_ssim}, 2) == []


def test_adaptive_is_no_level_wherever_it_stands() -> None:
    adaptive = method("adaptive", "model", 27.0, 7.0, (0.1, 0.7, 0.6))
    methods = [m for m in DOCUMENT["methods"] if m["name"] != "adaptive"]
    assert worst({**DOCUMENT, "methods": [*methods, adaptive]}, 2) == ["b", "a"]
    assert worst({**DOCUMENT, "methods": [methods[0], adaptive]}, 2) == []


def test_the_picture_is_drawn_and_the_worst_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.json").write_text(json.dumps(DOCUMENT))
    assert main([str(tmp_path / "q.json"), "--out", str(tmp_path / "c.png"), "--worst", "1"]) == 0
    assert capsys.readouterr().out == "b\n"
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 700 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_every_variant_of_an_ablation_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def levels(*pairs: tuple[float, float | None]) -> dict[str, Any]:
        means = [{"psnr_y": psnr, "niqe": niqe} for psnr, niqe in pairs]
        return {"levels": dict(zip(("fidelity", "realism", "adaptive"), means, strict=False))}

    variants = {
        "rcod": levels((27.1, 8.6), (26.5, 7.5), (27.0, 8.0)),
        "vanilla": levels((26.9, 7.8)),
        "unscored": levels((26.9, None)),
    }
    ablation = {"benchmark": "ablation", "variants": variants}
    assert lines(ablation) == {"rcod": [(27.1, 8.6), (26.5, 7.5)], "vanilla": [(26.9, 7.8)]}
    (tmp_path / "a.json").write_text(json.dumps(ablation))
    assert main([str(tmp_path / "a.json"), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out == ""
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 700 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_other_files_and_a_missing_package_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "q.json", tmp_path / "c.png"
    for text in ("{}", "no", json.dumps({"methods": []})):
        path.write_text(text)
        assert main([str(path), "--out", str(out)]) == 11
        assert "expected a document of benchmarks.quality" in capsys.readouterr().err
    path.write_text(json.dumps(DOCUMENT))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(path), "--out", str(out)]) == 11
    assert 'pip install "rcod[plot]"' in capsys.readouterr().err
    assert not out.exists()


def test_names_of_neighbours_do_not_cover_each_other() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(7, 4), dpi=100)
    axes = figure.subplots()
    named = [("a long name", 25.0, 5.5), ("another name", 25.05, 5.5), ("a third one", 25.0, 5.52)]
    axes.plot([24, 27], [9, 5])
    _write_names(figure, axes, named)
    assert [text.get_text() for text in axes.texts] == [name for name, *_ in named]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
