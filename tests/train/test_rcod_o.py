"""``rcod-train rcod-o`` at a tiny Stable Diffusion geometry, from photos to a checkpoint.

Its export is in tests/export/test_sd_bundle.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from rcod_train.adapter_files import are_adapters, load_adapters
from rcod_train.bases import load_base
from rcod_train.checkpoint import load_merged
from rcod_train.errors import CheckpointError
from rcod_train.main import main
from rcod_train.schedule import alpha_sigma
from tests.tiny_sd import save_base, tiny_unet, tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 24
SETTINGS = [
    f"rcod.steps={STEPS}", "rcod.metric_samples=4", "rcod.accumulate=2", "rcod.warmup_steps=1",
    "rcod.learning_rate=0.002", "rcod.regulariser_learning_rate=0.01", "rcod.ema_decay=0.5",
    "rcod.vsd_weight=0.05", "rcod.checkpoint_steps=8",  # a random base has nothing to teach
    "rcod.validation_steps=12", "validation_share=0.25", "mem.steps=3", "mem.photos_per_batch=1",
    *(f"{stage}.{field}" for stage in ("rcod", "mem") for field in ("crop_px=64", "context_px=64")),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


def arguments(base: Path, photos: Path, out: Path, *extra: str) -> list[str]:
    argv = ["rcod-o", "--base", str(base / "sd"), "--clip", str(base / "clip")]
    argv += ["--data", str(photos), "--out", str(out), "--threads", "1", "--workers", "0"]
    argv += ["--no-lpips", "--device", "cpu", "--precision", "fp32"]
    for setting in SETTINGS:
        argv += ["--set", setting]
    return [*argv, *extra]


@pytest.fixture(scope="module")
def run(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("run")
    assert main(arguments(base, photos, out)) == 0
    return out


def rows(run: Path, stage: str = "rcod") -> list[dict[str, float]]:
    lines = (run / stage / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_no_part_of_a_checkpoint_names_the_folder_that_it_came_from(run: Path, base: Path) -> None:
    configs = list((run / "checkpoint").rglob("*.json"))
    assert len(configs) > 3
    for path in configs:
        assert str(base) not in path.read_text() and "_name_or_path" not in path.read_text()


def test_the_losses_fall(run: Path) -> None:
    log = rows(run)
    assert [row["step"] for row in log] == list(range(STEPS))
    assert {"mse", "vsd", "regulariser_loss", "m", "share_2"} <= log[0].keys()
    assert not {"l1", "latent", "gradient", "adversarial", "discriminator_loss"} & log[0].keys()
    for key, share in (("mse", 0.9), ("regulariser_loss", 0.97)):
        first, last = (np.mean([row[key] for row in part]) for part in (log[:6], log[-6:]))
        assert last < share * first, f"{key}: {first:.4f} -> {last:.4f}"


def test_the_validation_is_of_its_step_and_its_grid_is_a_row_for_each_photo(run: Path) -> None:
    """One photo and 24 steps: whether it rises is chance, that it moves is not."""
    folder = run / "rcod" / "validation"
    assert sorted(p.name for p in folder.iterdir()) == [
        "step-0000012.json", "step-0000012.png", "step-0000024.json", "step-0000024.png",
    ]  # fmt: skip
    early, late = (json.loads((folder / f"step-00000{n}.json").read_text()) for n in (12, 24))
    assert list(late["levels"]) == ["input", "fidelity", "neutral", "realism"]
    assert early["photos"] == late["photos"] == 1
    assert early["levels"]["input"] == late["levels"]["input"]
    for level in ("fidelity", "neutral", "realism"):
        before, after = (seen["levels"][level]["psnr_y_db"] for seen in (early, late))
        assert 1e-3 < abs(after - before) < 3 and after > 10
        assert 0 < late["levels"][level]["ssim_y"] < 1
    with Image.open(folder / "step-0000024.png") as grid:
        assert grid.size == (5 * 64, 64)


def test_the_checkpoint_says_how_it_came_about_and_names_no_path(
    run: Path, base: Path, photos: Path
) -> None:
    parts, info = load_merged(run / "checkpoint")
    assert info.family == "rcod-o" and parts.mem is not None
    assert [level.timestep for level in info.levels] == [250, 500, 750]
    assert [(level.alpha, level.sigma) for level in info.levels] == [
        alpha_sigma(t) for t in (250, 500, 750)
    ]
    metric = json.loads((run / "metric.json").read_text())
    assert (info.m_min, info.m_max) == (metric["m_min"], metric["m_max"])
    assert info.training["rcod"]["accumulate"] == 2 and info.training["photos"] == 3
    text = (run / "checkpoint" / "rcod.json").read_text()
    assert not [path for path in (run, base, photos) if str(path) in text]


def test_peft_reads_the_adapters_and_they_are_what_was_merged(run: Path, base: Path) -> None:
    merged, _ = load_merged(run / "checkpoint")
    full = load_file(run / "adapters" / "full.safetensors")
    assert full.keys() == {
        f"{n}.{s}" for n in ("unet.conv_in", "vpim.align") for s in ("weight", "bias")
    }
    torch.testing.assert_close(merged.vpim.align.weight, full["vpim.align.weight"].half().float())
    unet = UNet2DConditionModel.from_pretrained(base / "sd", subfolder="unet")
    with torch.no_grad():
        unet.conv_in.weight.copy_(full["unet.conv_in.weight"])
        unet.conv_in.bias.copy_(full["unet.conv_in.bias"])
    config = LoraConfig.from_pretrained(run / "adapters" / "unet")
    inject_adapter_in_model(config, unet)
    state = load_file(run / "adapters" / "unet" / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    result = set_peft_model_state_dict(unet, state)
    assert not result.unexpected_keys and any(
        v.abs().max() > 0 for k, v in state.items() if "lora_B" in k
    )
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 24)
    with torch.no_grad():
        expected = merged.unet(*inputs, return_dict=False)[0]
        found = unet(*inputs, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    vae = load_file(run / "adapters" / "vae" / "adapter_model.safetensors")
    assert vae and not [name for name in vae if "decoder" in name]


def test_the_adapters_merged_again_are_the_merged_checkpoint(run: Path, base: Path) -> None:
    merged, info = load_merged(run / "checkpoint")
    models = str(base / "sd"), str(base / "clip")
    parts, again = load_adapters(run / "adapters", *models)
    assert again == info and are_adapters(run / "adapters")
    assert not are_adapters(run / "checkpoint")
    for name in ("vae", "unet", "vpim", "mem"):
        expected, found = (getattr(p, name).state_dict() for p in (merged, parts))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=0, rtol=1e-3, msg=f"{name}.{key}")
        assert not getattr(parts, name).training


def test_a_trained_decoder_is_among_the_adapters(base: Path, photos: Path, tmp_path: Path) -> None:
    extra = (*SHORT, "--set", "rcod.train_decoder=true")
    assert main(arguments(base, photos, tmp_path, *extra)) == 0
    merged, _ = load_merged(tmp_path / "checkpoint")
    models = str(base / "sd"), str(base / "clip")
    parts, _ = load_adapters(tmp_path / "adapters", *models)
    untrained = load_base(*models).vae.decoder.state_dict()
    found = parts.vae.decoder.state_dict()
    for name, value in merged.vae.decoder.state_dict().items():
        assert torch.equal(found[name], value), name
    assert not torch.equal(found["conv_in.weight"], untrained["conv_in.weight"].half().float())


def test_adapters_of_another_base_or_damaged_ones_are_named(
    run: Path, base: Path, tmp_path: Path
) -> None:
    other_base(tmp_path / "same_shape", base)
    words = "does not fit the base model .*trained on other weights than those of"
    with pytest.raises(CheckpointError, match=words):
        load_adapters(run / "adapters", str(tmp_path / "same_shape" / "sd"), str(base / "clip"))
    older = tmp_path / "cut"
    shutil.copytree(run / "adapters", older)
    record = json.loads((older / "rcod.json").read_text())
    del record["training"]["base_sha256"]
    (older / "rcod.json").write_text(json.dumps(record))
    load_adapters(older, str(tmp_path / "same_shape" / "sd"), str(base / "clip"))
    other_base(tmp_path / "wide", base, block_out_channels=(16, 32, 32, 64))
    with pytest.raises(CheckpointError, match=r"cut/unet: does not fit the base model"):
        load_adapters(older, str(tmp_path / "wide" / "sd"), str(base / "clip"))
    (tmp_path / "cut" / "vae" / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: not readable"):
        load_adapters(tmp_path / "cut", str(base / "sd"), str(base / "clip"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoint").rglob("*.safetensors"))
    return {f"{f.parent.name}.{k}": v for f in files for k, v in load_file(f).items()}


def test_a_killed_and_resumed_run_ends_bit_for_bit_equal(
    run: Path, base: Path, photos: Path, tmp_path: Path
) -> None:
    """SIGKILL after the second checkpoint; the metric is not measured again."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rcod_train.main", *arguments(base, photos, tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (tmp_path / "rcod" / "step-0000016.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "checkpoint").exists()
    measured = (tmp_path / "metric.json").stat().st_mtime_ns
    assert main(arguments(base, photos, tmp_path, "--resume")) == 0
    assert (tmp_path / "metric.json").stat().st_mtime_ns == measured
    expected, found = weights(run), weights(tmp_path)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


SHORT = ("--set", "rcod.steps=1", "--set", "mem.steps=1", "--set", "rcod.accumulate=1")


def test_the_published_codes_choices_end_up_in_the_checkpoint(
    base: Path, photos: Path, tmp_path: Path
) -> None:
    published = ("--grouping", "official", "--das", "official", "--constants", "official")
    extra = (*SHORT, *published, "--precision", "bf16")
    assert main(arguments(base, photos, tmp_path / "run", *extra)) == 0
    _, info = load_merged(tmp_path / "run" / "checkpoint")
    _, again = load_adapters(tmp_path / "run/adapters", str(base / "sd"), str(base / "clip"))
    assert again == info, "rounded to bf16 in the training, and the same base"
    assert [level.timestep for level in info.levels] == [249, 499, 749]
    assert {(level.alpha, level.sigma) for level in info.levels} == {(0.7537**0.5, 0.2463**0.5)}
    assert (info.m_min, info.m_max, info.k) == (0.3, 0.9, 250)
    assert not (tmp_path / "run" / "metric.json").exists()


def test_text_embeddings_condition_the_regulariser(
    base: Path, photos: Path, tmp_path: Path
) -> None:
    """Guided by 7.5 the base differs from the regulariser at once, and so VSD is not 0."""
    torch.manual_seed(0)
    file = tmp_path / "text.safetensors"
    save_file({"negative": torch.randn(7, 24), "prompt": torch.randn(7, 24)}, file)
    extra = (*SHORT, "--text", str(file))
    assert main(arguments(base, photos, tmp_path / "run", *extra)) == 0
    assert rows(tmp_path / "run")[0]["vsd"] > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["rcod"]["guidance"] == 7.5


# -- bad input -------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: str) -> None:
    assert main(argv) == code
    error = capsys.readouterr().err
    assert re.search(words, error) and "Traceback" not in error, error


def test_a_folder_without_photos_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    argv = arguments(base, tmp_path / "empty", tmp_path / "out")
    refused(capsys, argv, 9, "DataError: .*empty: expected photos .* found 0 image files")
    assert not (tmp_path / "out").exists()


def test_photos_smaller_than_the_crop_are_named(
    base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(base, photos, tmp_path / "out", "--set", "rcod.context_px=512")
    refused(capsys, argv, 9, "at least 512 px, found 4 image files and none large enough")


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (("--set", "rcod.crop_px=32"), 2, "rcod.crop_px: expected a multiple of 64"),
        (("--set", "rcod.crop_px=128"), 2, r"rcod.crop_px: expected 1 to context_px \(64\), found"),
        (("--set", "mem.crop_px=128"), 2, r"mem.crop_px: expected 1 to context_px \(64\), found"),
        (("--set", "rcod.das=ours"), 2, "das: expected paper or official or uniform, found"),
        (("--set", "validation_share=0.9"), 2, "validation_share: expected a share of 4 photos"),
        (
            ("--grouping", "official", "--set", "rcod.n=2"),
            2,
            "grouping official: expected rcod.n 3 or 4",
        ),
        (("--device", "tpu"), 2, "device 'tpu': expected auto, cpu, cuda"),
        (("--device", "cuda:99"), 2, "device 'cuda:99': PyTorch .* sees"),
        (("--set", "text=a.safetensors"), 2, "'text' is the option --text's, .* expected --text a"),
        (("--text", "none.safetensors"), 9, "DataError: none.safetensors: not readable"),
    ],
)
def test_settings_that_cannot_be_had_are_named(
    base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    extra: tuple[str, ...], code: int, words: str,
) -> None:  # fmt: skip
    refused(capsys, arguments(base, photos, tmp_path / "out", *extra), code, words)


def other_base(folder: Path, base: Path, **changes: object) -> Path:
    """The tiny base with another U-Net."""
    torch.manual_seed(11)
    UNet2DConditionModel(**{**tiny_unet().config, **changes}).save_pretrained(folder / "sd/unet")
    tiny_vae().save_pretrained(folder / "sd" / "vae")
    (folder / "clip").symlink_to(base / "clip")
    return folder


def test_a_base_of_another_kind_is_refused(
    base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inpainting = other_base(tmp_path / "a", base, in_channels=9)
    words = "expected a U-Net of 4 channels in and out, .* found 9 and 4"
    refused(capsys, arguments(inpainting, photos, tmp_path / "out"), 9, words)
    predicts_v = other_base(tmp_path / "b", base)
    (predicts_v / "sd" / "scheduler").mkdir()
    scheduler = {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}
    (predicts_v / "sd/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    words = "prediction_type: expected epsilon, found v_prediction.* Use an eps-prediction base"
    refused(capsys, arguments(predicts_v, photos, tmp_path / "out"), 9, words)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_continued_on_another_base_or_with_other_settings(
    run: Path, base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (run / "rcod").glob("*.pt")}
    same_shape = other_base(tmp_path / "a", base)
    words = "CheckpointError: .*another base model.* or another --out"
    refused(capsys, arguments(same_shape, photos, run, "--resume"), 9, words)
    wider = other_base(tmp_path / "b", base, cross_attention_dim=32)
    words = r"parameter .*: expected .*, found .* belongs to another base model"
    refused(capsys, arguments(wider, photos, run, "--resume"), 9, words)
    argv = arguments(base, photos, run, "--resume", "--set", "rcod.rank_unet=2")
    refused(capsys, argv, 9, "another configuration .*rank_unet: 4 there, 2 here")
    refused(capsys, arguments(base, photos, run), 9, "Add --resume to continue it")
    assert {p: p.stat().st_mtime_ns for p in (run / "rcod").glob("*.pt")} == before
