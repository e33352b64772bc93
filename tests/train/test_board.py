"""TensorBoard's log, read back from its files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rcod_train.board import Board
from rcod_train.config import LoopConfig, TrainConfig
from rcod_train.errors import MissingPackage
from rcod_train.run import Run
from tests.train.test_loop import Line, numbers

LEVELS = {"input": {"psnr_y_db": 20.0, "niqe": None}, "realism": {"psnr_y_db": 25.0, "niqe": 5.5}}


def read(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Every scalar as (step, value), and the names of the images."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, tags["images"]


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own imports
def test_rows_and_validations_are_logged_at_the_steps_that_are_done(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = Board(tmp_path)
    for step in range(3):
        board.row({"step": step, "learning_rate": 0.5, "line_loss": float(step)})
    board.validation(3, LEVELS, np.zeros((8, 16, 3), np.uint8))
    board.close()
    scalars, images = read(tmp_path)
    assert scalars == {
        "train/learning_rate": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "train/line_loss": [(1, 0.0), (2, 1.0), (3, 2.0)],
        "validation_psnr_y_db/input": [(3, 20.0)],
        "validation_psnr_y_db/realism": [(3, 25.0)],
        "validation_niqe/realism": [(3, 5.5)],
    }
    assert images == ["validation/grid"]


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_takes_the_place_of_the_steps_it_makes_again(tmp_path: Path) -> None:
    """Killed after step 3 with a checkpoint of step 2; its validation at 2 stays."""
    pytest.importorskip("tensorboard")
    first = Board(tmp_path)
    for step in (0, 1):
        first.row({"step": step, "line_loss": 1.0})
    first.validation(2, LEVELS, np.zeros((8, 16, 3), np.uint8))
    first.row({"step": 2, "line_loss": 1.0})
    first.close()
    second = Board(tmp_path)
    second.row({"step": 2, "line_loss": 9.0})
    second.close()
    scalars, _ = read(tmp_path)
    assert scalars["train/line_loss"] == [(1, 1.0), (2, 1.0), (3, 9.0)]
    assert scalars["validation_psnr_y_db/input"] == [(2, 20.0)]


@pytest.mark.filterwarnings("ignore")
def test_a_run_logs_every_stage_in_a_folder_of_its_own(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = TrainConfig((str(photos),), str(tmp_path), tensorboard=True)
    run = Run(config, (LoopConfig(context_px=96, crop_px=64),), resume=False)
    assert not (tmp_path / "tensorboard").exists()  # nothing is written before the first step
    stage = Line()
    stage.name = "mem"
    run.train(stage, numbers)
    assert [p.name for p in (tmp_path / "tensorboard").iterdir()] == ["mem"]
    scalars, _ = read(tmp_path / "tensorboard" / "mem")
    assert [step for step, _ in scalars["train/line_loss"]] == [1, 2, 3, 4, 5, 6]
    assert scalars["train/seen"][-1] == (6, 6.0)


def test_without_tensorboard_the_error_has_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackage, match=r'pip install "rcod\[tensorboard\]"'):
        Board(tmp_path)
    assert list(tmp_path.iterdir()) == []
