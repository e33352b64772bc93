"""Metric estimation module (MEM): estimates M of Eq. 6 without the HR image."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class Mem(ModelMixin, ConfigMixin):
    """A small MLP on channel statistics of z_lq; trained after the main training.

    Args:
        latent_channels: channels of z_lq.
        hidden: width of the hidden layer.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(5 * latent_channels, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, z_lq: Tensor) -> Tensor:
        """z_lq (B, C, h, w) -> m_l (B,): the estimate of Eq. 6, not clamped (Eq. 5's result is)."""
        step_y = (z_lq[:, :, 1:] - z_lq[:, :, :-1]).abs()  # blur and noise show in differences
        step_x = (z_lq[:, :, :, 1:] - z_lq[:, :, :, :-1]).abs()
        curve_x = (step_x[:, :, :, 1:] - step_x[:, :, :, :-1]).abs()
        features = torch.cat(
            [z_lq.mean((2, 3)), z_lq.abs().mean((2, 3))]
            + [part.mean((2, 3)) for part in (step_y, step_x, curve_x)],
            dim=1,
        )  # (B, 5C)
        return self.mlp(features).squeeze(1)
