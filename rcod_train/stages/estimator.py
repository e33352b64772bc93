"""The degradation estimator of rcod-s: blur and noise of synthetic degradations, from lq alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rcod_train.adapted import native
from rcod_train.config import EstimatorStageConfig
from rcod_train.data import Batch
from rcod_train.loop import Update
from rcod_train.models.guide import DegradationEstimator
from rcod_train.precision import Autocast


class EstimatorStage:
    """Regresses the scores that the degradation's own parameters give (``Strength.scores``)."""

    name = "estimator"

    def __init__(
        self, estimator: DegradationEstimator, config: EstimatorStageConfig, autocast: Autocast
    ) -> None:
        self.estimator, self.config, self.autocast = estimator, config, autocast
        named = dict(estimator.named_parameters())
        self.groups = {"estimator": [(named, config.learning_rate)]}

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        assert batch.scores is not None
        with self.autocast():
            scores, _ = self.estimator(native(batch))
        error = scores.float() - batch.scores  # (B, 2)
        blur, noise = error.detach().abs().mean(0)
        yield Update("estimator", error.square().mean(), {"blur_error": blur, "noise_error": noise})

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass
