"""Latent metric, latent domain grouping and degradation-aware sampling (Eq. 5, 6, 7 of RCOD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rcod_train.config import RcodStageConfig
from rcod_train.errors import ConfigError
from rcod_train.schedule import TIMESTEPS


def cosine_metric(z_lq: Tensor, z_hq: Tensor) -> Tensor:
    """Eq. 6: M = cosine similarity of the flattened latents, (B, C, h, w) x 2 -> (B,) float32."""
    m = torch.cosine_similarity(z_lq.float().flatten(1), z_hq.float().flatten(1), dim=1)
    return m.clamp(-1.0, 1.0)  # of equal latents it may be rounded to more


def l1_metric(z_lq: Tensor, z_hq: Tensor) -> Tensor:
    """1 - mean |z_lq - z_hq|, for comparison: the paper's Table 1b has it worse than the cosine."""
    return 1.0 - (z_lq.float() - z_hq.float()).abs().flatten(1).mean(1)


METRICS = {"cosine": cosine_metric, "l1": l1_metric}


@dataclass(frozen=True)
class Grouping:
    """Latent domain grouping. m_min and m_max are statistics of the training set.

    ``offset`` is taken from every timestep: the published code's are one less than the paper's.
    """

    m_min: float
    m_max: float
    n: int = 3
    k: int = 250
    offset: int = 0

    def __post_init__(self) -> None:
        if not -1.0 <= self.m_min < self.m_max <= 1.0:
            raise ValueError(f"expected -1 <= m_min < m_max <= 1, found {self.m_min}, {self.m_max}")
        if not 1 <= self.n <= 4:
            raise ValueError(f"n: expected 1 to 4 groups, found {self.n}.")
        if not 1 <= self.k <= (highest := (TIMESTEPS - 1 + self.offset) // self.n):
            raise ValueError(
                f"k: expected 1 to {highest} with {self.n} groups, found {self.k}. The last "
                f"timestep is n k, and the schedule has 0 to {TIMESTEPS - 1}."
            )

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the groups, from fidelity to realism: k, 2k, ... nk, less the offset."""
        return tuple(self.k * (i + 1) - self.offset for i in range(self.n))

    def timestep(self, m: Tensor) -> Tensor:
        """Eq. 5: t = k (n - floor(n (M - M_min) / (M_max - M_min))), clamped to [k, nk].

        The clamp covers M = M_max (the formula gives t = 0) and values outside the statistics.
        """
        group = torch.floor(self.n * (m - self.m_min) / (self.m_max - self.m_min))
        return (self.k * (self.n - group)).clamp(self.k, self.n * self.k).long() - self.offset


def official_grouping(n: int, k: int = 250) -> Grouping:
    """The published code's bins: n = 3: M < .5 -> 749, < .7 -> 499, else 249; n = 4: < .3 -> 999,
    < .5 -> 749, < .7 -> 499, else 249. They are Eq. 5 with groups .2 wide that end at .9."""
    return Grouping({3: 0.3, 4: 0.1}[n], 0.9, n, k, offset=1)


def check_groups(config: RcodStageConfig) -> None:
    """Before a run begins, since M_min and M_max are measured late in it.

    Raises:
        ConfigError: groups that there can't be.
    """
    n, k = config.n, config.k
    if config.grouping == "official":
        if n not in (3, 4) or k != 250:
            raise ConfigError(
                f"rcod.grouping official: expected rcod.n 3 or 4 and rcod.k 250, found {n} and {k}."
            )
        return
    try:
        Grouping(-1.0, 1.0, n, k)
    except ValueError as exc:
        raise ConfigError(f"rcod.{exc}") from exc


def sample_levels(
    t: Tensor, timesteps: tuple[int, ...], share: float, generator: torch.Generator
) -> Tensor:
    """Replace a ``share`` of t (B,) by levels drawn uniformly from ``timesteps``.

    Not in the paper: without it the last level never sees a good photo in training, and a user who
    asks for realism on one gets noise from a small network.
    """
    drawn = torch.randint(0, len(timesteps), t.shape, generator=generator)
    replaced = torch.rand(t.shape, generator=generator) < share
    return torch.where(replaced.to(t.device), torch.tensor(timesteps)[drawn].to(t.device), t)


def sample_regulariser_t(t: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Eq. 7: t_r uniform among the integers of [max(20, t - k), min(980, t + k)]; t (B,) int64."""
    return _uniform((t - k).clamp(min=20), (t + k).clamp(max=980), generator)


def sample_official_t(t: Tensor, generator: torch.Generator) -> Tensor:
    """The published code's interval in the place of Eq. 7: [20, 980) for t < 749, or [200, 980)."""
    low = torch.where(t < 749, 20, 200)
    return _uniform(low, torch.full_like(low, 979), generator)


def sample_uniform_t(t: Tensor, generator: torch.Generator) -> Tensor:
    """Without DAS, as in OSEDiff: [20, 980], whatever the generator's t; for comparison."""
    return _uniform(torch.full_like(t, 20), torch.full_like(t, 980), generator)


def _uniform(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform among the integers of [low, high], each (B,); drawn on the CPU."""
    u = torch.rand(low.shape, generator=generator, dtype=torch.float64).to(low.device)
    return low + (u * (high - low + 1)).long().clamp(max=high - low)
