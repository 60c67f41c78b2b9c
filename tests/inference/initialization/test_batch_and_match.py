# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.inference.initialization.batch_and_match import (
    ascend,
    match_scores,
)
from pyro_artransform.inference.initialization.gaussians import (
    Gaussians,
    antithetic_noise,
    elbos,
    lower_factor,
)

STEPS = 20


def correlated(dim, condition):
    """The factor of a Gaussian whose sds differ by a condition, along axes of no coordinate."""
    turn = torch.linalg.qr(torch.randn(dim, dim)).Q
    return lower_factor((turn * torch.logspace(0, -math.log10(condition), dim))[None])[0]


def gap(log_density, found, count=256):
    """How far the ELBOs are below a log evidence of 0, shape ``(S,)``."""
    return -elbos(log_density, found, antithetic_noise(found.loc, count))


@pytest.mark.parametrize(
    ("dim", "unit", "distance"),
    [(1, 1.0, 1.0), (3, 1e-4, 1e4), (3, 1e4, 1e3), (20, 1.0, 100.0), (60, 0.01, 10.0)],
)
def test_a_gaussian_is_found_to_round_off(dim, unit, distance):
    """Of any unit, from any number of sds away, from a few more draws than dimensions."""
    scale_tril = unit * correlated(dim, 10.0)
    normal = dist.MultivariateNormal(torch.full((dim,), unit), scale_tril=scale_tril)
    points = distance * unit * torch.randn(4, dim)
    found = match_scores(normal.log_prob, points, dim + 16, STEPS)
    assert gap(normal.log_prob, found).abs().max() < 1e-6
    assert torch.allclose(found.loc / unit, torch.ones(4, dim), atol=1e-4)


def test_units_that_differ_by_orders():
    """Sds over eight orders of magnitude, as in a regression on columns as they are."""
    units = torch.tensor([1e-4, 1.0, 1e4])
    scale_tril = units[:, None] * correlated(3, 3.0)
    normal = dist.MultivariateNormal(units, scale_tril=scale_tril)
    points = torch.stack([torch.zeros(3), torch.randn(3), 10 * units * torch.randn(3)])
    found = match_scores(normal.log_prob, points, 32, STEPS)
    assert gap(normal.log_prob, found).abs().max() < 1e-6


def test_coordinates_that_are_nearly_functions_of_each_other():
    """A condition number of 1e10 of the covariance, in no coordinate's direction."""
    normal = dist.MultivariateNormal(torch.ones(20), scale_tril=correlated(20, 1e5))
    found = match_scores(normal.log_prob, torch.zeros(2, 20), 36, STEPS)
    assert gap(normal.log_prob, found).abs().max() < 1e-4


@pytest.mark.parametrize("start", [-40.0, 0.0, 10.0])
def test_a_posterior_whose_curvature_is_none_or_all(start):
    """The log of a Poisson rate of 100 under a wide prior: where it starts, a Newton step overflows.

    The best Gaussian is within 0.01 nats of the posterior, a gamma density.
    """

    def log_density(z):
        return (100 * z - z.exp()).sum(-1) - math.lgamma(100.0)

    found = match_scores(log_density, torch.full((1, 1), start), 32, STEPS)
    assert gap(log_density, found, 4096).item() < 0.01
    assert abs(found.loc.item() - math.log(100)) < 0.02


def half(z):
    """The density of a Gaussian, which fails in a half of the space."""
    normal = dist.Normal(3.0, 1.0).log_prob(z).sum(-1)
    return torch.where(z[..., 0] < 1, torch.nan, normal)


def test_it_stays_where_the_density_is_finite():
    """One point of several is beyond the edge; the others stay within, one begins at it."""
    points = torch.tensor([[-1.0, 0.0], [1.05, 0.0], [6.0, 2.0]])
    found = match_scores(half, points, 32, STEPS)
    assert torch.equal(found.loc[0], points[0])
    assert found.scale_tril.isfinite().all()
    for k in (1, 2):
        assert (found.loc[k] - 3).abs().max() < 1
        # of 32 draws of the Gaussian itself half have none beyond the edge
        assert (found.scale_tril[k].norm(dim=-1) < 1.1).all()


def test_gradients_whose_squares_overflow():
    """Such a point stays where it is, and the others go on."""

    def log_density(z):
        return -0.5 * z.square().sum(-1) - (0.05 * z).exp().sum(-1)

    points = torch.tensor([[1.0], [8000.0]]) * torch.ones(4)
    found = match_scores(log_density, points, 20, STEPS)
    assert found.loc[0].abs().max() < 1.0
    assert found.loc[1].isfinite().all()


