"""Seams, colours and grids are found where they are put."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import artefacts
from benchmarks.artefacts import LIMITS, grid, judged, main, profile, seam_lines, shared_cells
from benchmarks.picture import draw_picture
from rcod_runtime.image_io import write_image
from rcod_runtime.tiles import Blender, TilePlan, plan_axis

LINES = [48, 80]
TILES = (128, 64, 16)  # length, tile, overlap


def noise(seed: int, side: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 110, (side, side, 3)).astype(np.uint8)


def blended(image: np.ndarray, shift: float) -> np.ndarray:
    """The image put together from its tiles, every other one brighter by ``shift``, the others
    darker."""
    axis = plan_axis(*TILES, 8)
    blender, out = Blender(TilePlan(axis, axis), 3), np.empty_like(image)
    for row, top in enumerate(axis.starts):
        for column, left in enumerate(axis.starts):
            tile = image[top : top + axis.tile_px, left : left + axis.tile_px].astype(np.float32)
            blender.add(row, column, tile + (shift if (row + column) % 2 else -shift))
        for first, rows in blender.finish_row(row):
            out[first : first + len(rows)] = np.rint(rows)
    return out


def test_lines_are_where_tiles_begin_and_end() -> None:
    assert seam_lines(1024, 512, 64) == [256, 512, 768]
    assert seam_lines(768, 512, 64) == [256, 512]
    assert seam_lines(512, 512, 64) == []


def test_cells_are_shared_where_tiles_overlap() -> None:
    assert np.flatnonzero(shared_cells(*TILES)).tolist() == list(range(4, 12))  # 0..64, 32..96, ..
    assert np.flatnonzero(shared_cells(100, 64, 12)).tolist() == [5, 6, 7]  # 36..64 is shared
    assert not shared_cells(128, 64, 0).any()


def test_tiles_that_fade_into_each_other_are_apart_and_no_seam() -> None:
    whole = [noise(i) for i in range(4)]
    lines, shared = seam_lines(*TILES), shared_cells(*TILES)
    clean = judged([blended(image, 0) for image in whole], whole, whole, lines, shared)
    assert clean["apart"] < 0.01
    found = judged([blended(image, 10) for image in whole], whole, whole, lines, shared)
    assert found["apart"] > 4 * LIMITS["apart"]
    assert max(found[key] for key in LIMITS if key.startswith("seams")) < 1.1
    none = judged(whole, whole, whole, lines, shared_cells(128, 64, 0))
    assert none["apart"] == 0


def test_a_step_between_tiles_is_a_seam_and_noise_is_none() -> None:
    whole = [noise(i) for i in range(8)]
    shared = shared_cells(*TILES)
    clean = judged(whole, whole, whole, LINES, shared)
    assert clean["seams"] == pytest.approx(1, abs=0.03) and clean["seams_one_tile"] == 1
    assert clean["colours"] == 0
    stepped = [image.copy() for image in whole]
    for image in stepped:
        image[48:80] += 9
    found = judged(stepped, whole, whole, LINES, shared)
    assert found["seams"] > 1.1 and found["seams_one_tile"] > 1.1
    assert found["seams_same_places"] > 1.1
    assert found["colours"] == pytest.approx(9 * 32 / 128)


def test_a_grid_of_the_decoder_is_found() -> None:
    images = [noise(i) for i in range(4)]
    assert grid(profile(images)) < 1.03
    for image in images:
        image[::8] += 12
    assert grid(profile(images)) > 1.1


def test_the_embedded_model_passes_and_a_limit_is_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out.json"
    photos.mkdir()
    write_image(photos / "a.png", draw_picture(64, 64))
    arguments = [str(photos), "--crop", "48", "--tile", "128", "--levels", "fidelity"]
    assert main([*arguments, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["results"]
    assert set(found) == {"bicubic", "fidelity"}
    assert 0.9 < found["fidelity"]["seams_one_tile"] < 1.1
    assert 0 < found["fidelity"]["apart"] <= LIMITS["apart"]
    monkeypatch.setitem(artefacts.LIMITS, "seams", 0.1)
    assert main(arguments) == 1
    assert main([str(photos), "--crop", "65"]) == 11
    assert main([str(photos), "--crop", "48"]) == 2  # one tile
    assert "one tile of 512 px holds it" in capsys.readouterr().err
