"""``rcod-train stats``: M over photos and pairs, its coefficients and its figure."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata

from rcod_train.checkpoint import save_merged
from rcod_train.data import to_unit
from rcod_train.degradation import upsample_lq
from rcod_train.errors import ConfigError, TrainError
from rcod_train.main import main
from rcod_train.stats import StatsConfig, distances, measure, summary
from tests.tiny import tiny_info, tiny_parts
from tests.tiny_sd import save_base, tiny_guided_parts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    save_merged(folder, tiny_parts(), tiny_info())
    return folder


@pytest.fixture(scope="module")
def pairs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LR of each is blurrier than that of the one before. 132 px are no multiple of 8."""
    folder = tmp_path_factory.mktemp("pairs")
    for part in ("LR", "HR"):
        (folder / part).mkdir()
    for i, path in enumerate(sorted(photos.iterdir())):
        hq = Image.open(path).crop((0, 0, 132, 128))
        hq.save(folder / "HR" / path.name)
        small = hq.resize((132 // (4 + 4 * i), 128 // (4 + 4 * i)), Image.Resampling.BOX)
        small.resize((33, 32), Image.Resampling.BICUBIC).save(folder / "LR" / path.name)
    return folder


def test_distances_by_hand() -> None:
    z_lq, z_hq = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 2.0]]]])
    expected = {"cosine": 5**-0.5, "l1": 1.0, "mse": 2.0, "mean_z_lq": 0.5, "mean_z_hq": 1.5}
    assert distances(z_lq, z_hq) == pytest.approx(expected)


def test_coefficients_are_the_correlation_of_ranks() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"cosine": c, "l1": a, "mse": b, "ssim_y": s} for c, a, b, s in rng.random((20, 4)).tolist()
    ]
    found = summary(rows)["spearman_with_ssim"]
    ssim = rankdata([row["ssim_y"] for row in rows])
    for name in ("cosine", "l1", "mse"):
        ranks = rankdata([row[name] for row in rows])
        assert found[name] == pytest.approx(abs(np.corrcoef(ranks, ssim)[0, 1]))
    m = sorted(row["cosine"] for row in rows)
    assert summary(rows)["m"]["min"] == m[0] < summary(rows)["m"]["m_min"] < m[1]


def test_pairs_are_measured_whole_and_m_falls_with_the_blur(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["stats", "--model", str(model), "--pairs", str(pairs), "--out", str(tmp_path)]
    assert main([*argv, "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "stats.json").read_text())
    assert document["schema_version"] == 1 and document["count"] == 4
    assert "4 images: M" in printed
    assert f"cosine                 {document['spearman_with_ssim']['cosine']:.3f}  0.78" in printed
    rows = document["images"]
    assert [row["name"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert rows[0]["ssim_y"] > rows[1]["ssim_y"] > rows[3]["ssim_y"]
    parts = tiny_parts()
    for module in (parts.vae,):
        for p in module.parameters():
            p.data = p.data.half().float()
    hq = np.asarray(Image.open(pairs / "HR" / "2.png"))
    lq = upsample_lq(np.asarray(Image.open(pairs / "LR" / "2.png")), (128, 132))
    z_lq, z_hq = (
        parts.vae.encode(to_unit(torch.from_numpy(x[:, :128].copy()).permute(2, 0, 1)[None]))
        for x in (lq, hq)
    )
    expected = torch.cosine_similarity(z_lq.flatten(), z_hq.flatten(), dim=0).item()
    assert rows[2]["cosine"] == pytest.approx(expected, abs=1e-5)
    with Image.open(tmp_path / "stats.png") as figure:
        assert figure.size[0] > 1000 and len(figure.convert("RGB").getcolors(1 << 20)) > 20


def test_photos_are_degraded_and_a_base_model_serves_too(photos: Path, tmp_path: Path) -> None:
    save_base(tmp_path)
    config = StatsConfig(str(tmp_path / "sd"), str(tmp_path / "out"), (str(photos),), count=5,
                         crop_px=64, precision="fp32")  # fmt: skip
    document = measure(config)
    assert document["count"] == 5 and document["images"] == measure(config)["images"]
    assert str(tmp_path / "out") not in json.dumps(document)


def test_of_a_base_model_its_autoencoder_is_enough(photos: Path, tmp_path: Path) -> None:
    save_base(tmp_path)
    shutil.rmtree(tmp_path / "sd" / "unet")
    config = StatsConfig(str(tmp_path / "sd"), str(tmp_path / "out"), (str(photos),), count=3,
                         crop_px=64, precision="fp32")  # fmt: skip
    assert measure(config)["count"] == 3


def test_m_of_an_rcod_s_is_that_of_its_base(photos: Path, tmp_path: Path) -> None:
    """Its branches need a guide, and what they learn must not move M."""
    parts = tiny_guided_parts()
    save_merged(tmp_path / "model", parts, tiny_info(family="rcod-s"))
    config = StatsConfig(str(tmp_path / "model"), str(tmp_path / "out"), (str(photos),), count=3,
                         crop_px=64, precision="fp32")  # fmt: skip
    found = measure(config)["images"]
    for name, parameter in parts.vae.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    save_merged(tmp_path / "model", parts, tiny_info(family="rcod-s"))
    assert measure(config)["images"] == found


def test_too_little_or_too_much_to_measure_is_named(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StatsConfig(str(model), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="either --data .* or --pairs"):
        measure(config)
    with pytest.raises(ConfigError, match="at least 3 images, found 2"):
        measure(StatsConfig(str(model), config.out, (str(photos),), count=2, crop_px=64))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TrainError, match=r'pip install "rcod\[plot\]"'):
        measure(StatsConfig(str(model), config.out, (str(photos),), count=3, crop_px=64))
    assert not (tmp_path / "out").exists()
