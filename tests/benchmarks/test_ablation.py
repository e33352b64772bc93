"""``benchmarks.ablation``: what it asks of the commands, what it takes over and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import benchmarks.ablation as ablation
from benchmarks import iqa
from benchmarks.ablation import BUDGET, VARIANTS, AblationConfig, shared_settings
from benchmarks.errors import CommandFailed, DatasetError
from rcod_train.config import TrainConfig
from rcod_train.overrides import with_overrides


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the metrics of packages one can be had."""
    piqe = iqa.Loaded(iqa.PACKAGED[0], "", None, None)
    monkeypatch.setattr(ablation.iqa, "load", lambda names: ([piqe], {}))


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    """A run of rcod-train nano whose first two stages are finished, after a few steps."""
    folder = tmp_path / "nano"
    config = TrainConfig(("photos",), "out")
    config = with_overrides(config, ["vae.steps=7", "base.steps=5", "validation_share=0.1"])
    for stage in ("vae/step-0000007.pt", "base/step-0000005.pt"):
        (folder / stage).parent.mkdir(parents=True)
        (folder / stage).write_bytes(b"weights")
    config.write(folder / "config.json")
    return folder


def configured(stages: Path, tmp_path: Path, *variants: str) -> AblationConfig:
    settings = ("rcod.steps=9",)
    return AblationConfig(
        ("photos",), stages, Path("realsr"), tmp_path / "out", variants, settings, ("5",)
    )


def scored(commands: list[Sequence[str]]) -> object:
    """In the place of the commands: records them, and writes what the last one would."""

    def run(name: str, module: Sequence[str]) -> None:
        commands.append(module)
        if module[0] == "benchmarks.quality":
            mean = {"psnr_y": 26.0 + len(name), "ssim_y": 0.75, "niqe": 6.0}
            methods = [
                {"name": "bicubic", "kind": "reference", "mean": mean},
                {"name": "fidelity", "kind": "model", "mean": mean},
            ]
            path = Path(module[module.index("--json") + 1])
            path.write_text(json.dumps({"methods": methods}))

    return run


def interrupted(name: str, module: Sequence[str]) -> None:
    raise KeyboardInterrupt


def test_every_variant_is_a_setting_that_rcod_train_knows(stages: Path) -> None:
    shared = shared_settings(stages)
    for name, settings in VARIANTS.items():
        config = with_overrides(TrainConfig(("p",), "o"), [*shared, *BUDGET, *settings])
        assert (config.vae.steps, config.base.steps, config.validation_share) == (7, 5, 0.1)
        changed = config != with_overrides(TrainConfig(("p",), "o"), [*shared, *BUDGET])
        assert changed is (name != "rcod")


