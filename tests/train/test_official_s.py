"""``rcod-train import-official`` of rcod_s.pkl: a file of the published layout, written by PEFT,
and a reference that computes every branch as the published code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPVisionModel

from rcod_train.checkpoint import load_merged
from rcod_train.main import main
from rcod_train.models.guide import DegradationEstimator, DegradationGuide
from tests.tiny_sd import save_base

RANK_UNET, RANK_VAE = 5, 3
UNET_TARGETS = [
    "to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_out",
    "proj_in", "proj_out", "ff.net.2", "ff.net.0.proj",
]  # fmt: skip
VAE_TARGETS = (
    r"^encoder\..*(conv1|conv2|conv_in|conv_shortcut|conv|conv_out|to_k|to_q|to_v|to_out\.0)$"
)


def to_fp16_values(module: nn.Module) -> nn.Module:
    """Weights that fp16 storage keeps exactly."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_s")
    save_base(folder)
    for kind, path in (
        (AutoencoderKL, folder / "sd" / "vae"),
        (UNet2DConditionModel, folder / "sd" / "unet"),
        (CLIPVisionModel, folder / "clip"),
    ):
        to_fp16_values(kind.from_pretrained(path)).save_pretrained(path)
    return folder


def mixed_forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """A LoRA layer with the sample's matrix between its factors."""
    (name,) = layer.lora_A.keys()
    low = layer.lora_A[name](x)
    formula = "bkhw,bkr->brhw" if low.ndim == 4 else "blk,bkr->blr"
    low = torch.einsum(formula, low, layer.matrix)
    return layer.base_layer(x) + layer.scaling[name] * layer.lora_B[name](low)


def unet_block(name: str) -> int:
    stage, _, rest = name.partition(".")
    first = {"down_blocks": 0, "up_blocks": 5}
    return first[stage] + int(rest[0]) if stage in first else 4 if stage == "mid_block" else 9


def vae_block(name: str) -> int:
    _, stage, rest = name.split(".", 2) if name.count(".") > 1 else (*name.split("."), "")
    return int(rest[0]) if stage == "down_blocks" else 4 if stage == "mid_block" else 5


def published_matrices(file: dict[str, Any], scores: Tensor, network: str, rank: int) -> Tensor:
    """What the published guide makes of the scores (B, 2), from the tensors of its file."""

    def layer(kind: str, inner: str, x: Tensor) -> Tensor:
        state = file[f"state_dict_{network}_{kind}_mlp"]
        return nn.functional.linear(x, state[f"{inner}weight"], state[f"{inner}bias"])

    phase = scores[..., None] * file["w"][None, None] * 2 * torch.pi
    waves = torch.cat([phase.sin(), phase.cos()], -1)
    degradation = layer("de", "0.", torch.cat([waves[:, 0], waves[:, 1]], -1)).relu()
    embeddings = file["state_embeddings"][f"state_dict_{network}_block"]["weight"]
    blocks = layer("block", "0.", embeddings).relu()
    both = [torch.cat([degradation, row.expand(len(scores), -1)], -1) for row in blocks]
    return torch.stack([layer("fuse", "", x).reshape(-1, rank, rank) for x in both], 1)


