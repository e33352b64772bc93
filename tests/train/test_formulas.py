"""The paper's equations against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rcod_train.grouping import (
    Grouping,
    cosine_metric,
    official_grouping,
    sample_levels,
    sample_official_t,
    sample_regulariser_t,
    sample_uniform_t,
)
from rcod_train.schedule import OFFICIAL_ALPHA_BAR, add_noise, alpha_bar, alpha_sigma, one_step
from rcod_train.vsd import guided, vsd_gradient, vsd_loss


@pytest.mark.parametrize(
    ("t", "expected"),
    [(249, 0.6754), (250, 0.6738), (499, 0.2777), (500, 0.2763), (749, 0.0566), (750, 0.0562),
     (999, 0.0047)],
)  # fmt: skip
def test_alpha_bar_is_stable_diffusions(t: int, expected: float) -> None:
    assert alpha_bar()[t].item() == pytest.approx(expected, abs=5e-5)


def test_alpha_bars_first_two_values() -> None:
    """beta_0 = 0.00085; beta_1 is one step of 999 further in the square root."""
    beta_1 = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) / 999) ** 2
    assert alpha_bar()[0].item() == pytest.approx(1 - 0.00085, rel=1e-12)
    assert alpha_bar()[1].item() == pytest.approx((1 - 0.00085) * (1 - beta_1), rel=1e-12)


def test_alpha_and_sigma_are_of_unit_power() -> None:
    alpha, sigma = alpha_sigma(750)
    assert alpha**2 + sigma**2 == pytest.approx(1.0, abs=1e-12)
    assert sigma / alpha == pytest.approx(4.1, abs=0.01)


def test_eq_3_by_hand() -> None:
    """z = 1.0, eps = 0.5, alpha = 0.8, sigma = 0.6: (1.0 - 0.3) / 0.8 = 0.875."""
    z_sr = one_step(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0]), 0.8, 0.6)
    torch.testing.assert_close(z_sr, torch.tensor([0.875, -3.25]))


def test_eq_3_undoes_the_forward_process_and_stays_fp32() -> None:
    z_0, eps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    for t in (250, 500, 750):
        z_t = add_noise(z_0, eps, torch.tensor([t, t]))
        torch.testing.assert_close(one_step(z_t, eps, *alpha_sigma(t)), z_0, atol=1e-5, rtol=0)
    assert one_step(z_0.bfloat16(), eps.bfloat16(), 0.8, 0.6).dtype == torch.float32


def test_eq_5_by_hand() -> None:
    """n = 3, k = 250, M in [0.1, 0.7]: a group is 0.2 wide; high similarity is a small t."""
    grouping = Grouping(0.1, 0.7)
    m = torch.tensor([0.1, 0.29, 0.31, 0.49, 0.51, 0.69], dtype=torch.float64)
    assert grouping.timestep(m).tolist() == [750, 750, 500, 500, 250, 250]


def test_eq_5_is_clamped_where_the_formula_leaves_the_groups() -> None:
    """M = M_max gives 0 by the formula; values outside the statistics give more or less still."""
    grouping = Grouping(0.1, 0.7)
    m = torch.tensor([0.7, 0.95, -0.5], dtype=torch.float64)
    assert grouping.timestep(m).tolist() == [250, 250, 750]


@pytest.mark.parametrize(("n", "k"), [(1, 250), (2, 250), (3, 250), (4, 249)])
def test_every_group_is_reached_and_the_timesteps_are_multiples_of_k(n: int, k: int) -> None:
    grouping = Grouping(0.0, 1.0, n=n, k=k)
    reached = set(grouping.timestep(torch.linspace(-0.2, 1.0, 500)).tolist())
    assert reached == set(grouping.timesteps) == {k * (i + 1) for i in range(n)}


@pytest.mark.parametrize(
    "fields", [(0.7, 0.1, 3, 250), (0.1, 1.2, 3, 250), (0.1, 0.7, 5, 199), (0.1, 0.7, 4, 250)]
)
def test_impossible_groupings_are_refused(fields: tuple[float, float, int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Grouping(*fields)


def test_eq_6_by_hand() -> None:
    """(3, 4) and (4, 3): 24 / 25; a sign turns it; scale does not count; each sample by itself."""
    z_lq = torch.tensor([[3.0, 4.0], [3.0, 4.0], [1.0, 0.0]]).view(3, 2, 1, 1)
    z_hq = torch.tensor([[4.0, 3.0], [-30.0, -40.0], [0.0, 5.0]]).view(3, 2, 1, 1)
    torch.testing.assert_close(cosine_metric(z_lq, z_hq), torch.tensor([0.96, -1.0, 0.0]))


def test_m_is_not_rounded_beyond_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cosine of equal latents may be 1.0000001, which Eq. 5 would not take as M_max."""
    rounded = torch.tensor([1.0000001, -1.0000001])
    assert rounded[0] > 1
    monkeypatch.setattr(torch, "cosine_similarity", lambda *_, dim: rounded)
    assert cosine_metric(torch.ones(2, 1), torch.ones(2, 1)).tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("t", "low", "high"), [(250, 20, 500), (500, 250, 750), (750, 500, 980), (1000, 750, 980)]
)
def test_eq_7_is_uniform_on_its_interval(t: int, low: int, high: int) -> None:
    """[max(20, t - k), min(980, t + k)] with k = 250, both ends included."""
    draws = sample_regulariser_t(torch.full((60_000,), t), 250, torch.Generator().manual_seed(3))
    assert (draws.min().item(), draws.max().item()) == (low, high)
    middle, spread = (low + high) / 2, (high - low) / math.sqrt(12)
    assert draws.double().mean().item() == pytest.approx(middle, abs=5 * spread / 60_000**0.5)
    assert draws.double().std().item() == pytest.approx(spread, rel=0.02)


