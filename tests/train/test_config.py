"""``--set`` and the commands' arguments."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import rcod_train.run
from rcod_train.config import NANO_REFINE, EstimatorConfig, TrainConfig
from rcod_train.errors import ConfigError
from rcod_train.main import main
from rcod_train.overrides import with_overrides
from rcod_train.precision import resolve_device, resolve_precision
from rcod_train.quality.features import INSTALL_LINE
from rcod_train.ranks import Ranks

CONFIG = TrainConfig(data=("photos",), out="run")


def test_a_value_is_read_by_the_type_of_its_field() -> None:
    config = with_overrides(
        CONFIG, ["rcod.steps=7", "rcod.vsd_weight=0", "rcod.train_decoder=false", "precision=fp32"]
    )
    assert (config.rcod.steps, config.rcod.vsd_weight) == (7, 0.0)
    assert config.rcod.train_decoder is False and config.precision == "fp32"
    assert config.vae == CONFIG.vae


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("rcod.steps", "expected FIELD=VALUE"),
        ("rcod.stepz=1", "unknown field 'stepz'; expected one of"),
        ("colour=red", "unknown field 'colour'"),
        ("rcod=1", "'rcod' is a group"),
        ("seed.a=1", "'seed' has no field 'a'"),
        ("rcod.steps=many", "expected a value of type int"),
        ("rcod.vsd_weight=x", "expected a value of type float"),
        ("rcod.train_decoder=1", "expected a value of type bool"),
        *(
            (f"{stage}.validation_steps=5", "expected 0, as nothing here uses it, found 5")
            for stage in ("vae", "base", "mem")
        ),
        ("start=run", "'start' is the option --from's, .* expected --from run"),
        ("data=foo", "'data' is a list, which --set can't give; expected --data with its parts"),
        (
            "vae.checkpoint_steps=0",
            "vae.checkpoint_steps=0': checkpoint_steps: expected at least 1",
        ),
        ("vae.crop_px=0", "crop_px: expected at least 1, found 0"),
        ("vae.beta2=1", "beta2: expected 0 to 0.99999, found 1.0"),
        ("base.learning_rate=-1", "learning_rate: expected at least 0, found -1.0"),
        ("base.learning_rate=nan", "learning_rate: expected at least 0, found nan"),
        ("base.drop_tokens=2", "drop_tokens: expected 0 to 1, found 2.0"),
        ("rcod.rank_unet=0", "rank_unet: expected at least 1, found 0"),
        ("rcod.metric_samples=0", "metric_samples: expected at least 2, found 0"),
        ("rcod.metric_quantile=0.6", "metric_quantile: expected 0 to 0.49, found 0.6"),
        ("rcod.heavy_share=1.5", "heavy_share: expected 0 to 1, found 1.5"),
        ("workers=-1", "workers: expected at least 0, found -1"),
        ("pairs_share=-1", "pairs_share: expected 0 to 1, found -1.0"),
    ],
)
def test_a_wrong_assignment_is_named(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_overrides(CONFIG, [assignment])


def test_the_estimator_has_no_validation_to_hold_photos_out_for() -> None:
    config = EstimatorConfig(data=("photos",), out="run")
    for assignment in ("validation_share=0.1", "estimator.validation_steps=5"):
        with pytest.raises(ConfigError, match="expected 0, as nothing here uses it, found"):
            with_overrides(config, [assignment])


def test_the_resolved_configuration_is_written(tmp_path: Path) -> None:
    CONFIG.write(tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rcod"]["steps"] == CONFIG.rcod.steps and saved["seed"] == 0


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ({"cpu_name": "Intel Xeon", "amx_bf16": False}, "fp32"),
        ({"cpu_name": "Intel Xeon", "amx_bf16": True}, "bf16"),
        ({"cpu_name": "AMD EPYC", "amx_bf16": False}, "bf16"),
        ({}, "bf16"),
    ],
)
def test_auto_is_bf16_where_it_is_faster_than_fp32(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, object], chosen: str
) -> None:
    assert "cpu_name" in torch.cpu.get_capabilities(), "what the choice looks at"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert resolve_precision("auto") == chosen


def test_precision_is_one_of_three() -> None:
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("auto") in ("fp32", "bf16")
    with pytest.raises(ConfigError, match="expected auto, fp32, bf16 or fp16"):
        resolve_precision("fp8")


def test_missing_lpips_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("rcod_train.quality.features.find_shipped", lambda *_: None)
    argv = ["nano", "--data", str(photos), "--out", str(tmp_path / "run"), "--lpips"]
    for name in ("vae", "base", "regression", "rcod", "refine", "mem"):
        argv += ["--set", f"{name}.crop_px=32", "--set", f"{name}.context_px=64"]
    assert main(argv) == 9
    error = capsys.readouterr().err
    assert INSTALL_LINE in error and "train without it: nano without --lpips" in error
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--set", "rcod.lpips_crop_px=31"]) == 2
    assert "rcod: LPIPS needs 32 px a side, found crop_px 32" in capsys.readouterr().err


def test_a_missing_package_for_8_bits_is_found_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not by the stage that wants it, after hours."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    argv = ["nano", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    for stage in ("refine", "mem"):
        assert main([*argv, "--set", f"{stage}.optimizer=adamw8bit"]) == 9
        assert 'pip install "rcod[8bit]"' in capsys.readouterr().err
    left_out = ["--set", "refine.optimizer=adamw8bit", "--set", "refine.steps=0"]
    assert main([*argv, *left_out]) == 9
    assert "expected a folder of photos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        ([], 9, "DataError: .*expected a folder of photos"),
        (["--set", "rcod.stepz=1"], 2, "ConfigError: .*unknown field"),
        (["--seed", "-1"], 2, "ConfigError: seed: expected at least 0, found -1"),
        (
            ["--set", "vae.crop_px=60"],
            2,
            "vae.crop_px: expected a multiple of 8 from 24 on, found 60",
        ),
        (
            ["--set", "mem.crop_px=16"],
            2,
            "mem.crop_px: expected a multiple of 8 from 24 on, found 16",
        ),
        (
            ["--set", "mem.crop_px=128", "--set", "mem.context_px=64"],
            2,
            r"ConfigError: mem.crop_px: expected 1 to context_px \(64\), found 128",
        ),
        (
            ["--set", "mem.context_px=390"],
            2,
            "mem.context_px: expected a multiple of 4, .* found 390",
        ),
        (["--set", "vae.context_px=258"], 9, "DataError"),  # it degrades nothing
        (
            ["--set", "rcod.heavy_share=0.8", "--set", "rcod.mild_share=0.4"],
            2,
            "ConfigError: rcod.heavy_share and mild_share: .* together, found 0.8 and 0.4",
        ),
        (
            ["--set", "rcod.n=5", "--set", "refine.steps=0"],
            2,
            "ConfigError: rcod.n: expected 1 to 4 groups, found 5",
        ),
        (
            ["--set", "rcod.n=4", "--set", "refine.steps=0"],
            2,
            "rcod.k: expected 1 to 249 with 4 groups, found 250",
        ),
        (
            ["--set", "rcod.n=4", "--set", "rcod.k=249", "--set", "refine.steps=0"],
            9,
            "DataError: .*expected a folder",
        ),
        (
            ["--set", "rcod.grouping=official", "--set", "rcod.n=2", "--set", "refine.steps=0"],
            2,
            "expected rcod.n 3 or 4",
        ),
        (
            ["--set", "rcod.grouping=official", "--set", "rcod.n=4", "--set", "refine.steps=0"],
            9,
            "DataError",
        ),
        (["--set", "rcod.n=2"], 2, r"refine.n: expected that of rcod \(2\), found 3"),
        (["--set", "rcod.n=2", "--set", "refine.n=2"], 9, "DataError"),
        (["--set", "refine.vsd_weight=1"], 2, "refine.vsd_weight: expected 0, found 1.0"),
        (["--set", "refine.steps=-1"], 2, "steps: expected at least 0, found -1"),
        (["--set", "rcod.train_adapters=false"], 2, "and vsd_weight=0, found True and 0.5"),
        (["--data", "."], 2, "ConfigError: --out .*out: lies in [.], and the pictures"),
    ],
)
def test_the_command_prints_one_line_and_its_exit_code(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["nano", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), *extra]
    assert main(argv) == code
    error = capsys.readouterr().err
    assert re.search(words, error) and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_bundle_could_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Not after the training, by the export."""
    with pytest.raises(SystemExit) as caught:
        main(["nano", "--data", "photos", "--out", "out", "--name", "my photos"])
    assert caught.value.code == 2
    assert "--name: expected 1 to 64 letters, digits" in capsys.readouterr().err


def test_a_stop_before_the_steps_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(rcod_train.run, "find_photos", told)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["nano", "--data", "photos", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith("stopped; what is written is whole\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_build_without_onednn_trains_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """It doesn't know the operator that tells whether bf16 is supported."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    assert resolve_precision("auto") == "fp32"


def test_several_processes_do_not_share_one_gpu() -> None:
    with pytest.raises(ConfigError, match="device 'cuda:0': expected auto or cuda for 2 processes"):
        resolve_device("cuda:0", Ranks(1, 2, 1))


def test_nano_validates_where_photos_are_held_out() -> None:
    assert CONFIG.regression.validation_steps and CONFIG.rcod.validation_steps
    assert NANO_REFINE.validation_steps


@pytest.mark.parametrize(
    ("choice", "ranks", "current"),
    [("auto", None, 0), ("cuda", Ranks(), 0), ("cuda:1", None, 1), ("cuda", Ranks(1, 2, 1), 1)],
)
def test_the_gpu_of_a_run_is_what_pytorch_asks_without_naming_one(
    monkeypatch: pytest.MonkeyPatch, choice: str, ranks: Ranks | None, current: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert resolve_device(choice, ranks).type == "cuda" and asked == [current]
