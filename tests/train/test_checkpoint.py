"""The merged checkpoint: whole or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rcod_train.checkpoint import levels_of, load_merged, save_merged
from rcod_train.errors import CheckpointError
from rcod_train.grouping import Grouping
from tests.tiny import tiny_info, tiny_parts


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "rcod.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_levels_carry_the_constants_of_eq_3() -> None:
    levels = levels_of(Grouping(0.2, 0.9))
    assert [(x.name, x.timestep) for x in levels] == [
        ("fidelity", 250), ("neutral", 500), ("realism", 750),
    ]  # fmt: skip
    assert [x.alpha**2 for x in levels] == pytest.approx([0.6738, 0.2763, 0.0562], abs=5e-5)
    assert all(x.alpha**2 + x.sigma**2 == pytest.approx(1.0) for x in levels)


@pytest.mark.parametrize("part", ["vae", "unet", "vpim"])
def test_a_missing_part_is_named(checkpoint: Path, part: str) -> None:
    shutil.rmtree(checkpoint / part)
    with pytest.raises(CheckpointError, match=f"{part}: expected a part of the checkpoint"):
        load_merged(checkpoint)


def test_a_checkpoint_without_mem_is_one_without_the_adaptive_level(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "mem")
    assert load_merged(checkpoint)[0].mem is None


def test_cut_off_weights_are_named(checkpoint: Path) -> None:
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="unet: could not be loaded"):
        load_merged(checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 3}, '"version": expected 1 or 2, found 3'),
        ({"colour": "red"}, r"unknown fields \['colour'\]"),
        ({"levels": [{"name": "fidelity"}]}, '"levels": .*timestep'),
    ],
)
def test_rcod_json_is_checked(checkpoint: Path, changes: dict[str, object], words: str) -> None:
    edit(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=words):
        load_merged(checkpoint)


def test_broken_json_is_named(checkpoint: Path) -> None:
    (checkpoint / "rcod.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        load_merged(checkpoint)


def test_diverged_weights_are_not_saved_and_the_old_checkpoint_stays(checkpoint: Path) -> None:
    before = sorted(p.name for p in checkpoint.rglob("*"))
    parts = tiny_parts()
    with torch.no_grad():
        parts.unet.conv_in.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(CheckpointError, match="conv_in.weight: beyond fp16's range"):
        save_merged(checkpoint, parts, tiny_info())
    assert sorted(p.name for p in checkpoint.rglob("*")) == before
    assert [p.name for p in checkpoint.parent.iterdir()] == ["copy"]


def test_an_existing_checkpoint_is_replaced(checkpoint: Path) -> None:
    save_merged(checkpoint, tiny_parts(seed=1), tiny_info(name="second"))
    assert load_merged(checkpoint)[1].name == "second"
