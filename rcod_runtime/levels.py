"""From a realism setting to weights on the levels of a bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rcod_runtime.errors import UsageError
from rcod_runtime.manifest import Level, Manifest, MetricRange

ADAPTIVE, NEUTRAL = "adaptive", "neutral"


def default_level(levels: Sequence[Level]) -> str:
    """The name of the level that is taken where none is chosen: neutral, or in a bundle without it
    the middle one, of two the first."""
    names = [level.name for level in levels]
    return NEUTRAL if NEUTRAL in names else names[(len(names) - 1) // 2]


def choice_weights(
    realism: str | float | None, manifest: Manifest
) -> npt.NDArray[np.float32] | None:
    """Weights (n,) on a bundle's levels, without a choice its default level's; None, for
    ``adaptive``, leaves the choice to its graphs.

    Raises:
        UsageError: nothing that the bundle has.
    """
    is_adaptive = isinstance(realism, str) and realism == ADAPTIVE
    if is_adaptive and manifest.has_metric_estimator:
        return None
    if is_adaptive:
        raise UsageError(
            f"realism adaptive: the bundle {manifest.identity.name} has no metric estimation "
            "module. Choose a level or a number in [0, 1]."
        )
    realism = default_level(manifest.levels) if realism is None else realism
    return level_weights(realism, manifest.levels, manifest.has_metric_estimator)


def level_weights(
    realism: str | float, levels: Sequence[Level], adaptive: bool = False
) -> npt.NDArray[np.float32]:
    """Weights (n,) float32 that sum to one.

    Args:
        realism: a level's name, or a number from 0 (the first level) to 1 (the last); in between
            the two neighbours are mixed linearly.
        adaptive: whether messages offer that, too.

    Raises:
        UsageError: no such level, or a number outside [0, 1].
    """
    weights = np.zeros(len(levels), np.float32)
    names = [level.name for level in levels]
    if isinstance(realism, str):
        if realism not in names:
            offered = ", ".join([*names, ADAPTIVE] if adaptive else names)
            raise UsageError(
                f"realism {realism!r}: expected one of {offered}, or a number in [0, 1]."
            )
        weights[names.index(realism)] = 1.0
        return weights
    if isinstance(realism, bool) or not isinstance(realism, (int, float, np.floating, np.integer)):
        raise UsageError(f"realism: expected a level's name or a number, found {realism!r}.")
    if not 0.0 <= realism <= 1.0:  # NaN too
        raise UsageError(f"realism {realism}: expected a number in [0, 1].")
    position = float(realism) * (len(levels) - 1)
    lower = min(math.floor(position), max(0, len(levels) - 2))
    weights[lower] = 1.0 - (position - lower)
    if len(levels) > 1:
        weights[lower + 1] = position - lower
    return weights


def adaptive_level(m_l: float, metric: MetricRange, levels: Sequence[Level]) -> Level:
    """Eq. 5 with an estimate of M: t = k (n - floor(n (M - M_min) / (M_max - M_min))).

    The group is clamped to the levels there are: M = M_max would give t = 0.
    """
    n = len(levels)
    group = math.floor(n * (m_l - metric.m_min) / (metric.m_max - metric.m_min))
    return levels[min(max(n - group, 1), n) - 1]
