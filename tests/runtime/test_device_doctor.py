"""What rcod-doctor says of a bundle's engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcod_runtime.cli import doctor
from rcod_runtime.errors import BackendError
from tests.runtime.simulated.cudart import SimulatedGpu, released
from tests.runtime.simulated.tensorrt import TILE_PX, add_engines, install


def test_doctor_says_which_engines_fit_and_runs_them(
    gpu: SimulatedGpu, own_engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_engines(own_engines, TILE_PX)
    assert doctor.main(["--bundle", str(own_engines), "--device", "cuda:1"]) == 0
    out = capsys.readouterr().out
    assert "gpu cuda:1: sm_89" in out and "tensorrt 10.9.0" in out
    assert "engines/tensorrt/sm89/64px: fits" in out
    assert "backend tensorrt: tensorrt 10.9.0 fp32, loads" in out
    assert "used by default: tensorrt 10.9.0 fp32 on cuda:1" in out
    assert released(gpu) == {}


def test_doctor_says_why_engines_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, SimulatedGpu(sm=120))
    assert doctor.main(["--bundle", str(engines)]) == 0  # a CPU runs it
    out = capsys.readouterr().out
    assert "64px: not used, built for sm_89, this GPU is sm_120" in out
    assert "used by default: openvino" in out
    assert doctor.main(["--bundle", str(engines), "--device", "cuda:0"]) == 7
    assert "this GPU is sm_120" in capsys.readouterr().err


def test_doctor_goes_on_where_engines_that_fit_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch,
    gpu: SimulatedGpu,
    engines: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: object) -> None:
        raise BackendError("out of memory")

    monkeypatch.setattr("rcod_runtime.backends.trt.chain.open_device_chain", refused)
    assert doctor.main(["--bundle", str(engines)]) == 0
    out = capsys.readouterr().out
    assert "backend tensorrt: not used, out of memory" in out and "used by default: openvino" in out
    assert doctor.main(["--bundle", str(engines), "--device", "cuda:0"]) == 5
