"""The training loop on a stage of one parameter: checkpoints, stopping, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import rcod_train.loop
from rcod_train.config import LoopConfig
from rcod_train.errors import CheckpointError, Interrupted, TrainError
from rcod_train.loop import Update, run_stage
from rcod_train.precision import Autocast
from rcod_train.stage_checkpoint import read_checkpoint
from tests.faults import full_disk

CONFIG = LoopConfig(steps=6, checkpoint_steps=2, learning_rate=0.1, warmup_steps=1)


class Line:
    """Fits w to noise of the step's generator; counts its steps in the extra state."""

    name = "line"

    def __init__(self, config: LoopConfig = CONFIG) -> None:
        self.config, self.seen = config, 0
        self.w = Parameter(torch.ones(3))
        self.groups = {"line": [({"w": self.w}, config.learning_rate)]}

    def updates(self, batch: Any, generator: torch.Generator) -> Iterator[Update]:
        self.seen += 1
        loss = (self.w - torch.randn(3, generator=generator) - batch).square().sum()
        yield Update("line", loss, {"seen": float(self.seen)})

    def extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def numbers(first: int) -> range:
    return range(first, CONFIG.steps)


def finished(folder: Path) -> Line:
    stage = Line()
    run_stage(stage, numbers, folder, seed=5, resume=False)
    return stage