def test_eq_7_is_drawn_for_each_sample_from_its_own_t() -> None:
    t = torch.tensor([250, 750]).repeat(500)
    draws = sample_regulariser_t(t, 100, torch.Generator().manual_seed(0))
    assert ((draws - t).abs() <= 100).all() and draws.dtype == torch.int64


def test_a_share_of_the_levels_is_drawn_from_all() -> None:
    t = torch.full((30_000,), 250)
    draws = sample_levels(t, (250, 500, 750), 0.3, torch.Generator().manual_seed(1))
    shares = [(draws == level).double().mean().item() for level in (250, 500, 750)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert torch.equal(sample_levels(t, (250, 500, 750), 0.0, torch.Generator()), t)


def test_the_vsd_gradient_is_the_difference_of_both_estimates_over_w() -> None:
    """Each sample at its own t, by the formulas written out."""
    z_sr, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([100, 499])
    fake, real = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = vsd_gradient(z_sr, t, eps, lambda z_t, t_: fake, lambda z_t, t_: real)
    for i, step in enumerate(t.tolist()):
        alpha, sigma = alpha_sigma(step)
        z_t = alpha * z_sr[i] + sigma * eps[i]
        x0_fake, x0_real = (z_t - sigma * fake[i]) / alpha, (z_t - sigma * real[i]) / alpha
        expected = (x0_fake - x0_real) / (z_sr[i] - x0_real).abs().mean()
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def test_vsd_is_still_where_the_generator_already_makes_photos() -> None:
    z = torch.randn(2, 3, 4, 4)

    def same(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.1 * z_t

    gradient = vsd_gradient(z, torch.tensor([300, 300]), torch.randn_like(z), same, same)
    assert gradient.abs().max().item() == 0.0


def test_vsd_pulls_towards_the_photos_estimate() -> None:
    """Where the real x0 is above the fake one, descending the loss moves z_sr up."""
    z_sr = torch.zeros(1, 1, 2, 2, requires_grad=True)
    t, eps = torch.tensor([500]), torch.zeros(1, 1, 2, 2)
    ones = torch.ones(1, 1, 2, 2)
    gradient = vsd_gradient(z_sr.detach(), t, eps, lambda z_t, _: ones, lambda z_t, _: -ones)
    vsd_loss(z_sr, gradient).backward()
    assert z_sr.grad is not None and (z_sr.grad < 0).all()


def test_the_vsd_loss_has_the_asked_gradient() -> None:
    z_sr = torch.randn(2, 3, 4, 4, requires_grad=True)
    gradient = torch.randn(2, 3, 4, 4)
    vsd_loss(z_sr, gradient).backward()
    torch.testing.assert_close(z_sr.grad, 2 * gradient / z_sr.numel())


def test_guidance_by_hand() -> None:
    """1 + 2 (4 - 1) = 7; a guidance of 1 is the conditional estimate."""
    conditional, unconditional = torch.tensor(4.0), torch.tensor(1.0)
    assert guided(conditional, unconditional, 2.0).item() == 7.0
    assert guided(conditional, unconditional, 1.0).item() == 4.0


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [
        (3, [0.2, 0.499, 0.501, 0.699, 0.701, 0.95], [749, 749, 499, 499, 249, 249]),
        (4, [0.1, 0.299, 0.301, 0.499, 0.501, 0.699, 0.701, 0.99],
         [999, 999, 749, 749, 499, 499, 249, 249]),
    ],
)  # fmt: skip
def test_the_published_codes_bins(n: int, m: list[float], expected: list[int]) -> None:
    grouping = official_grouping(n)
    assert grouping.timestep(torch.tensor(m)).tolist() == expected
    assert grouping.timesteps == tuple(sorted(set(expected)))


@pytest.mark.parametrize(("t", "low"), [(249, 20), (499, 20), (748, 20), (749, 200), (999, 200)])
def test_the_published_codes_intervals_of_the_regularisers_timestep(t: int, low: int) -> None:
    """[20, 980) for t < 749, otherwise [200, 980)."""
    draws = sample_official_t(torch.full((60_000,), t), torch.Generator().manual_seed(2))
    assert (draws.min().item(), draws.max().item()) == (low, 979)
    spread = (979 - low) / math.sqrt(12)
    middle = pytest.approx((low + 979) / 2, abs=5 * spread / 60_000**0.5)
    assert draws.double().mean().item() == middle


def test_without_das_the_regularisers_timestep_does_not_know_the_generators() -> None:
    for t in (250, 750):
        draws = sample_uniform_t(torch.full((60_000,), t), torch.Generator().manual_seed(2))
        assert (draws.min().item(), draws.max().item()) == (20, 980)
        assert draws.double().mean().item() == pytest.approx(500, abs=6)


def test_a_fixed_alpha_bar_gives_the_published_constants() -> None:
    """sqrt(.7537) and sqrt(1 - .7537), whatever t."""
    for t in (249, 749):
        alpha, sigma = alpha_sigma(t, OFFICIAL_ALPHA_BAR)
        assert alpha == pytest.approx(0.86816, abs=1e-5)
        assert sigma == pytest.approx(0.49629, abs=1e-5)
