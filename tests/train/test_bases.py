"""Base models from folders: what is not whole, or not what it is given for, is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from rcod_train.bases import SD_TURBO, load_backbone, load_base
from rcod_train.errors import DataError
from tests.tiny_sd import save_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_base(tmp_path)
    return tmp_path


def cut(path: Path) -> str:
    """Take one weight out of a file; returns its name."""
    state = load_file(path)
    name = max(name for name in state if "attn" in name or "conv1" in name)
    del state[name]
    save_file(state, path, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_base_that_lacks_a_weight_is_refused(base: Path, part: str) -> None:
    """diffusers would draw it at random and warn."""
    name = cut(base / "sd" / part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(DataError, match=f"sd/{part}: expected all weights .* such as {name}"):
        load_base(str(base / "sd"), str(base / "clip"))


def test_a_clip_or_backbone_that_lacks_a_weight_is_refused(base: Path) -> None:
    name = cut(base / "clip" / "model.safetensors").removeprefix("vision_model.")
    words = f"clip: expected all weights of a CLIPVisionModel, found none for 1, such as .*{name}"
    with pytest.raises(DataError, match=words):
        load_base(str(base / "sd"), str(base / "clip"))
    with pytest.raises(DataError, match=words):
        load_backbone(str(base / "clip"))


def test_another_vision_model_is_no_clip(base: Path) -> None:
    config = Dinov2Config(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    Dinov2Model(config).save_pretrained(base / "dino")
    words = 'dino: "model_type": expected clip or clip_vision_model, found dinov2'
    with pytest.raises(DataError, match=words):
        load_base(str(base / "sd"), str(base / "dino"))
    backbone, *_ = load_backbone(str(base / "dino"))
    assert isinstance(backbone, Dinov2Model)


def test_a_backbone_may_be_without_what_nobody_looks_at(base: Path) -> None:
    """Vision transformers are published without their pooler, which AutoModel would draw anew."""
    config = ViTConfig(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    ViTModel(config, add_pooling_layer=False).save_pretrained(base / "vit")
    weights = [load_backbone(str(base / "vit"))[0].state_dict() for _ in range(2)]
    assert weights[0].keys() == weights[1].keys() and not any("pooler" in k for k in weights[0])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_was_trained_here_is_no_base(base: Path) -> None:
    (base / "sd" / "rcod.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(DataError, match=f"found rcod.json: .* in one step, .* such as {SD_TURBO}"):
        load_base(str(base / "sd"), str(base / "clip"), torch.float32, SD_TURBO)
