"""``rcod-export card``: measured quality in a bundle's model card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from rcod_export.card import LAST, QUALITY, add_quality, card
from rcod_export.main import main
from rcod_runtime.bundle import default_bundle_path
from rcod_runtime.errors import UsageError
from rcod_runtime.manifest import read_manifest
from rcod_train.checkpoint import read_info
from rcod_train.config import TrainConfig


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def quality(bundle: Path, psnr: float) -> Path:
    """As benchmarks.quality writes it."""
    graphs = read_manifest(bundle / "manifest.json").graphs
    methods = [
        {"name": "fidelity", "images": {"a": {}, "b": {}}, "mean": {"psnr_y": psnr, "niqe": 7.5}},
        {"name": "hq", "images": {"a": {}, "b": {}}, "mean": {"niqe": 6.25}},
    ]
    document = {
        "dataset": {"name": "realsr"},
        "metrics": {"psnr_y": {"header": "PSNR"}, "niqe": {"header": "NIQE"}},
        "model": {"graph_sha256": {name: graph.sha256 for name, graph in graphs.items()}},
        "methods": methods,
    }
    path = bundle.parent / "quality.json"
    path.write_text(json.dumps(document))
    return path


def test_the_means_stand_in_the_card_once(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "MODEL_CARD.md"
    before = path.read_text()
    for psnr in (26.0, 27.25):
        argv = ["card", str(bundle), "--quality", str(quality(bundle, psnr))]
        assert main(argv) == 0
        assert capsys.readouterr().out == f"{path}\n"
    text = path.read_text()
    assert "realsr, 2 pairs" in text and "| | PSNR | NIQE |\n|---|---|---|\n" in text
    assert "| fidelity | 27.25 | 7.50 |\n| hq |  -  | 6.25 |\n" in text
    assert "26.00" not in text and text.count("## Quality") == 1
    head, tail = before.split("## What it is not")
    assert text.startswith(head) and text.endswith(tail)


def test_the_card_tells_levels_that_ship_from_those_that_were_trained(bundle: Path) -> None:
    manifest = read_manifest(bundle / "manifest.json")
    last = dataclasses.replace(manifest.levels[-1], timestep=625)
    manifest = dataclasses.replace(manifest, levels=(*manifest.levels[:-1], last))
    record = dataclasses.asdict(TrainConfig(("photos",), "out")) | {"photos": 7}
    text = card(manifest, record)
    assert "| realism | 625 |" in text and "7 photo crops" in text
    assert "- rcod: 1400 steps of 4 crops of 192 px" in text
    assert "- refine: 2250 steps of 8 crops of 192 px" in text
    assert text.count(", at t = 250, 500, 750\n") == 2
    del record["refine"]  # as rcod-o
    assert card(manifest, record).count(", at t = 250, 500, 750\n") == 1
    record["rcod"]["grouping"] = "official"
    assert ", at t" not in card(manifest, record)
    record["rcod"] |= {"train_adapters": False, "decoder_learning_rate": 0.125}
    assert "192 px, learning rate 0.125, the decoder alone\n" in card(manifest, record)


def test_the_card_tells_what_was_moved_held_out_and_went_before(bundle: Path) -> None:
    manifest = read_manifest(bundle / "manifest.json")
    record = dataclasses.asdict(TrainConfig(("photos",), "out")) | {"photos": 7}
    assert "Moved" not in card(manifest, record) and "held out" not in card(manifest, record)
    last = dataclasses.replace(manifest.levels[-1], timestep=625)
    moved = dataclasses.replace(manifest, levels=(*manifest.levels[:-1], last))
    record |= {"validation_share": 0.03, "from": {"name": "tiny", "training": {}}}
    text = card(moved, record)
    assert "\n\nMoved at the export from 250, 500, 750.\n\n" in text
    assert "7 photo crops, 3 % of all held out, seed 0" in text
    assert "\nIt went on from an earlier tiny, trained so:\n\nNo record.\n" in text


def test_the_embedded_models_card_is_what_an_export_writes() -> None:
    checkpoint = Path(__file__).parents[2] / "checkpoints" / "nano"
    shipped = (default_bundle_path() / "MODEL_CARD.md").read_text(encoding="utf-8")
    before, measured = shipped.split(f"{QUALITY}\n")
    manifest = read_manifest(default_bundle_path() / "manifest.json")
    expected = card(manifest, read_info(checkpoint / "rcod.json").training)
    assert before + measured[measured.index(LAST) :] == expected


def test_figures_of_other_weights_beside_the_same_graphs_are_refused(bundle: Path) -> None:
    path = quality(bundle, 27.0)
    manifest = read_manifest(bundle / "manifest.json")
    beside = dataclasses.replace(manifest.graphs["decoder"], data_files={"onnx/d.data": "0" * 64})
    graphs = {**manifest.graphs, "decoder": beside}
    (bundle / "manifest.json").write_text(dataclasses.replace(manifest, graphs=graphs).to_json())
    with pytest.raises(UsageError, match="measured with other graphs than .* Measure again"):
        add_quality(bundle, path)


def test_figures_of_other_graphs_and_other_files_are_refused(bundle: Path) -> None:
    path = quality(bundle, 27.0)
    before = (bundle / "MODEL_CARD.md").read_text()
    document = json.loads(path.read_text())
    document["model"]["graph_sha256"]["decoder"] = "0" * 64
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="measured with other graphs than .* Measure again"):
        add_quality(bundle, path)
    whole = json.loads(path.read_text())
    empty = ({**whole, field: []} for field in ("methods", "metrics"))
    for other in ("{}", "no JSON", *map(json.dumps, empty)):
        path.write_text(other)
        with pytest.raises(UsageError, match="expected the JSON document of benchmarks.quality"):
            add_quality(bundle, path)
    (bundle / "MODEL_CARD.md").write_text("# mine\n")
    with pytest.raises(UsageError, match='expected the section "## What it is not"'):
        add_quality(bundle, quality(bundle, 27.0))
    (bundle / "MODEL_CARD.md").write_text(before)
