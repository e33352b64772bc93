"""Before the RCOD stage of nano: the model learns to restore, before realism is asked of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from rcod_train.config import RegressionStageConfig
from rcod_train.data import Batch
from rcod_train.loop import Update
from rcod_train.stages.rcod import RcodStage


class RegressionStage:
    """The generator on the distances to the photo, at the levels of Eq. 5."""

    name = "regression"

    def __init__(self, rcod: RcodStage, config: RegressionStageConfig) -> None:
        self.rcod, self.config = rcod, config
        members = rcod.generator_members(config.learning_rate, config.decoder_learning_rate)
        self.groups = {"generator": members}

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        yield self.rcod.reconstruct(batch, generator).update()

    def extra_state(self) -> dict[str, Any]:
        return {"m_min": self.rcod.grouping.m_min, "m_max": self.rcod.grouping.m_max}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.rcod.grouping = dataclasses.replace(
            self.rcod.grouping, m_min=state["m_min"], m_max=state["m_max"]
        )
