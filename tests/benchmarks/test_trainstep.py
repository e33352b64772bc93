"""The training benchmark at a tiny geometry."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.errors import BenchmarkError
from benchmarks.trainstep import main, measure
from rcod_train.errors import Interrupted, TrainError
from rcod_train.models.sd import ClipVpim, SdVae
from rcod_train.network import Parts, freeze
from tests.tiny_sd import tiny_clip, tiny_unet, tiny_vae


def test_a_step_is_measured_and_every_switch_of_roles_is_in_it() -> None:
    """The metric's encoder, regulariser and base in VSD, the regulariser's own update: each there
    and back."""
    vpim = ClipVpim(tiny_clip().config.to_dict(), 24)
    parts = Parts(SdVae.from_config(tiny_vae().config), tiny_unet(), vpim)
    freeze(parts, torch.device("cpu"))
    figures = measure(parts, "fp32", 64, 2, perceptual=None)
    assert figures["switches_per_step"] == 8
    assert 0 < figures["switching_s"] < figures["step_s"] == figures["all_steps_s"][1]
    assert figures["switching_share"] == figures["switching_s"] / figures["step_s"]
    assert figures["peak_bytes"] >= figures["loaded_bytes"] > 1e8


@pytest.mark.parametrize(
    ("peak_bytes", "share", "code"), [(6.46e9, 1e-4, 0), (14.1e9, 1e-4, 1), (6.46e9, 0.031, 1)]
)
def test_limits_are_judged(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    peak_bytes: float,
    share: float,
    code: int,
) -> None:
    figures = {
        "loaded_bytes": 3e9, "peak_bytes": peak_bytes, "step_s": 50.0, "switching_s": 0.005,
        "switching_share": share,
    }  # fmt: skip
    monkeypatch.setattr("benchmarks.trainstep.random_parts", lambda dtype: None)
    monkeypatch.setattr("benchmarks.trainstep.measure", lambda *_, **__: figures)
    assert main(["--without-lpips"]) == code
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["limits"] == {"peak_bytes": 14e9, "switching_share": 0.03}
    assert document["peak_bytes"] == peak_bytes


def test_a_crop_that_the_networks_cannot_take_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--crop", "100"]) != 0
    assert "expected a crop of 64, 128, ... px" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TrainError("the loss is NaN"), BenchmarkError.exit_code, "the loss is NaN"),
        (Interrupted("stopped"), 130, "stopped; no result"),
    ],
)
def test_a_run_that_fails_or_is_stopped_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("benchmarks.trainstep.random_parts", lambda dtype: None)
    monkeypatch.setattr("benchmarks.trainstep.measure", fails)
    assert main(["--without-lpips"]) == code
    assert message in capsys.readouterr().err
