"""The tensor programs that ship: one wrapper module for each graph of a bundle.

Inputs and outputs are fp32 whatever the precision inside: bf16 is no type of numpy, and they are
small beside what happens between them. A wrapper takes its modules over and converts them.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from rcod_runtime.manifest import Precision
from rcod_train.checkpoint import CheckpointInfo, CheckpointLevel
from rcod_train.models.guide import Guide
from rcod_train.models.guided import BlockMatrices
from rcod_train.models.sd import SdVae
from rcod_train.models.vae import NanoVae
from rcod_train.network import past_the_skip, predict_eps

DTYPES = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}


def _converted(module: Any, dtype: torch.dtype) -> Any:
    """The module itself in another precision; diffusers' own method warns of it."""
    return nn.Module.to(module, dtype)


def _filled(matrices: BlockMatrices | None, **tensors: Tensor) -> AbstractContextManager[None]:
    """Where a guide's branches are, the networks are called inside this."""
    return contextlib.nullcontext() if matrices is None else matrices.filled(**tensors)


def adaptive_weights(m_l: Tensor, info: CheckpointInfo) -> Tensor:
    """Eq. 5, t = k (n - floor(n (M - M_min) / (M_max - M_min))), as one-hot weights (B, n).

    The group is clamped to the levels there are: M = M_max would give t = 0.
    """
    n = len(info.levels)
    group = torch.floor(n * (m_l - info.m_min) / (info.m_max - info.m_min))
    index = (n - group).clamp(1, n) - 1  # (B,)
    return (index[:, None] == torch.arange(n, device=m_l.device)).float()


class GuideGraph(nn.Module):
    """lq (B, 3, h, w) in [0, 1], not upscaled -> vae_matrices and unet_matrices (B, blocks, r, r);
    with a MEM also m_l (B,) and adaptive (B, n), the weights of the level that Eq. 5 gives.

    Always fp32: it is small, and its Fourier features are phases.
    """

    def __init__(self, guide: Guide, mem: nn.Module | None, info: CheckpointInfo) -> None:
        super().__init__()
        self.guide, self.mem, self.info = guide, mem, info

    def forward(self, lq: Tensor) -> tuple[Tensor, ...]:
        features, vae, unet = self.guide(lq)
        if self.mem is None:
            return vae, unet
        m_l = self.mem(features)
        return vae, unet, m_l, adaptive_weights(m_l, self.info)