def test_variants_share_two_stages_and_are_trained_exported_and_scored(
    stages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(ablation, "_run", scored(commands))
    config = configured(stages, tmp_path, "rcod", "no_vsd")
    document = json.loads(ablation.measure(config))
    assert [c[0] for c in commands] == 2 * [
        "rcod_train.main", "rcod_export.main", "benchmarks.quality",
    ]  # fmt: skip
    train = commands[3]
    assert "vae.steps=7" in train and train[-1] == "rcod.vsd_weight=0" and "--resume" in train
    assert train.index("rcod.steps=9") > train.index("rcod.steps=400"), "the last one counts"
    assert (config.out / "no_vsd" / "base" / "step-0000005.pt").read_bytes() == b"weights"
    assert commands[5][-2:] == ["--names-ending", "5"]
    assert document["variants"]["no_vsd"]["levels"] == {
        "fidelity": {"psnr_y": 32.0, "ssim_y": 0.75, "niqe": 6.0}
    }
    assert document["variants"]["no_vsd"]["card"]["cpus_available"] > 0
    assert document["benchmark"] == "ablation" and "rcod.steps=9" in document["budget"]
    shown = capsys.readouterr().out
    assert "no_vsd" in shown and "32.00" in shown and "bicubic" not in shown
    assert json.loads(ablation.measure(config))["variants"] == document["variants"]
    assert len(commands) == 6, "what is finished is not trained again"
    for change in (
        {"settings": ("rcod.steps=10",)},
        {"data": ("other",)},
        {"dataset": Path("other")},
        {"endings": ()},
    ):
        with pytest.raises(DatasetError, match="rcod/made_with.json: expected the variant with"):
            ablation.measure(dataclasses.replace(config, **change))
    (stages / "base" / "step-0000005.pt").write_bytes(b"other weights")
    with pytest.raises(DatasetError, match="rcod/made_with.json: expected the variant with"):
        ablation.measure(config)


@pytest.mark.parametrize("change", ["version", "metrics", "older"])
def test_what_was_scored_otherwise_is_scored_again_and_not_trained(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """One table has figures of one kind; a training costs an hour, a score minutes."""
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(ablation, "_run", scored(commands))
    config = configured(stages, tmp_path, "no_vsd")
    before = json.loads(ablation.measure(config))["variants"]["no_vsd"]
    (config.out / "no_vsd" / "bundle").mkdir()  # as the export does
    path = config.out / "no_vsd" / "variant.json"
    stored = {**json.loads(path.read_text()), "card": {"cpu": "that trained it"}, "levels": {}}
    if change == "older":
        del stored["scored_with"]
    path.write_text(json.dumps(stored))
    if change == "version":
        monkeypatch.setattr(ablation, "SCHEMA_VERSION", ablation.SCHEMA_VERSION + 1)
    if change == "metrics":
        monkeypatch.setattr(ablation.iqa, "load", lambda names: ([], {}))
    commands.clear()
    again = json.loads(ablation.measure(config))["variants"]["no_vsd"]
    assert [c[0] for c in commands] == ["benchmarks.quality"]
    assert again["levels"] == before["levels"]
    assert again["card"] == {"cpu": "that trained it"}
    ablation.measure(config)
    assert len(commands) == 1


def test_a_variant_that_was_stopped_goes_on_only_from_whole_and_the_same_stages(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Sequence[str]] = []
    config = configured(stages, tmp_path, "rcod")
    copied = []

    def stopped(source: Path, target: Path) -> None:
        copied.append(source)
        target.mkdir()
        raise OSError("no space")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(ablation.shutil, "copytree", stopped)
        ablation.measure(config)
    assert copied and not (config.out / "rcod").exists(), "half a copy would be gone on from"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ablation, "_run", interrupted)
        ablation.measure(config)
    monkeypatch.setattr(ablation, "_run", scored(commands))
    with pytest.raises(DatasetError, match="expected the variant with"):
        ablation.measure(dataclasses.replace(config, data=("other",)))
    ablation.measure(config)
    assert commands[0][0] == "rcod_train.main"
    (config.out / "rcod" / "made_with.json").unlink()  # as older ones are
    with pytest.raises(DatasetError, match="found it with what nobody wrote down"):
        ablation.measure(config)


def test_a_command_that_fails_is_named_with_what_it_said(
    stages: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real command: its photos are missing."""
    config = configured(stages, tmp_path, "rcod")
    argv = ["--data", str(tmp_path / "none"), "--stages", str(stages), "--out", str(config.out)]
    assert ablation.main([*argv, "--dataset", "realsr", "--variants", "rcod"]) == 11
    error = capfd.readouterr().err
    assert "CommandFailed: rcod: python -m rcod_train.main nano ended with exit code 9" in error
    assert "expected a folder of photos" in error
    assert issubclass(CommandFailed, Exception)


def test_an_out_that_is_a_file_is_named(
    stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    argv = ["--data", "photos", "--stages", str(stages), "--out", str(tmp_path / "out")]
    assert ablation.main([*argv, "--dataset", "realsr"]) == 6
    assert "out: expected a folder, or a place for a new one" in capsys.readouterr().err


def test_a_folder_that_is_no_finished_run_is_refused(stages: Path, tmp_path: Path) -> None:
    (stages / "base" / "step-0000005.pt").unlink()
    with pytest.raises(DatasetError, match=r"base: expected its last checkpoint, step-0000005\.pt"):
        shared_settings(stages)
    with pytest.raises(DatasetError, match="expected the configuration of a run of rcod-train"):
        shared_settings(tmp_path)