class PublishedS:
    """The networks of the published inference and the files that hold them."""

    def __init__(self, base: Path) -> None:
        torch.manual_seed(21)
        self.unet = UNet2DConditionModel.from_pretrained(base / "sd", subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(base / "sd", subfolder="vae")
        self.encoder = CLIPVisionModel.from_pretrained(base / "clip")
        self.unet.add_adapter(lora(RANK_UNET, UNET_TARGETS))
        self.vae.add_adapter(lora(RANK_VAE, VAE_TARGETS), adapter_name="vae_skip")
        with torch.no_grad():
            for network in (self.unet, self.vae):
                for name, parameter in network.named_parameters():
                    if "lora" in name or name.startswith("conv_in"):
                        parameter.add_(0.1 * torch.randn_like(parameter))
        self.align, self.mem = nn.Linear(20, 24), nn.Sequential(nn.Linear(256, 1), nn.ReLU())
        # Holds tensors of the published shapes; what is computed of them is written out above.
        self.guide = DegradationGuide(RANK_VAE, RANK_UNET, 6, 10, 8.0, 64, 256, 64)
        self.estimator = DegradationEstimator()
        for module in (self.unet, self.vae, self.align, self.mem, self.guide, self.estimator):
            to_fp16_values(module).eval().requires_grad_(False)

    def file(self) -> dict[str, Any]:
        guide = self.guide
        return {
            "unet_lora_target_modules": UNET_TARGETS,
            "vae_lora_target_modules": VAE_TARGETS,
            "rank_unet": RANK_UNET,
            "rank_vae": RANK_VAE,
            "state_dict_unet": {
                k: v for k, v in self.unet.state_dict().items() if "lora" in k or "conv_in" in k
            },
            "state_dict_vae": {k: v for k, v in self.vae.state_dict().items() if "lora" in k},
            "state_dict_vae_de_mlp": guide.vae.degradation.state_dict(),
            "state_dict_unet_de_mlp": guide.unet.degradation.state_dict(),
            "state_dict_vae_block_mlp": guide.vae.block.state_dict(),
            "state_dict_unet_block_mlp": guide.unet.block.state_dict(),
            "state_dict_vae_fuse_mlp": guide.vae.fuse.state_dict(),
            "state_dict_unet_fuse_mlp": guide.unet.fuse.state_dict(),
            "state_dict_clip_proj": self.align.state_dict(),
            "w": nn.Parameter(guide.frequencies.clone(), requires_grad=False),
            "state_embeddings": {
                "state_dict_vae_block": guide.vae.embeddings.state_dict(),
                "state_dict_unet_block": guide.unet.embeddings.state_dict(),
            },
        }

    @contextmanager
    def mixed(self, scores: Tensor) -> Iterator[None]:
        vae = published_matrices(self.file(), scores, "vae", RANK_VAE)
        unet = published_matrices(self.file(), scores, "unet", RANK_UNET)
        layers = [
            (layer, matrices[:, block(name)])
            for network, matrices, block in (
                (self.vae, vae, vae_block),
                (self.unet, unet, unet_block),
            )
            for name, layer in network.named_modules()
            if isinstance(layer, LoraLayer)
        ]
        for layer, matrix in layers:
            layer.matrix, layer.forward = matrix, MethodType(mixed_forward, layer)
        yield
        for layer, _ in layers:
            del layer.matrix, layer.forward


def lora(rank: int, targets: list[str] | str) -> LoraConfig:
    return LoraConfig(r=rank, init_lora_weights="gaussian", target_modules=targets)


@pytest.fixture(scope="module")
def published(base: Path) -> PublishedS:
    return PublishedS(base)


@pytest.fixture
def files(published: PublishedS, tmp_path: Path) -> dict[str, Any]:
    """What the three published files hold; a test damages one, ``run`` writes them."""
    raw = published.file()
    return {
        "rcod_s.pkl": {k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()},
        "de_net.pth": dict(published.estimator.state_dict()),
        "rcod_s_mem.pkl": {"state_dict_clip_proj": dict(published.mem.state_dict())},
    }


def run(files: dict[str, Any], base: Path, folder: Path, *without: str) -> int:
    for name, content in files.items():
        torch.save(content, folder / name)
    options = {
        "--base": base / "sd",
        "--clip": base / "clip",
        "--estimator": folder / "de_net.pth",
        "--mem": folder / "rcod_s_mem.pkl",
        "--out": folder / "out",
    }
    given = [str(x) for pair in options.items() if pair[0] not in without for x in pair]
    return main(["import-official", str(folder / "rcod_s.pkl"), *given])


@torch.no_grad()
def test_the_imported_model_computes_what_the_published_one_does(
    files: dict[str, Any], published: PublishedS, base: Path, tmp_path: Path
) -> None:
    assert run(files, base, tmp_path) == 0
    parts, info = load_merged(tmp_path / "out")
    assert (info.family, info.name) == ("rcod-s", "rcod-s")
    assert [(x.name, x.timestep) for x in info.levels] == [
        ("fidelity", 249), ("neutral", 499), ("realism", 749),
    ]  # fmt: skip
    assert all(x.alpha**2 == pytest.approx(0.6754) for x in info.levels)
    assert all(x.alpha**2 + x.sigma**2 == pytest.approx(1.0) for x in info.levels)
    assert (info.m_min, info.m_max, info.k) == (0.3, 0.9, 250)

    torch.manual_seed(0)
    lq, image = torch.rand(2, 3, 16, 24), torch.rand(2, 3, 64, 128) * 2 - 1
    lq[1] *= 0.2
    z, t, thumbnail = torch.randn(2, 4, 8, 16), torch.tensor([249, 749]), torch.randn(2, 3, 28, 28)
    tokens = published.align(published.encoder(thumbnail).last_hidden_state)
    scores, pooled = published.estimator(lq)
    with published.mixed(scores):
        eps = published.unet(z, t, encoder_hidden_states=tokens).sample
        mean = published.vae.encode(image).latent_dist.mean
    base_eps = published.unet(z, t, encoder_hidden_states=tokens).sample
    assert (eps - base_eps).abs().max() > 1e-3  # the matrices count

    features, vae, unet = parts.guide(lq)
    torch.testing.assert_close(parts.vpim(thumbnail), tokens, atol=1e-5, rtol=1e-5)
    with parts.guide.matrices.filled(vae=vae, unet=unet):
        found = parts.unet(z, t, encoder_hidden_states=tokens).sample
        z_lq = parts.vae.encode(image)
    torch.testing.assert_close(found, eps, atol=1e-5, rtol=1e-5)
    expected = mean * published.vae.config.scaling_factor
    torch.testing.assert_close(z_lq, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.mem(features), published.mem(pooled)[:, 0])


def test_without_a_mem_there_is_no_adaptive_level(
    files: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    assert run(files, base, tmp_path, "--mem") == 0
    parts, _ = load_merged(tmp_path / "out")
    assert parts.mem is None and parts.guide is not None


@pytest.mark.parametrize("option", ["--estimator", "--clip"])
def test_a_missing_option_is_named(
    files: dict[str, Any],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    assert run(files, base, tmp_path, option) == 2
    words = f"layout of rcod_s.pkl, which needs {option}: "
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def damage(files: dict[str, Any], how: str) -> None:
    raw = files["rcod_s.pkl"]
    unet = raw["state_dict_unet"]
    key = "mid_block.resnets.0.conv1.lora_A.default.weight"
    if how == "field":
        del raw["w"]
    elif how == "nested":
        raw["state_embeddings"] = {"state_dict_vae_block": {}}
    elif how == "keys":
        unet["extra"] = unet.pop(key)
    elif how == "rank":
        raw["rank_unet"] = 10**6
    elif how == "rank type":
        raw["rank_vae"] = "16"
    elif how == "factor":
        unet[key] = torch.zeros(RANK_UNET, 7, 3, 3)
    elif how == "conv_in":
        unet["conv_in.bias"] = torch.zeros(3)
    elif how == "fuse":
        raw["state_dict_vae_fuse_mlp"] = {"weight": torch.zeros(4, 320), "bias": torch.zeros(4)}
    elif how == "embeddings":
        state = {"weight": torch.zeros(7, 64)}
        raw["state_embeddings"] = {**raw["state_embeddings"], "state_dict_unet_block": state}
    elif how == "w":
        raw["w"] = torch.zeros(3)
    elif how == "w type":
        raw["w"] = {}
    elif how == "targets":
        raw["unet_lora_target_modules"] = 3
    elif how == "align":
        raw["state_dict_clip_proj"] = {"weight": torch.zeros(24, 20)}
    elif how == "estimator keys":
        del files["de_net.pth"]["body.1.8.conv2.bias"]
    elif how == "estimator shape":
        files["de_net.pth"]["conv_first.0.weight"] = torch.zeros(64, 1, 3, 3)
    elif how == "estimator type":
        files["de_net.pth"] = {"a": 1}
    elif how == "mem shape":
        files["rcod_s_mem.pkl"]["state_dict_clip_proj"]["0.weight"] = torch.zeros(1, 1024)
    elif how == "mem field":
        files["rcod_s_mem.pkl"] = {"net": 1}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("field", r"rcod_s.pkl: missing fields \['w'\], unexpected fields \[\]"),
        ("nested", r"missing fields \['state_embeddings.state_dict_unet_block'\]"),
        ("keys", r'"state_dict_unet": 1 keys missing \[.mid_block.*1 unexpected \[.extra.\]'),
        ("rank", 'expected "rank_unet" 1000000, found matrices of rank 5 and 5'),
        ("rank type", '"rank_vae": expected a positive integer, found str'),
        ("factor", r"mid_block.resnets.0.conv1: expected a factor \(5, 32, 3, 3\).*SD-Turbo"),
        ("conv_in", r"conv_in.bias: expected \(16,\) as in the base model, found \(3,\)"),
        ("fuse", r'"state_dict_vae_fuse_mlp": weight: expected \(9, 320\), found \(4, 320\)'),
        ("embeddings", r'state_dict_unet_block": weight: expected \(10, 64\), found \(7, 64\)'),
        ("w", r'"w": expected \(64,\), found \(3,\)'),
        ("w type", '"w": expected a tensor, found dict'),
        ("targets", '"unet_lora_target_modules": expected a pattern or a list of names, found int'),
        ("align", r'"state_dict_clip_proj": 1 keys missing \[.bias.\]'),
        ("estimator keys", r"de_net.pth: 1 keys missing \[.body.1.8.conv2.bias.\]"),
        ("estimator shape", r"de_net.pth: conv_first.0.weight: expected \(64, 3, 3, 3\)"),
        ("estimator type", "de_net.pth: expected a dict of tensors.*degradation estimator"),
        ("mem shape", r'mem.pkl: "state_dict_clip_proj": 0.weight: expected \(1, 256\)'),
        ("mem field", 'mem.pkl: "state_dict_clip_proj": expected a dict of tensors'),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_nothing_is_written(
    files: dict[str, Any],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    words: str,
) -> None:
    damage(files, how)
    assert run(files, base, tmp_path) == 9
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
