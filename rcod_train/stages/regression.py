"""Before the RCOD stage of nano: the model learns to restore, before realism is asked of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from rcod_train.config import RegressionStageConfig
from rcod_train.data import Batch
from rcod_train.errors import CheckpointError
from rcod_train.loop import Update
from rcod_train.stages.rcod import RcodStage

# Rates and realism terms are of the RCOD stage alone, and may change before it begins.
SHARED = (
    "rank_unet", "rank_vae", "lora_alpha", "grouping", "metric", "constants", "vpim", "n", "k",
    "any_level", "heavy_share", "mild_share", "l1_weight", "mse_weight", "gradient_weight",
    "ssim_weight", "consistent", "latent_weight", "train_adapters", "train_decoder",
)  # fmt: skip


class RegressionStage:
    """The generator on the distances to the photo, at the levels of Eq. 5."""

    name = "regression"

    def __init__(self, rcod: RcodStage, config: RegressionStageConfig) -> None:
        self.rcod, self.config = rcod, config
        members = rcod.generator_members(config.learning_rate, config.decoder_learning_rate)
        self.groups = {"generator": members}

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        yield self.rcod.reconstruct(batch, generator).update()

    def of_rcod(self) -> dict[str, Any]:
        """The settings of ``rcod`` that this stage takes."""
        return {name: getattr(self.rcod.config, name) for name in SHARED}

    def extra_state(self) -> dict[str, Any]:
        m_min, m_max = self.rcod.grouping.m_min, self.rcod.grouping.m_max
        return {"m_min": m_min, "m_max": m_max, "rcod": self.of_rcod()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        ours = self.of_rcod()
        theirs = ours | state.get("rcod", {})  # older checkpoints don't say
        differing = [f"rcod.{n}: {theirs[n]} there, {ours[n]} here" for n in ours
                     if theirs[n] != ours[n]]  # fmt: skip
        if differing:
            raise CheckpointError(
                f"the regression to resume took other settings ({', '.join(differing)}). Use the "
                "same ones, or another --out."
            )
        self.rcod.grouping = dataclasses.replace(
            self.rcod.grouping, m_min=state["m_min"], m_max=state["m_max"]
        )
