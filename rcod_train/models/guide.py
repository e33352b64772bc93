"""What guides RCOD_S: how degraded the photo is, and the matrices of every block made from it.

Everything here looks at the LR image as it comes, not upscaled, in [0, 1]. The structure is that of
ArcticHare105/S3Diff; names inside DegradationEstimator are those of its file, de_net.pth.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from rcod_train.models.guided import BlockMatrices, add_branches

SCORES = 2  # blur, noise
# Metadata of an estimator's file whose scores are those of rcod_train.degradation.
TRAINED_HERE = {"trained_by": "rcod-train estimator"}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(x)))


class DegradationEstimator(nn.Module):
    """S3Diff's: one small network for each score, frozen; 2.35 M parameters at full size.

    Args:
        width: of the first three stages.
        features: of the last stage, after the only step down; what is pooled.
        hidden: of the layers that make a score of the pooled features.
    """

    def __init__(self, width: int = 64, features: int = 128, hidden: int = 512) -> None:
        super().__init__()
        self.conv_first = nn.ModuleList(nn.Conv2d(3, width, 3, padding=1) for _ in range(SCORES))
        self.body = nn.ModuleList(
            nn.Sequential(
                *(_Residual(width) for _ in range(6)),
                nn.Conv2d(width, features, 3, stride=2, padding=1),
                *(_Residual(features) for _ in range(2)),
            )
            for _ in range(SCORES)
        )
        self.fc_degree = nn.ModuleList(
            nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
            for _ in range(SCORES)
        )

    def forward(self, lq: Tensor) -> tuple[Tensor, Tensor]:
        """lq (B, 3, h, w) in [0, 1] -> scores (B, 2) in [0, 1], pooled features (B, 2 features)."""
        pooled = [
            body(first(lq)).mean((2, 3))  # (B, features)
            for first, body in zip(self.conv_first, self.body, strict=True)
        ]
        scores = [degree(x) for degree, x in zip(self.fc_degree, pooled, strict=True)]
        return torch.sigmoid(torch.cat(scores, dim=1)), torch.cat(pooled, dim=1)


class GuidedMem(ModelMixin, ConfigMixin):
    """MEM of RCOD_S: one linear layer on the estimator's pooled features.

    Args:
        features: of both branches of the estimator together.
    """

    @register_to_config
    def __init__(self, features: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, 1), nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        """Pooled features (B, features) -> m_l (B,): the estimate of Eq. 6, at least 0."""
        return self.mlp(features).squeeze(1)


class BlockGuide(nn.Module):
    """Fourier features of the scores (B, F) -> the matrices of one network (B, blocks, r, r).

    PEFT's factor of the branches, lora_alpha / r, is multiplied in here.
    """

    def __init__(
        self,
        rank: int,
        blocks: int,
        lora_alpha: float,
        fourier: int,
        width: int,
        block_width: int,
    ) -> None:
        super().__init__()
        self.rank, self.scaling = rank, lora_alpha / rank
        self.degradation = nn.Sequential(nn.Linear(fourier, width), nn.ReLU())
        self.embeddings = nn.Embedding(blocks, block_width)
        self.block = nn.Sequential(nn.Linear(block_width, block_width), nn.ReLU())
        self.fuse = nn.Linear(width + block_width, rank**2)

    def forward(self, fourier: Tensor) -> Tensor:
        degradation = self.degradation(fourier)[:, None]  # (B, 1, width)
        blocks = self.block(self.embeddings.weight)[None]  # (1, blocks, block_width)
        n, batch = blocks.shape[1], degradation.shape[0]
        both = (degradation.expand(-1, n, -1), blocks.expand(batch, -1, -1))
        matrices = self.fuse(torch.cat(both, dim=2)).view(-1, n, self.rank, self.rank)
        return matrices * self.scaling


class DegradationGuide(nn.Module):
    """Scores -> matrices of both networks, by random Fourier features of the scores."""

    frequencies: Tensor

    def __init__(
        self,
        rank_vae: int,
        rank_unet: int,
        blocks_vae: int,
        blocks_unet: int,
        lora_alpha: float,
        frequencies: int,
        width: int,
        block_width: int,
    ) -> None:
        super().__init__()
        fourier = 2 * SCORES * frequencies
        # A buffer, so it stays fp32: 2 pi w s is a phase, where fp16's rounding of w would count.
        self.register_buffer("frequencies", torch.randn(frequencies))
        sizes = (lora_alpha, fourier, width, block_width)
        self.vae = BlockGuide(rank_vae, blocks_vae, *sizes)
        self.unet = BlockGuide(rank_unet, blocks_unet, *sizes)

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores (B, 2) in [0, 1] -> vae (B, blocks, r, r), unet (B, blocks, r, r)."""
        phase = 2.0 * math.pi * scores[:, :, None] * self.frequencies  # (B, 2, frequencies)
        fourier = torch.cat([phase.sin(), phase.cos()], dim=2).flatten(1)  # by score: sin, cos
        return self.vae(fourier), self.unet(fourier)


class Guide(ModelMixin, ConfigMixin):
    """The estimator, the guide, and the object by which its matrices reach the two networks.

    Args:
        rank_vae, rank_unet: r of the branches of each network.
        blocks_vae, blocks_unet: blocks of each network that have a matrix of their own.
        lora_alpha: the branches count lora_alpha / r.
        frequencies: random Fourier frequencies.
        width, block_width: of the guide's layers for the scores and for the blocks.
        estimator_width, estimator_features, estimator_hidden: sizes of the estimator.
    """

    @register_to_config
    def __init__(
        self,
        rank_vae: int = 16,
        rank_unet: int = 32,
        blocks_vae: int = 6,
        blocks_unet: int = 10,
        lora_alpha: float = 8.0,
        frequencies: int = 64,
        width: int = 256,
        block_width: int = 64,
        estimator_width: int = 64,
        estimator_features: int = 128,
        estimator_hidden: int = 512,
    ) -> None:
        super().__init__()
        self.estimator = DegradationEstimator(
            estimator_width, estimator_features, estimator_hidden
        ).requires_grad_(False)
        self.network = DegradationGuide(
            rank_vae,
            rank_unet,
            blocks_vae,
            blocks_unet,
            lora_alpha,
            frequencies,
            width,
            block_width,
        )
        self.matrices = BlockMatrices()

    def forward(self, lq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """lq (B, 3, h, w) in [0, 1], not upscaled -> pooled features (B, 2 estimator_features) for
        the MEM, matrices vae (B, blocks_vae, r, r) and unet (B, blocks_unet, r, r)."""
        scores, features = self.estimator(lq)
        return features, *self.network(scores)

    def add_branches(self, network: AutoencoderKL | UNet2DConditionModel) -> None:
        """Put this guide's branches on the VAE's encoder or on the U-Net, in place."""
        is_unet = isinstance(network, UNet2DConditionModel)
        rank = self.config.rank_unet if is_unet else self.config.rank_vae
        add_branches(network, rank, self.matrices)
