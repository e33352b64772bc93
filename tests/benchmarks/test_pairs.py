"""Pairs go by name, never by order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.errors import DatasetError
from benchmarks.pairs import Pair, find_outputs, find_pairs, read_rgb, select


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def pairs_named(*names: str) -> list[Pair]:
    return [Pair(name, Path("LR") / name, Path("HR") / name) for name in names]


def test_pairs_go_by_name_whatever_the_suffix_and_order(tmp_path: Path) -> None:
    touch(tmp_path / "LR", "b.png", "a.png", "c.jpg", "notes.txt")
    touch(tmp_path / "HR", "c.png", "b.png", "a.webp")
    pairs = find_pairs(tmp_path)
    assert [(p.lq.name, p.hq.name) for p in pairs] == [
        ("a.png", "a.webp"),
        ("b.png", "b.png"),
        ("c.jpg", "c.png"),
    ]


@pytest.mark.parametrize(("missing", "other"), [("LR", "HR"), ("HR", "LR")])
def test_an_image_without_a_partner_is_an_error(tmp_path: Path, missing: str, other: str) -> None:
    touch(tmp_path / missing, "a.png")
    touch(tmp_path / other, "a.png", "b.png")
    with pytest.raises(DatasetError, match=rf"{other}.b\.png: expected a partner.*{missing}"):
        find_pairs(tmp_path)


def test_two_images_of_one_name_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "LR", "a.png", "a.jpg")
    touch(tmp_path / "HR", "a.png")
    with pytest.raises(DatasetError, match=r"a\.jpg and a\.png"):
        find_pairs(tmp_path)


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected a folder"):
        find_pairs(tmp_path)
    touch(tmp_path / "LR", "read.me")
    touch(tmp_path / "HR", "a.png")
    with pytest.raises(DatasetError, match="expected images, found none"):
        find_pairs(tmp_path)


def test_outputs_may_have_more_images_but_not_fewer(tmp_path: Path) -> None:
    folder = touch(tmp_path / "outputs", "a.png", "b.png", "extra.png")
    assert list(find_outputs(folder, pairs_named("a", "b"))) == ["a", "b"]
    with pytest.raises(DatasetError, match=r"named c\.\*.*1 of 2"):
        find_outputs(folder, pairs_named("a", "c"))


def test_endings_are_looked_for_before_what_all_names_share() -> None:
    pairs = pairs_named("Canon_005_LR4", "Canon_006_LR4", "Nikon_010_LR4", "Nikon_050_LR4")
    chosen = select(pairs, ["5", "0"])
    assert [p.name[6:9] for p in chosen] == ["005", "010", "050"]
    assert [p.name for p in select(pairs_named("x05", "x15", "x25"), ["15"])] == ["x15"]
    assert [p.name[6:9] for p in select(pairs, ["5", "0"], 2)] == ["005", "010"]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DatasetError, match="no pair is left of 2"):
        select(pairs_named("a1", "a2"), ["7"])


def test_images_that_are_not_8_bit_colour_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(DatasetError, match="expected 8-bit RGB"):
        read_rgb(tmp_path / "grey.png")
