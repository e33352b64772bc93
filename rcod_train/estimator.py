"""``rcod-train estimator``: the degradation estimator of rcod-s, where S3Diff's isn't at hand.

Its scores are defined here (rcod_train/degradation.py), not S3Diff's, whose scale is not published:
a guide works with the estimator that it was trained with.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from rcod_train.config import EstimatorConfig
from rcod_train.files import disk_errors, file_written_whole
from rcod_train.models.guide import TRAINED_HERE, DegradationEstimator
from rcod_train.network import seeded
from rcod_train.run import Run
from rcod_train.stages.estimator import EstimatorStage

TOKENS_PX = 8  # of thumbnails that this stage doesn't look at


def train_estimator(config: EstimatorConfig, resume: bool) -> Path:
    """Write ``<out>/estimator.safetensors``, the argument of ``rcod-train rcod-s --estimator``.

    With ``resume`` the newest whole checkpoint is continued.
    """
    run = Run(config, (config.estimator,), resume)
    run.start()
    with seeded(config.seed):
        estimator = DegradationEstimator(config.width, config.features, config.hidden)
    estimator.to(run.device)
    stage = EstimatorStage(estimator, config.estimator, run.autocast)
    degradations = config.estimator.degradations
    run.train(stage, run.batches_of(config.estimator, "estimator", TOKENS_PX, degradations))
    path = run.out / "estimator.safetensors"
    if run.ranks.writes:
        with disk_errors(path), file_written_whole(path) as partial:
            save_file(estimator.state_dict(), partial, TRAINED_HERE)
    return path
