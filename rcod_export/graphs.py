"""The tensor programs that ship: one wrapper module for each graph of a bundle."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from rcod_train.checkpoint import CheckpointLevel
from rcod_train.models.mem import Mem
from rcod_train.models.sd import SdVae
from rcod_train.models.vae import NanoVae


class EncoderGraph(nn.Module):
    """image (B, 3, H, W) in [-1, 1] -> z_lq (B, C, H/8, W/8) and, with a MEM, m_l (B,)."""

    def __init__(self, vae: NanoVae | SdVae, mem: Mem | None) -> None:
        super().__init__()
        self.vae, self.mem = vae, mem

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        z_lq = self.vae.encode(image)
        return z_lq if self.mem is None else (z_lq, self.mem(z_lq))


class DecoderGraph(nn.Module):
    """z_sr (B, C, h, w) -> image (B, 3, H, W), clamped to [-1, 1]."""

    def __init__(self, vae: NanoVae | SdVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z_sr: Tensor) -> Tensor:
        return self.vae.decode(z_sr).clamp(-1.0, 1.0)


class _TableColumns(nn.Module):
    """Stands in for a residual block's time projection: its columns of the level's row."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, row: Tensor) -> Tensor:
        return row[:, self.start : self.stop]


class DenoiserGraph(nn.Module):
    """z_lq (B, C, h, w), tokens (B, N, D), level (B, n) -> z_sr (B, C, h, w).

    ``level`` weighs the rows of a table that holds, for every level, what the U-Net makes of its
    timestep (each residual block's projected time embedding) and the alpha_t and sigma_t of Eq. 3.
    One-hot is a level, in between is a mix. The sinusoid, the timestep MLP and the projections are
    gone from the graph. The U-Net given is taken over: it can't be called by timestep afterwards.
    """

    table: Tensor
    constants: Tensor

    def __init__(self, unet: UNet2DConditionModel, levels: tuple[CheckpointLevel, ...]) -> None:
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
        self.unet = unet
        self.register_buffer("table", torch.cat(columns, dim=1))  # (n, sum of C_block)
        constants = [[level.alpha, level.sigma] for level in levels]
        self.register_buffer("constants", torch.tensor(constants, dtype=torch.float32))  # (n, 2)

    def forward(self, z_lq: Tensor, tokens: Tensor, level: Tensor) -> Tensor:
        row = level @ self.table  # (B, sum of C_block)
        eps = self.unet(z_lq, row, encoder_hidden_states=tokens, return_dict=False)[0]
        alpha, sigma = (level @ self.constants).view(-1, 2, 1, 1, 1).unbind(1)  # (B, 1, 1, 1) each
        # Eq. 3 in fp32: sigma/alpha is 4.1 at t = 750 and amplifies every rounding of eps.
        z_sr: Tensor = (z_lq.float() - sigma * eps.float()) / alpha
        return z_sr


class _Passed(nn.Module):
    """Stands in for the timestep MLP: the level's row goes through as it is."""

    def forward(self, row: Tensor, condition: Tensor | None = None) -> Tensor:
        return row