def test_heavy_tails_from_far_away():
    """Student's t of 2 degrees from 1,000 sds: the best Gaussian is 0.12 nats off a coordinate."""
    student = dist.StudentT(2.0, torch.zeros(5), 1.0).to_event(1)
    found = match_scores(student.log_prob, torch.full((2, 5), 1e3), 32, STEPS)
    assert gap(student.log_prob, found, 4096).max() < 5 * 0.25


def test_no_gradient_and_single_precision():
    scale_tril = correlated(5, 10.0)
    normal = dist.MultivariateNormal(torch.ones(5).float(), scale_tril=scale_tril.float())
    found = match_scores(normal.log_prob, torch.zeros(2, 5).float(), 32, STEPS)
    assert found.loc.dtype == found.scale_tril.dtype == torch.float32
    assert not found.loc.requires_grad
    # gradients have digits to 1e-7, over a condition of 100
    assert gap(normal.log_prob, found).abs().max() < 1e-3


# Natural gradients


def test_ascent_ends_at_the_best_gaussian():
    """Of a gamma density of shape 4 on the log axis, where the best Gaussian is known by quadrature."""
    shape = 4.0

    def log_density(z):
        return (shape * z - z.exp()).sum(-1) - math.lgamma(shape)

    # E[d/dz] = 0 is shape = exp(m + s^2 / 2), and -E[d^2/dz^2] = 1 / s^2 the same
    variance = 1 / shape
    start = Gaussians(torch.ones(1, 1), torch.ones(1, 1, 1))
    found = ascend(log_density, start, 4000, 15)
    # the one with the largest ELBO by 4,000 draws, which know it to 0.005
    assert found.scale_tril.item() ** 2 == pytest.approx(variance, rel=0.2)
    assert found.loc.item() == pytest.approx(math.log(shape) - variance / 2, abs=0.05)


def test_ascent_does_not_lose():
    """A start that is the posterior stays; one whose draws have no density is returned as it is."""
    normal = dist.MultivariateNormal(torch.ones(3), scale_tril=correlated(3, 10.0))
    start = Gaussians(torch.ones(1, 3), normal.scale_tril[None])
    found = ascend(normal.log_prob, start, 64, 5)
    assert gap(normal.log_prob, found).abs() < 1e-10
    beyond = Gaussians(torch.zeros(1, 2), torch.eye(2)[None])
    assert ascend(half, beyond, 64, 5) == beyond


# Independent Gaussians


def test_independent_gaussians_of_any_unit():
    """The conditional sds of each coordinate, from points one and a hundred sds away."""
    scale = torch.tensor([1e-3, 1.0, 50.0])
    normal = dist.Normal(scale, scale).to_event(1)
    points = scale * torch.tensor([[2.0, 0.0, 0.0], [100.0, -100.0, 10.0]])
    found = match_scores(normal.log_prob, points, 32, STEPS, is_independent=True)
    for k in range(2):
        best = ascend(normal.log_prob, found.take([k]), 32, STEPS // 2)
        assert best.is_independent
        assert torch.allclose(best.loc / scale, torch.ones(3), atol=1e-3)
        assert torch.allclose(best.scale_tril / scale, torch.ones(3), atol=1e-3)


def test_the_best_independent_gaussian_has_the_conditional_sds():
    precision = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    normal = dist.MultivariateNormal(torch.tensor([3.0, -1.0]), precision_matrix=precision)
    found = match_scores(normal.log_prob, torch.zeros(1, 2), 64, STEPS, is_independent=True)
    found = ascend(normal.log_prob, found, 64, STEPS // 2)
    assert torch.allclose(
        found.scale_tril[0], precision.diagonal().rsqrt(), rtol=0.25
    )  # of 64 draws
    assert (found.loc[0] - normal.loc).abs().max() < 0.3


def test_without_a_density_one_stays_and_harms_no_other():
    normal = dist.Normal(torch.tensor(53.0).sqrt(), 0.05, validate_args=False)

    def log_density(z):
        return normal.log_prob((z[:, 0] + 50).sqrt())

    points = torch.tensor([[-100.0], [0.0]])
    found = match_scores(log_density, points, 32, STEPS, is_independent=True)
    lost, good = (ascend(log_density, found.take([k]), 32, STEPS // 2) for k in range(2))
    assert lost.loc == -100.0
    assert abs(good.loc - 3.0) < 1.0, good.loc
    assert torch.cat([lost.scale_tril, good.scale_tril]).isfinite().all()
