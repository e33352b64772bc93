"""``rcod-train nano`` from photos to a merged checkpoint, at the real network and few steps."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rcod_train.nano
import rcod_train.run
from rcod_train.checkpoint import DISCRIMINATOR, load_merged
from rcod_train.config import TrainConfig
from rcod_train.main import main
from rcod_train.models.vae import NanoVae
from rcod_train.nano import NEW, TAKEN_OVER, with_levels_of_start
from rcod_train.network import NANO_SKIP_CHANNELS, Parts
from rcod_train.run import Run
from rcod_train.schedule import OFFICIAL_ALPHA_BAR, alpha_sigma

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = [
    "vae.steps=3", "base.steps=3", "regression.steps=3", "rcod.steps=4", "refine.steps=4",
    "mem.steps=3", "rcod.metric_samples=4", "refine.metric_samples=4",
    *(f"{stage}.{field}" for stage in ("vae", "base", "regression", "rcod", "refine", "mem")
      for field in ("crop_px=64", "context_px=96", "photos_per_batch=1", "crops_per_photo=2",
                    "checkpoint_steps=2", "warmup_steps=2")),
]  # fmt: skip


# Behind these begins a run that goes on from a checkpoint.
OF_EVERY_RUN = ("refine.", "mem.", "validation")


def arguments(photos: Path, out: Path, *extra: str) -> list[str]:
    argv = ["nano", "--data", str(photos), "--out", str(out), "--threads", "1", "--workers", "0"]
    argv += ["--source", "drawn by the test"]
    for setting in SETTINGS:
        if "--from" not in extra or setting.startswith(OF_EVERY_RUN):
            argv += ["--set", setting]
    return [*argv, *extra]


def command(photos: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "rcod_train.main", *arguments(photos, out, *extra)]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(photos, out)) == 0
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoint").glob("*/*.safetensors"))
    assert len(files) == 4
    return {f"{f.parent.name}.{k}": v for f in files for k, v in load_file(f).items()}


def test_the_checkpoint_is_whole_and_says_how_it_came_about(whole: Path) -> None:
    parts, info = load_merged(whole / "checkpoint")
    assert parts.mem is not None and parts.vae.config.scaling_factor > 0
    assert [level.timestep for level in info.levels] == [250, 500, 750]
    assert -1 <= info.m_min < info.m_max <= 1 and info.k == 250
    assert info.sources == ("drawn by the test",)
    assert info.training["rcod"]["steps"] == 4 and info.training["photos"] == 4
    assert str(whole) not in (whole / "checkpoint" / "rcod.json").read_text()


def test_every_stage_logs_its_losses(whole: Path) -> None:
    for stage, keys in {
        "vae": {"vae_loss", "psnr_db"},
        "base": {"base_loss"},
        "regression": {"generator_loss", "l1", "latent", "share_0", "m"},
        "rcod": {
            "generator_loss",
            "regulariser_loss",
            "l1",
            "vsd",
            "latent",
            "share_0",
            "m",
            "adversarial",
            "feature",
        },
        "refine": {"generator_loss", "l1", "share_0", "adversarial", "feature"},
        "mem": {"mem_loss", "mean_abs_error"},
    }.items():
        rows = [
            json.loads(row) for row in (whole / stage / "losses.jsonl").read_text().splitlines()
        ]
        assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) >= 3
        assert keys <= rows[-1].keys()
        assert "lpips" not in rows[-1]


def test_a_killed_and_resumed_run_ends_bit_for_bit_equal(
    whole: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SIGKILL in the RCOD stage after its first checkpoint: nothing of the process is saved."""
    process = subprocess.Popen(
        command(photos, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "rcod" / "step-0000002.pt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "checkpoint").exists()
    with caplog.at_level(logging.INFO):
        assert main(arguments(photos, tmp_path, "--resume")) == 0
    assert "stage rcod: resumed at step" in caplog.text
    assert capsys.readouterr().out.strip() == str(tmp_path / "checkpoint")
    expected, found = weights(whole), weights(tmp_path)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_stage_that_others_were_built_on_is_not_trained_on(
    photos: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new encoder would ship with the decoder, U-Net, VPIM and MEM that were made for the old."""
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("step-*.pt")}
    assert main(arguments(photos, whole, "--resume", "--set", "vae.steps=40")) == 9
    error = capsys.readouterr().err
    built = " ".join(str(whole / name) for name in ("base", "regression", "rcod", "refine", "mem"))
    assert "stage vae would be trained on from step 3 to 40" in error
    assert f"delete {built} to train them again, or use another --out" in error
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("step-*.pt")} == before


def test_a_run_takes_over_the_discriminator_of_the_checkpoint(
    photos: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With no learning rate to speak of it comes out as it went in, without a weight untouched;
    without its file, new."""
    caplog.set_level(logging.INFO)
    start = tmp_path / "start"
    shutil.copytree(whole / "checkpoint", start)
    still = ("--set", "refine.discriminator_learning_rate=1e-9", "--from", str(start))
    assert main(arguments(photos, tmp_path / "taken", *still)) == 0
    assert TAKEN_OVER in caplog.text and NEW not in caplog.text
    unasked = ("--set", "refine.adversarial_weight=0", "--from", str(start))
    assert main(arguments(photos, tmp_path / "unasked", *unasked)) == 0
    (start / DISCRIMINATOR).unlink()
    assert main(arguments(photos, tmp_path / "new", *still)) == 0
    assert NEW in caplog.text
    old, taken, unasked_for, new = (
        load_file(folder / DISCRIMINATOR)
        for folder in (
            whole / "checkpoint",
            *(tmp_path / n / "checkpoint" for n in ("taken", "unasked", "new")),
        )
    )
    trained = [name for name in old if name.endswith((".original", ".bias"))]
    assert len(trained) == 2 * 2 * 5  # weight and bias of two scales' convolutions
    for name in trained:
        torch.testing.assert_close(taken[name], old[name], rtol=0, atol=1e-6)
    assert all(torch.equal(unasked_for[name], old[name]) for name in old)
    assert any((new[name] - old[name]).abs().max() > 1e-3 for name in trained)
    taken_in = json.loads((tmp_path / "taken" / "checkpoint" / "vae" / "config.json").read_text())
    assert "_name_or_path" not in taken_in  # a path of the machine alone


def test_without_steps_of_refine_what_ships_is_of_rcod(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    for stage in ("vae", "base", "regression", "rcod"):
        shutil.copytree(whole / stage, tmp_path / stage)
    assert main(arguments(photos, tmp_path, "--resume", "--set", "refine.steps=0")) == 0
    _, info = load_merged(tmp_path / "checkpoint")
    assert "refine" not in info.training and not (tmp_path / "refine").exists()
    rcod, refined = weights(tmp_path), weights(whole)
    changed = {name.split(".")[0] for name in rcod if not torch.equal(rcod[name], refined[name])}
    assert changed == {"unet", "vae", "vpim", "mem"}
    first = {
        stage: json.loads((whole / stage / "losses.jsonl").read_text().splitlines()[0])
        for stage in ("rcod", "refine")
    }
    assert first["rcod"]["l1"] != first["refine"]["l1"], "not the same photos once more"


def test_a_run_goes_on_from_a_merged_checkpoint(photos: Path, whole: Path, tmp_path: Path) -> None:
    start = ("--from", str(whole / "checkpoint"), "--set", "refine.learning_rate=1e-9",
             "--set", "refine.decoder_learning_rate=1e-9", "--name", "mine",
             "--source", "photos of my own")  # fmt: skip
    assert main(arguments(photos, tmp_path, *start)) == 0
    assert sorted(p.parent.name for p in tmp_path.glob("*/losses.jsonl")) == ["mem", "refine"]
    _, before = load_merged(whole / "checkpoint")
    _, info = load_merged(tmp_path / "checkpoint")
    assert info.name == "mine" and info.levels == before.levels
    assert info.training["from"] == {"name": "nano", "training": before.training}
    assert before.sources == ("drawn by the test",)
    assert info.sources == ("drawn by the test", "photos of my own")
    assert info.training["refine"]["vsd_weight"] == 0 and "rcod" not in info.training
    assert str(tmp_path) not in (tmp_path / "checkpoint" / "rcod.json").read_text()
    # With no learning rate to speak of what ships is what it started from; the MEM is trained.
    old, new = weights(whole), weights(tmp_path)
    assert old.keys() == new.keys()
    for name, weight in old.items():
        if name.startswith("mem."):
            assert not torch.equal(weight, new[name])
        else:
            assert torch.allclose(weight, new[name], rtol=1e-2, atol=1e-4), name


def test_a_checkpoint_without_a_skip_gets_one(
    photos: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(whole / "checkpoint", start)
    vae = NanoVae.from_pretrained(start / "vae")
    geometry = {k: v for k, v in vae.config.items() if k[0] != "_"} | {"skip_channels": 0}
    before = NanoVae(**geometry)
    before.load_state_dict(vae.state_dict(), strict=False)
    before.save_pretrained(start / "vae")
    with caplog.at_level(logging.INFO, "rcod_train"):
        assert main(arguments(photos, out, "--from", str(start))) == 0
    assert "no skip past the denoiser in it" in caplog.text
    parts, _ = load_merged(out / "checkpoint")
    assert parts.vae.config.skip_channels == NANO_SKIP_CHANNELS
    assert parts.vae.skip.enter.weight.abs().max() > 0  # trained


def test_a_decoder_alone_is_trained_and_latents_and_their_mem_stay(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    start = ("--from", str(whole / "checkpoint"), "--set", "refine.train_adapters=false",
             "--set", "refine.mild_share=0.5")  # fmt: skip
    assert main(arguments(photos, tmp_path, *start)) == 0
    assert [p.parent.name for p in tmp_path.glob("*/losses.jsonl")] == ["refine"]
    old, new = weights(whole), weights(tmp_path)
    changed = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and changed == {"decoder", "skip"}
    _, before = load_merged(whole / "checkpoint")
    _, info = load_merged(tmp_path / "checkpoint")
    assert (info.m_min, info.m_max) == (before.m_min, before.m_max)  # what its MEM estimates
    assert "mem" not in info.training and info.training["from"]["training"] == before.training


@pytest.mark.parametrize(
    ("setting", "family", "said"),
    [
        ("refine.vsd_weight=1", "nano", "refine.vsd_weight: expected 0, found 1.0"),
        ("rcod.steps=9", "nano", "with --from the stages refine and mem alone run"),
        ("refine.vsd_weight=0", "rcod-o", '"_class_name": expected one of SdVae'),
        ("refine.vsd_weight=0", None, "not found. Expected a merged checkpoint"),
        ("refine.vsd_weight=0", "broken", "discriminator.safetensors: could not be loaded"),
    ],
)
def test_what_a_run_cannot_go_on_from_is_named_before_anything_is_written(
    photos: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    family: str | None,
    said: str,
) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    if family is not None:
        shutil.copytree(whole / "checkpoint", start)
    if family == "broken":
        (start / DISCRIMINATOR).write_bytes(b"broken")
    elif family is not None:
        record = json.loads((start / "rcod.json").read_text())
        (start / "rcod.json").write_text(json.dumps(record | {"family": family}))
    assert main(arguments(photos, out, "--from", str(start), "--set", setting)) in (2, 9)
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not out.exists()


def test_the_networks_are_on_the_device_of_the_batches(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LookedAt(Exception):
        pass

    def look(run: Run, parts: Parts, config: TrainConfig) -> None:
        modules = (parts.vae, parts.unet, parts.vpim, parts.mem)
        assert {p.device.type for m in modules for p in m.parameters()} == {"meta"}
        raise LookedAt

    monkeypatch.setattr(rcod_train.run, "resolve_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr(rcod_train.nano, "train_base", look)
    with pytest.raises(LookedAt):
        main(arguments(photos, tmp_path, "--device", "cuda"))


def test_sigterm_saves_and_exits_with_130(photos: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(photos, tmp_path, "--set", "vae.steps=100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "vae" / "losses.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "state saved" in error and "Traceback" not in error
    assert len(list((tmp_path / "vae").glob("step-*.pt"))) >= 1


def test_a_run_from_a_checkpoint_has_its_levels_and_its_constants(
    whole: Path, tmp_path: Path
) -> None:
    start = Path(shutil.copytree(whole / "checkpoint", tmp_path / "start"))
    record = json.loads((start / "rcod.json").read_text())
    config = TrainConfig(data=("photos",), out="out", start=str(start))
    refine = with_levels_of_start(config).refine
    assert (refine.n, refine.k, refine.constants) == (3, 250, "paper")
    record["k"] = 265
    for level, t in zip(record["levels"][:2], (265, 530), strict=False):
        level["timestep"] = t
        level["alpha"], level["sigma"] = alpha_sigma(t, OFFICIAL_ALPHA_BAR)
    record["levels"] = record["levels"][:2]
    (start / "rcod.json").write_text(json.dumps(record))
    refine = with_levels_of_start(config).refine
    assert (refine.n, refine.k, refine.constants) == (2, 265, "official")
