"""A stage of one parameter, resumed: what a run goes on from, and what it refuses to."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rcod_train.loop
from rcod_train.config import LoopConfig, TrainConfig
from rcod_train.errors import CheckpointError, Interrupted, TrainError
from rcod_train.fingerprint import fingerprint
from rcod_train.loop import run_stage
from rcod_train.ranks import Ranks
from rcod_train.run import Run
from rcod_train.stage_checkpoint import read_checkpoint
from tests.train.test_loop import CONFIG, Line, Mean, finished, numbers


def test_a_killed_run_resumes_from_its_last_checkpoint_and_the_log_has_no_step_twice(
    tmp_path: Path,
) -> None:
    expected = finished(tmp_path / "whole")

    def dying(first: int) -> Iterator[int]:
        yield from range(first, 5)
        raise KeyError("the worker died")

    with pytest.raises(KeyError):
        run_stage(Line(), dying, tmp_path / "cut", seed=5, resume=False)
    log = tmp_path / "cut" / "losses.jsonl"
    with log.open("a") as file:
        file.write('{"step": 5, "line_')  # cut off while writing
    resumed = Line()
    run_stage(resumed, numbers, tmp_path / "cut", seed=5, resume=True)
    assert torch.equal(resumed.w, expected.w)
    assert [json.loads(row)["step"] for row in log.read_text().splitlines()] == list(range(6))


def test_a_finished_stage_only_loads_its_weights(tmp_path: Path) -> None:
    expected = finished(tmp_path)
    again = Line()

    def unused(first: int) -> range:
        raise AssertionError("no batches are needed")

    run_stage(again, unused, tmp_path, seed=5, resume=True)
    assert torch.equal(again.w, expected.w)


def test_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(CheckpointError, match="Add --resume"):
        finished(tmp_path)


def test_a_run_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    finished(tmp_path)
    other = Line(dataclasses.replace(CONFIG, clip_norm=0.2))
    with pytest.raises(CheckpointError, match="clip_norm: 1.0 there, 0.2 here"):
        run_stage(other, numbers, tmp_path, seed=5, resume=True)
    with pytest.raises(CheckpointError, match="another seed"):
        run_stage(Line(), numbers, tmp_path, seed=6, resume=True)


def test_after_a_divergence_a_run_goes_on_with_a_lower_learning_rate(tmp_path: Path) -> None:
    def poisoned(first: int) -> Iterator[float]:
        yield from (0.0, 0.0, float("nan"))

    with pytest.raises(TrainError, match="Lower its learning rates and add --resume"):
        run_stage(Line(), poisoned, tmp_path, seed=5, resume=False)
    before = read_checkpoint(tmp_path / "step-0000002.pt")["parameters"]["line.w"]
    slower = Line(dataclasses.replace(CONFIG, learning_rate=0.0))
    run_stage(slower, numbers, tmp_path, seed=5, resume=True)
    after = read_checkpoint(tmp_path / "step-0000006.pt")["parameters"]["line.w"]
    assert torch.equal(before, after), "trained on with the rate of before"


def test_a_longer_run_of_the_same_settings_is_continued(tmp_path: Path) -> None:
    finished(tmp_path)
    longer = Line(dataclasses.replace(CONFIG, steps=8))
    run_stage(longer, lambda first: range(first, 8), tmp_path, seed=5, resume=True)
    assert longer.seen == 8


def test_a_stage_is_resumed_on_the_weights_that_it_was_built_on_alone(
    photos: Path, tmp_path: Path
) -> None:
    def trained(steps: int, resume: bool) -> None:
        config = TrainConfig((str(photos),), str(tmp_path))
        run = Run(config, (LoopConfig(context_px=96, crop_px=64),), resume)
        for name, last in (("vae", steps), ("base", 6)):
            stage = Line(dataclasses.replace(CONFIG, steps=last))
            stage.name = name
            run.train(stage, lambda first, last=last: range(first, last))

    trained(6, resume=False)
    trained(6, resume=True)
    base, aside = tmp_path / "base", tmp_path / "aside"
    words = f"stage vae would be trained on from step 6 to 8, .* delete {base} to train them again"
    with pytest.raises(CheckpointError, match=words):
        trained(8, resume=True)
    base.rename(aside)
    trained(8, resume=True)
    shutil.rmtree(base)
    aside.rename(base)
    words = f"built on other weights of vae than .* Delete {base} and the later stages' folders"
    with pytest.raises(CheckpointError, match=words):
        trained(8, resume=True)
    newest = base / "step-0000006.pt"
    state = read_checkpoint(newest)
    del state["inherited"]  # an older one is taken at its word
    torch.save(state, newest)
    trained(8, resume=True)


def test_a_resumed_run_goes_on_with_the_batch_after_its_last_step(tmp_path: Path) -> None:
    asked = []

    def batches(first: int) -> list[torch.Tensor]:
        asked.append(first)
        return [torch.zeros(1, 3)] * 20

    run_stage(Mean(steps=2, accumulate=3), batches, tmp_path, seed=0, resume=False)
    run_stage(Mean(steps=4, accumulate=3), batches, tmp_path, seed=0, resume=True)
    assert asked == [0, 6]


class Two(Ranks):
    """The first of two processes, whose other one has the same batches."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def average_(self, tensors: Any) -> None:
        pass

    def any(self, flag: bool, device: torch.device) -> bool:
        return flag

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def wait(self) -> None:
        pass