class EncoderGraph(nn.Module):
    """image (B, 3, H, W) in [-1, 1] -> z_lq (B, C + S, H/8, W/8), the latent and what skips the
    denoiser; with a MEM that reads the latent also m_l (B,) and adaptive (B, n), the weights of the
    level that Eq. 5 gives for m_l.

    With a guide there is an input vae_matrices (B, blocks, r, r).
    """

    def __init__(
        self,
        vae: NanoVae | SdVae,
        mem: nn.Module | None,
        info: CheckpointInfo,
        dtype: torch.dtype,
        matrices: BlockMatrices | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.mem, self.dtype = _converted(vae, dtype), mem, dtype
        self.info, self.matrices = info, matrices

    def forward(
        self, image: Tensor, vae_matrices: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        given = {} if vae_matrices is None else {"vae": vae_matrices.to(self.dtype)}
        with _filled(self.matrices, **given):
            z_lq: Tensor = self.vae.encode_with_skip(image.to(self.dtype)).float()
        if self.mem is None:
            return z_lq
        m_l = self.mem(z_lq[:, : self.vae.config.latent_channels])
        return z_lq, m_l, adaptive_weights(m_l, self.info)


class VpimGraph(nn.Module):
    """image (B, 3, S, S) in [-1, 1] -> tokens (B, N, D)."""

    def __init__(self, vpim: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.vpim, self.dtype = _converted(vpim, dtype), dtype

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.vpim(image.to(self.dtype)).float()
        return tokens


class DecoderGraph(nn.Module):
    """z_sr (B, C + S, h, w) -> image (B, 3, H, W), clamped to [-1, 1]."""

    def __init__(self, vae: NanoVae | SdVae, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae, self.dtype = _converted(vae, dtype), dtype

    def forward(self, z_sr: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(z_sr.to(self.dtype)).float().clamp(-1.0, 1.0)
        return image


class _TableColumns(nn.Module):
    """Stands in for a residual block's time projection: its columns of the level's row."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, row: Tensor) -> Tensor:
        return row[:, self.start : self.stop]


class DenoiserGraph(nn.Module):
    """z_lq (B, C + S, h, w), tokens (B, N, D), level (B, n) -> z_sr (B, C + S, h, w), whose last S
    channels, the decoder's skip, are those of z_lq.

    With one level there is no input ``level``: the row and the constants are part of the graph.
    With a guide there is an input unet_matrices (B, blocks, r, r).

    ``level`` weighs the rows of a table that holds, for every level, what the U-Net makes of its
    timestep (each residual block's projected time embedding) and the alpha_t and sigma_t of Eq. 3.
    One-hot is a level, in between is a mix. The sinusoid, the timestep MLP and the projections are
    gone from the graph. The U-Net given is taken over: it can't be called by timestep afterwards.
    """

    table: Tensor
    constants: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        levels: tuple[CheckpointLevel, ...],
        dtype: torch.dtype = torch.float32,
        matrices: BlockMatrices | None = None,
    ) -> None:
        super().__init__()
        timesteps = torch.tensor([level.timestep for level in levels])
        with torch.no_grad():
            embedding = unet.time_embedding(unet.time_proj(timesteps).float())  # (n, E)
        columns: list[Tensor] = []
        start = 0
        for block in unet.modules():
            if not isinstance(block, ResnetBlock2D) or block.time_emb_proj is None:
                continue
            with torch.no_grad():
                projected = block.time_emb_proj(block.nonlinearity(embedding))  # (n, C_block)
            stop = start + projected.shape[1]
            block.time_emb_proj = _TableColumns(start, stop)
            block.skip_time_act = True  # the table's values are already activated and projected
            columns.append(projected)
            start = stop
        unet.time_embedding = _Passed()
        unet.get_time_embed = lambda sample, timestep: timestep
        self.unet, self.dtype, self.matrices = _converted(unet, dtype), dtype, matrices
        self.channels = int(unet.config.in_channels)
        self.register_buffer("table", torch.cat(columns, dim=1))  # (n, sum of C_block)
        constants = [[level.alpha, level.sigma] for level in levels]
        self.register_buffer("constants", torch.tensor(constants, dtype=torch.float32))  # (n, 2)

    def forward(
        self,
        z_lq: Tensor,
        tokens: Tensor,
        level: Tensor | None = None,
        unet_matrices: Tensor | None = None,
    ) -> Tensor:
        if level is None:
            row, constants = self.table, self.constants
        else:
            row, constants = level @ self.table, level @ self.constants
        alpha, sigma = constants.view(-1, 2, 1, 1, 1).unbind(1)  # (B, 1, 1, 1) each
        given = {} if unet_matrices is None else {"unet": unet_matrices.to(self.dtype)}

        def denoised(latent: Tensor) -> Tensor:
            inputs = (x.to(self.dtype) for x in (latent, row, tokens))
            with _filled(self.matrices, **given):
                eps = predict_eps(self.unet, *inputs)
            # Eq. 3 in fp32: sigma/alpha is 4.1 at t = 750 and amplifies every rounding of eps.
            return (latent - sigma * eps.float()) / alpha

        return past_the_skip(z_lq, self.channels, denoised)


class _Passed(nn.Module):
    """Stands in for the timestep MLP: the level's row goes through as it is."""

    def forward(self, row: Tensor, condition: Tensor | None = None) -> Tensor:
        return row
