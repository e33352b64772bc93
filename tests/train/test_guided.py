"""Degradation-guided branches against the formula written out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rcod_train.checkpoint import load_merged, save_merged
from rcod_train.errors import CheckpointError
from rcod_train.models.guide import DegradationEstimator, Guide, GuidedMem
from rcod_train.models.guided import (
    BlockMatrices,
    Branch,
    GuidedConv2d,
    GuidedLinear,
    unet_branches,
    vae_branches,
)
from rcod_train.network import Parts
from rcod_train.official import official_info
from rcod_train.official.layouts import RCOD_S
from tests.tiny_sd import tiny_guide, tiny_guided_parts, tiny_unet, tiny_vae

RANK, BLOCKS = 3, 4


def random_branch(layer: GuidedLinear | GuidedConv2d) -> None:
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor.weight)


def dense(layer: GuidedLinear | GuidedConv2d, matrix: Tensor) -> Tensor:
    """W + B M^T A for the matrix of one sample, as one plain weight."""
    a, b = layer.lora_A.weight.flatten(1), layer.lora_B.weight.flatten(1)
    return layer.weight + (b @ matrix.T @ a).view_as(layer.weight)


@torch.no_grad()
def test_a_guided_linear_layer_is_a_weight_of_its_own_for_every_sample() -> None:
    torch.manual_seed(0)
    matrices = BlockMatrices()
    layer = GuidedLinear(nn.Linear(7, 6), RANK, Branch(matrices, "unet", 2))
    random_branch(layer)
    x, m = torch.randn(3, 5, 7), torch.randn(3, BLOCKS, RANK, RANK)
    expected = [F.linear(x[i], dense(layer, m[i, 2]), layer.bias) for i in range(3)]
    with matrices.filled(unet=m):
        torch.testing.assert_close(layer(x), torch.stack(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0)]
)
def test_a_guided_convolution_is_a_kernel_of_its_own_for_every_sample(
    kernel: int, stride: int, padding: int
) -> None:
    torch.manual_seed(1)
    matrices = BlockMatrices()
    base = nn.Conv2d(4, 6, kernel, stride, padding)
    layer = GuidedConv2d(base, RANK, Branch(matrices, "vae", 1))
    random_branch(layer)
    x, m = torch.randn(3, 4, 9, 12), torch.randn(3, BLOCKS, RANK, RANK)
    expected = [
        F.conv2d(x[i], dense(layer, m[i, 1]), layer.bias, stride, padding) for i in range(3)
    ]
    with matrices.filled(vae=m):
        torch.testing.assert_close(layer(x), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_layer_without_its_matrix_says_so() -> None:
    matrices = BlockMatrices()
    layer = GuidedLinear(nn.Linear(4, 4), RANK, Branch(matrices, "unet", 0))
    with matrices.filled(unet=torch.zeros(1, 1, RANK, RANK)):
        layer(torch.zeros(1, 2, 4))
    with pytest.raises(AssertionError, match="BlockMatrices.unet is empty"):
        layer(torch.zeros(1, 2, 4))


@torch.no_grad()
def test_new_branches_add_nothing() -> None:
    torch.manual_seed(2)
    unet, guide = tiny_unet().eval(), tiny_guide()
    call = (torch.randn(2, 4, 8, 8), torch.tensor(249), torch.randn(2, 3, 24))
    expected = unet(*call).sample
    guide.add_branches(unet)
    with guide.matrices.filled(unet=torch.randn(2, 10, 5, 5)):
        torch.testing.assert_close(unet(*call).sample, expected)


def test_the_layers_and_their_blocks_are_the_published_ones() -> None:
    unet, vae = unet_branches(tiny_unet()), vae_branches(tiny_vae())
    assert "conv_in" not in unet and not [name for name in unet if "time_emb" in name]
    assert [name for name, block in unet.items() if block == 9] == ["conv_out"]
    assert unet["down_blocks.0.resnets.0.conv1"] == 0
    assert unet["down_blocks.3.resnets.0.conv2"] == 3
    assert unet["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"] == 4
    assert unet["up_blocks.0.upsamplers.0.conv"] == 5
    assert unet["up_blocks.3.attentions.1.transformer_blocks.0.attn2.to_out.0"] == 8
    assert vae["encoder.down_blocks.2.downsamplers.0.conv"] == 2
    assert vae["encoder.mid_block.attentions.0.to_q"] == 4
    assert [name for name, block in vae.items() if block == 5] == [
        "encoder.conv_in", "encoder.conv_out",
    ]  # fmt: skip
    assert all(name.startswith("encoder.") for name in vae)


@torch.no_grad()
def test_the_guide_is_fourier_features_and_two_small_networks() -> None:
    torch.manual_seed(3)
    guide = tiny_guide().network
    scores = torch.rand(2, 2)
    for part, found in zip((guide.vae, guide.unet), guide(scores), strict=True):
        n, r = part.embeddings.num_embeddings, part.rank
        assert found.shape == (2, n, r, r)
        for i in range(2):
            waves = []
            for score in scores[i].tolist():
                phases = [2 * math.pi * score * w for w in guide.frequencies.tolist()]
                waves += [math.sin(x) for x in phases] + [math.cos(x) for x in phases]
            degradation = part.degradation(torch.tensor(waves))
            for k in range(n):
                block = part.block(part.embeddings.weight[k])
                expected = 8 / r * part.fuse(torch.cat([degradation, block])).reshape(r, r)
                torch.testing.assert_close(found[i, k], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_estimator_pools_each_of_its_branches() -> None:
    torch.manual_seed(4)
    estimator = DegradationEstimator(4, 8, 10)
    lq = torch.rand(2, 3, 13, 17)
    scores, features = estimator(lq)
    assert scores.shape == (2, 2) and features.shape == (2, 16)
    assert ((scores > 0) & (scores < 1)).all()
    second = estimator.body[1](estimator.conv_first[1](lq)).mean((2, 3))
    torch.testing.assert_close(features[:, 8:], second)
    torch.testing.assert_close(scores[:, 1:], torch.sigmoid(estimator.fc_degree[1](second)))


@torch.no_grad()
def test_the_mem_is_one_number_per_photo_and_never_negative() -> None:
    mem = GuidedMem(2)
    mem.mlp[0].weight.copy_(torch.tensor([[1.0, -2.0]]))
    mem.mlp[0].bias.fill_(0.5)
    found = mem(torch.tensor([[1.0, 0.25], [0.0, 1.0]]))
    assert found.tolist() == [1.0, 0.0]


@torch.no_grad()
def outputs(parts: Parts) -> list[Tensor]:
    """What every part computes, all from one photo."""
    assert parts.guide is not None and parts.mem is not None
    generator = torch.Generator().manual_seed(5)
    lq = torch.rand(2, 3, 16, 24, generator=generator)
    image = torch.rand(2, 3, 64, 128, generator=generator) * 2 - 1
    features, vae, unet = parts.guide(lq)
    tokens = parts.vpim(image[:, :, :28, :28])
    with parts.guide.matrices.filled(vae=vae, unet=unet):
        z_lq = parts.vae.encode(image)
        eps = parts.unet(z_lq, torch.tensor(499), tokens).sample
    return [vae, unet, z_lq, eps, parts.vae.decode(z_lq), parts.mem(features)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    folder = tmp_path_factory.mktemp("rcod_s") / "checkpoint"
    parts = tiny_guided_parts()
    for module in (parts.vae, parts.unet, parts.vpim, parts.mem, parts.guide):
        for parameter in module.parameters():
            parameter.data = parameter.data.half().float()
    expected = outputs(parts)
    save_merged(folder, parts, official_info("tiny", RCOD_S))
    return folder, expected


def test_a_checkpoint_with_branches_loads_back_exactly(saved: tuple[Path, list[Tensor]]) -> None:
    parts, info = load_merged(saved[0])
    assert info.family == "rcod-s"
    for found, expected in zip(outputs(parts), saved[1], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_missing_branch_is_named(
    saved: tuple[Path, list[Tensor]], tmp_path: Path, part: str
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    file = folder / part / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "lora_B" in name)
    del state[name]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=f"{part}: could not be loaded.*\n.*{name}"):
        load_merged(folder)


def test_a_guide_of_another_rank_is_refused(
    saved: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    shutil.rmtree(folder / "guide")
    with pytest.raises(CheckpointError, match="guide: expected a part of the checkpoint"):
        load_merged(folder)
    Guide(rank_vae=3, rank_unet=6).save_pretrained(folder / "guide")
    with pytest.raises(CheckpointError, match="unet: could not be loaded.*\n.*lora_A"):
        load_merged(folder)


def test_a_part_of_another_class_is_refused(
    saved: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    path = folder / "mem" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "Mem"}))
    with pytest.raises(
        CheckpointError, match='"_class_name": expected one of GuidedMem, found .Me'
    ):
        load_merged(folder)