def test_a_run_is_resumed_on_other_processes_with_as_many_batches_to_a_step(tmp_path: Path) -> None:
    asked = []

    def batches(first: int) -> list[torch.Tensor]:
        asked.append(first)
        return [torch.zeros(1, 3)] * 20

    run_stage(Mean(steps=2, accumulate=4), batches, tmp_path, 0, resume=False)
    words = "accumulate x processes: 4 x 1 there, 4 x 2 here"
    with pytest.raises(CheckpointError, match=words):
        run_stage(Mean(steps=4, accumulate=4), batches, tmp_path, 0, resume=True, ranks=Two())
    run_stage(Mean(steps=4, accumulate=2), batches, tmp_path, 0, resume=True, ranks=Two())
    assert asked == [0, 4]  # of each process
    newest = tmp_path / "step-0000004.pt"
    state = read_checkpoint(newest)
    assert (state["config"]["accumulate"], state.pop("processes")) == (2, 2)
    torch.save(state, newest)  # an older one: of as many processes as there are now
    run_stage(Mean(steps=6, accumulate=2), batches, tmp_path, 0, resume=True, ranks=Two())
    assert asked == [0, 4, 8]


def test_a_checkpoint_older_than_a_setting_is_continued_at_its_default(tmp_path: Path) -> None:
    finished(tmp_path)
    newest = tmp_path / "step-0000006.pt"
    state = read_checkpoint(newest)
    del state["config"]["accumulate"], state["config"]["beta2"], state["scalers"]
    torch.save(state, newest)
    run_stage(Line(), numbers, tmp_path, seed=5, resume=True)
    other = Line(dataclasses.replace(CONFIG, accumulate=2))
    run_stage(other, numbers, tmp_path, seed=5, resume=True)  # it is finished: no step is made
    further = Line(dataclasses.replace(CONFIG, accumulate=2, steps=CONFIG.steps + 1))
    with pytest.raises(CheckpointError, match="accumulate x processes: 1 x 1 there, 2 x 1 here"):
        run_stage(further, numbers, tmp_path, seed=5, resume=True)


def test_processes_that_have_different_checkpoints_are_refused(tmp_path: Path) -> None:
    """Of several machines without a shared --out only the first has any: it would go on with its
    weights and the others with new ones."""

    class Apart(Two):
        def gather(self, value: Any) -> list[Any]:
            return [value, (0, fingerprint(()))]

    def batches(first: int) -> list[torch.Tensor]:
        return [torch.zeros(1, 3)] * 20

    with pytest.raises(TrainError, match="the processes begin with different weights"):
        run_stage(Mean(steps=2), batches, tmp_path, 0, resume=False, ranks=Apart())
    run_stage(Mean(steps=2), batches, tmp_path, 0, resume=False, ranks=Two())
    with pytest.raises(TrainError, match="at steps 2, 0 .* Give all machines a shared --out"):
        run_stage(Mean(steps=4), batches, tmp_path, 0, resume=True, ranks=Apart())
    run_stage(Mean(steps=4), batches, tmp_path, 0, resume=True, ranks=Two())


def test_after_a_signal_the_processes_end_when_the_first_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher ends them all as soon as one does."""
    events: list[str] = []

    class Waiting(Two):
        def wait(self) -> None:
            events.append("wait")

    def signalled(first: int) -> Iterator[torch.Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            yield torch.zeros(1, 3)

    monkeypatch.setattr(rcod_train.loop, "write_checkpoint", lambda *_: events.append("saved"))
    with pytest.raises(Interrupted, match="stopped at step 1 of 4"):
        run_stage(Mean(steps=4), signalled, tmp_path, 0, resume=False, ranks=Waiting())
    assert events == ["wait", "saved", "wait"]


def test_a_run_is_not_continued_on_other_photos(tmp_path: Path) -> None:
    drawn = {"photos": "4 (ab)", "pairs_share": 0.5}

    def resumed(**changes: Any) -> None:
        run_stage(Line(), numbers, tmp_path, seed=5, resume=True, data=drawn | changes)

    run_stage(Line(), numbers, tmp_path, seed=5, resume=False, data=drawn)
    resumed()
    with pytest.raises(CheckpointError, match=r"photos: 4 \(ab\) there, 4 \(cd\) here"):
        resumed(photos="4 (cd)")
    with pytest.raises(CheckpointError, match="pairs_share: 0.5 there, 0.1 here"):
        resumed(pairs_share=0.1)
    newest = tmp_path / "step-0000006.pt"
    state = read_checkpoint(newest)
    del state["data"]  # an older one is taken at its word
    torch.save(state, newest)
    resumed(photos="4 (cd)")


def test_photos_are_the_same_when_their_folder_is_moved(photos: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(photos, tmp_path / "moved")

    def drawn_from(folder: Path, **changes: Any) -> dict[str, Any]:
        config = TrainConfig((str(folder),), str(tmp_path / "out"), **changes)
        return Run(config, (LoopConfig(context_px=96, crop_px=64),), resume=False).drawn_from

    here = drawn_from(photos)
    assert drawn_from(moved) == here
    assert drawn_from(moved, validation_share=0.25) != here  # fewer are left
    assert drawn_from(moved, pairs_share=0.1) != here
    shutil.copy(moved / "0.png", moved / "1.png")
    assert drawn_from(moved) != here