def test_the_two_newest_checkpoints_are_kept_and_the_log_has_every_step(tmp_path: Path) -> None:
    finished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "losses.jsonl", "step-0000004.pt", "step-0000006.pt",
    ]  # fmt: skip
    rows = [json.loads(row) for row in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert all(row.keys() > {"line_loss", "line_grad_norm", "seen", "step_s"} for row in rows)


def test_rows_have_the_learning_rate_to_six_digits_and_go_to_whoever_asks(tmp_path: Path) -> None:
    """2e-7 at the first of ten steps of warm-up must not be logged as 0."""
    stage, rows = Line(dataclasses.replace(CONFIG, learning_rate=2e-6, warmup_steps=10)), []
    run_stage(stage, numbers, tmp_path, seed=5, resume=False, log_row=rows.append)
    logged = [json.loads(row) for row in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert logged[0]["learning_rate"] == pytest.approx(2e-7, rel=1e-6)
    for here, there in zip(rows, logged, strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def test_the_result_is_the_average_over_steps(tmp_path: Path) -> None:
    stage = finished(tmp_path)
    state = read_checkpoint(tmp_path / "step-0000006.pt")
    assert torch.equal(stage.w.detach(), state["ema"]["line.w"])
    assert not torch.equal(state["ema"]["line.w"], state["parameters"]["line.w"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_ends_bit_for_bit_equal(
    tmp_path: Path, number: signal.Signals
) -> None:
    expected = finished(tmp_path / "whole")

    def signalled(first: int) -> Iterator[int]:
        for i in numbers(first):
            if i == 2:
                os.kill(os.getpid(), number)
            yield i

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped at step 3 of 6.*--resume") as caught:
        run_stage(Line(), signalled, tmp_path / "cut", seed=5, resume=False)
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) is before
    resumed = Line()
    run_stage(resumed, numbers, tmp_path / "cut", seed=5, resume=True)
    assert torch.equal(resumed.w, expected.w) and resumed.seen == expected.seen


@pytest.mark.parametrize("moment", ["step", "validation", "save"])
def test_a_signal_in_the_last_step_stops_the_run_before_the_next_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    stage = Line(dataclasses.replace(CONFIG, validation_steps=6, checkpoint_steps=6))
    real = torch.save

    def signalled(when: str) -> None:
        if when == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    def batches(first: int) -> Iterator[int]:
        for i in numbers(first):
            if i == 5:
                signalled("step")
            yield i

    def saved(state: Any, file: Any) -> None:
        signalled("save")
        real(state, file)

    monkeypatch.setattr(rcod_train.loop.torch, "save", saved)
    with pytest.raises(Interrupted, match="stopped at step 6 of 6, state saved.*--resume"):
        run_stage(stage, batches, tmp_path, 5, False, validate=lambda _: signalled("validation"))
    run_stage(Line(stage.config), numbers, tmp_path, seed=5, resume=True)  # the next stage's turn


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path) -> None:
    def poisoned(first: int) -> Iterator[float]:
        yield from (0.0, 0.0, float("nan"))

    with pytest.raises(TrainError, match="stage line, step 2: the line loss is nan"):
        run_stage(Line(), poisoned, tmp_path, seed=0, resume=False)
    assert read_checkpoint(tmp_path / "step-0000002.pt")["step"] == 2


def test_a_cut_off_checkpoint_is_named(tmp_path: Path) -> None:
    finished(tmp_path)
    newest = tmp_path / "step-0000006.pt"
    newest.write_bytes(newest.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match="step-0000006.pt: not a whole checkpoint"):
        run_stage(Line(), numbers, tmp_path, seed=5, resume=True)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save(Evil(), tmp_path / "step-0000001.pt")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "step-0000001.pt")
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_loses_nothing_that_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saves = torch.save, []

    def full_at_the_second(state: Any, file: Any) -> None:
        saves.append(state)
        real(state, file)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(rcod_train.loop.torch, "save", full_at_the_second)
    with pytest.raises(TrainError, match=r"No space left on device.*--resume"):
        finished(tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("step*"))] == ["step-0000002.pt"]
    assert read_checkpoint(tmp_path / "step-0000002.pt")["step"] == 2


@pytest.mark.parametrize(("number", "name"), [(1, "losses.jsonl"), (3, "step-0000002.pt")])
def test_a_full_disk_is_named_at_every_write_and_no_partial_file_is_left(
    tmp_path: Path, number: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the refusal in torch.save its own writer makes a RuntimeError. (capsys: what the progress
    bar says goes to no file.)"""
    with (
        pytest.raises(TrainError, match=rf"{name}: .*could not be written \(.*--resume"),
        full_disk(tmp_path, number) as opened,
    ):
        finished(tmp_path)
    assert len(opened) == number
    assert [p.name for p in tmp_path.iterdir()] == ["losses.jsonl"]


def test_the_log_of_a_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").write_text('{"step": 0, "line_loss": 1.0}\n')
    finished(tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))


# -- several batches to a step, half precision, broken gradients, averaged weights ----------------


class Mean:
    """Fits w to the mean of its batches (n, 3); nothing is random."""

    name = "mean"

    def __init__(self, **changes: Any) -> None:
        self.config = dataclasses.replace(CONFIG, **changes)
        self.w = Parameter(torch.ones(3))
        self.groups = {"mean": [({"w": self.w}, self.config.learning_rate)]}

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.w - batch).square().mean()

    def updates(self, batch: torch.Tensor, generator: torch.Generator) -> Iterator[Update]:
        yield Update("mean", self.loss(batch), {"term": self.loss(batch).detach()})

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass


def test_accumulated_batches_are_one_batch_of_their_sum(tmp_path: Path) -> None:
    data = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    whole, split = Mean(), Mean(accumulate=2)
    run_stage(whole, lambda first: list(data[first:]), tmp_path / "a", seed=0, resume=False)
    halves = data.view(12, 2, 3)
    run_stage(split, lambda first: list(halves[first:]), tmp_path / "b", seed=0, resume=False)
    torch.testing.assert_close(split.w, whole.w, atol=1e-6, rtol=0)
    logs = [(tmp_path / run / "losses.jsonl").read_text().splitlines() for run in "ab"]
    for one, two in zip(*logs, strict=True):
        one, two = json.loads(one), json.loads(two)
        assert two["mean_loss"] == pytest.approx(one["mean_loss"], abs=2e-6)
        assert two["mean_grad_norm"] == pytest.approx(one["mean_grad_norm"], abs=2e-6)


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path) -> None:
    class Root(Mean):
        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return (self.w * batch).abs().sqrt().sum()  # 0, and its slope 0 * inf

    def zeros(first: int) -> list[torch.Tensor]:
        return [torch.ones(1, 3)] * 3 + [torch.zeros(1, 3)] * 3

    stage = Root()
    words = "stage mean, step 3: the gradient of the mean loss is nan, first in w"
    with pytest.raises(TrainError, match=words):
        run_stage(stage, zeros, tmp_path, seed=0, resume=False)
    assert torch.isfinite(stage.w).all()
    assert [p.name for p in tmp_path.glob("step*")] == ["step-0000002.pt"]


def test_a_clip_norm_of_0_clips_nothing(tmp_path: Path) -> None:
    ends = []
    for clip_norm in (0.0, 1e9):
        stage = Mean(clip_norm=clip_norm)
        zeros = [torch.zeros(1, 3)] * 6
        run_stage(stage, lambda f, z=zeros: z[f:], tmp_path / str(clip_norm), 0, False)
        ends.append(stage.w.detach())
    assert torch.equal(*ends) and (ends[0] < 0.99).all()


@pytest.mark.parametrize(
    "words",
    ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"],
)
def test_memory_that_does_not_suffice_is_named_with_what_to_lower(
    tmp_path: Path, words: str
) -> None:
    class Large(Mean):
        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(words)

    lower = (
        r"stage mean, step 0: not enough memory \(.* Lower mean\.photos_per_batch and raise mean"
    )
    with pytest.raises(TrainError, match=lower):
        run_stage(Large(), lambda _: [torch.zeros(1, 3)] * 6, tmp_path, 0, resume=False)
    words = "shape mismatch"  # what is no lack of memory stays what it is
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_stage(Large(), lambda _: [torch.zeros(1, 3)] * 6, tmp_path, 0, resume=False)


def test_the_term_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"the mean loss is nan \(not finite: term\)"):
        run_stage(Mean(), lambda _: [torch.full((1, 3), torch.nan)], tmp_path, seed=0, resume=False)


def test_fp16_leaves_out_a_step_that_overflows_and_scales_the_loss_less(tmp_path: Path) -> None:
    """The gradient is 16 w, and half precision ends at 65504: from a scale of 65536 on, five
    halvings are needed."""

    class Half(Mean):
        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return 8 * self.w.half().float().square().sum()

    stage = Half(steps=8, checkpoint_steps=8)
    ones = [torch.zeros(1, 3)] * 8
    run_stage(stage, lambda f: ones[f:], tmp_path, 0, False, Autocast("fp16"))
    rows = [json.loads(row) for row in (tmp_path / "losses.jsonl").read_text().splitlines()]
    losses = [row["mean_loss"] for row in rows]
    # null: JSON has no infinity
    assert [row["mean_grad_norm"] is None for row in rows] == [True] * 5 + [False] * 3
    assert losses[:6] == [24.0] * 6 and losses[6] < 24.0
    assert read_checkpoint(tmp_path / "step-0000008.pt")["scalers"]["mean"]["scale"] == 2048


def test_the_validation_sees_the_averaged_weights_and_the_training_goes_on_with_its_own(
    tmp_path: Path,
) -> None:
    seen: dict[int, torch.Tensor] = {}
    stage = Line(dataclasses.replace(CONFIG, validation_steps=4))

    def validate(step: int) -> None:
        seen[step] = stage.w.detach().clone()

    run_stage(stage, numbers, tmp_path / "a", seed=5, resume=False, validate=validate)
    assert list(seen) == [4, 6]
    state = read_checkpoint(tmp_path / "a" / "step-0000004.pt")
    assert torch.equal(seen[4], state["ema"]["line.w"])
    assert not torch.equal(seen[4], state["parameters"]["line.w"])
    assert torch.equal(stage.w, finished(tmp_path / "b").w)


def test_a_validation_that_fails_costs_no_step(tmp_path: Path) -> None:
    """What it lacks is memory of its own: smaller batches would not help."""

    def large(step: int) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    stage = Line(dataclasses.replace(CONFIG, validation_steps=4))
    words = r"stage line, validation at step 4: not enough memory \(CUDA .* --set line\.validation_"
    with pytest.raises(TrainError, match=words):
        run_stage(stage, numbers, tmp_path / "a", seed=5, resume=False, validate=large)
    assert (tmp_path / "a" / "step-0000004.pt").exists()
    resumed = Line()
    run_stage(resumed, numbers, tmp_path / "a", seed=5, resume=True)
    assert torch.equal(resumed.w, finished(tmp_path / "b").w)


class Wide(Line):
    """Enough values for 8-bit moments."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__(config)
        self.w = Parameter(torch.ones(8192))
        self.groups = {"line": [({"w": self.w}, config.learning_rate)]}

    def updates(self, batch: Any, generator: torch.Generator) -> Iterator[Update]:
        yield Update("line", self.w.square().mean(), {})


def test_moments_in_8_bits_train_and_resume_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = dataclasses.replace(CONFIG, optimizer="adamw8bit", ema_decay=0.0)
    whole, again = Wide(config), Wide(config)
    run_stage(whole, numbers, tmp_path, seed=5, resume=False)
    assert whole.w.abs().max() < 0.9
    last = tmp_path / "step-0000006.pt"
    state = read_checkpoint(last)["optimizers"]["line"]["state"]
    (moments,) = (value for value in state[0].values() if isinstance(value, dict))
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    last.unlink()
    run_stage(again, numbers, tmp_path, seed=5, resume=True)
    assert torch.equal(again.w, whole.w)


def test_a_missing_package_for_8_bits_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    stage = Wide(dataclasses.replace(CONFIG, optimizer="adamw8bit"))
    with pytest.raises(TrainError, match=r'pip install "rcod\[8bit\]"'):
        run_stage(stage, numbers, tmp_path, seed=5, resume=False)
