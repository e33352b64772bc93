"""The last stage: the metric estimation module, which makes the adaptive level possible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rcod_train.config import MemStageConfig
from rcod_train.data import Batch
from rcod_train.loop import Update
from rcod_train.stages.rcod import RcodStage


class MemStage:
    """Regresses M of Eq. 6 from z_lq of the trained encoder, or from the degradation estimator's
    features (rcod-s); everything else is frozen."""

    name = "mem"

    def __init__(self, rcod: RcodStage, config: MemStageConfig) -> None:
        assert rcod.parts.mem is not None
        self.rcod, self.mem, self.config = rcod, rcod.parts.mem, config
        named = dict(self.mem.named_parameters())
        self.groups = {"mem": [(named, config.learning_rate)]}

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        m, _ = self.rcod.metric_and_latent(batch)
        error = self.mem(self.rcod.model.mem_input(batch)) - m
        spread = self.rcod.grouping.m_max - self.rcod.grouping.m_min
        loss = (error / spread).square().mean()
        yield Update("mem", loss, {"mean_abs_error": error.detach().abs().mean()})

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass
