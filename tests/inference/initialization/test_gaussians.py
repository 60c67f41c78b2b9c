# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import time

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.inference.initialization.gaussians import (
    Gaussians,
    climb,
    climb_by_gradients,
    elbos,
)
from pyro_artransform.time_limit import TimeLimit, cut_off
from tests.inference.models import SCALE_TRIL, Once


def target():
    return dist.MultivariateNormal(torch.ones(3), scale_tril=torch.tensor(SCALE_TRIL))


def test_elbos():
    found = target()
    noise = torch.randn(4000, 3)
    noise = torch.cat([noise, -noise])
    same, moved = torch.ones(3), torch.tensor([2.0, 1.0, 1.0])
    gaussians = Gaussians(torch.stack([same, moved]), torch.tensor(SCALE_TRIL).expand(2, 3, 3))
    values = elbos(found.log_prob, gaussians, noise)
    divergence = torch.distributions.kl_divergence(
        dist.MultivariateNormal(moved, scale_tril=torch.tensor(SCALE_TRIL)), found
    )
    assert torch.allclose(values[0], torch.zeros(()), atol=1e-10)
    assert torch.allclose(values[1], -divergence, rtol=1e-8)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_gaussian_of_any_scale(unit):
    scale_tril = unit * torch.tensor(SCALE_TRIL)
    normal = dist.MultivariateNormal(torch.full((3,), unit), scale_tril=scale_tril)
    points = 20 * unit * torch.randn(4, 3)
    modes = climb(normal.log_prob, points, 40)
    assert modes.converged.all()
    # it ends with less than 1e-6 nats to gain, within 0.0014 sds
    assert ((modes.gaussians.loc / unit - 1) / normal.variance.sqrt() * unit).abs().max() < 2e-3
    # of differences of gradients
    found = modes.gaussians.scale_tril / unit
    assert torch.allclose(found, torch.tensor(SCALE_TRIL).expand(4, 3, 3), atol=1e-5)
    assert torch.allclose(modes.value, normal.log_prob(normal.loc))


def test_curvature_is_that_of_autograd():
    """By differences, of a density that is no Gaussian, in units that differ."""

    def log_density(z):
        x = z * torch.tensor([1e3, 1.0, 1e-2])
        return -(x.exp() + x.prod(-1, keepdim=True).square() + x.square()).sum(-1)

    (mode,), scale_tril = climb(log_density, torch.zeros(1, 3), 40).gaussians
    hessian = torch.autograd.functional.hessian(lambda z: log_density(z[None])[0], mode)
    precision = torch.cholesky_inverse(scale_tril[0])
    scale = hessian.diagonal().abs().sqrt()
    error = (precision + hessian) / scale / scale[:, None]
    assert error.abs().max() < 1e-5


def test_strong_correlations():
    """A condition number of 1e6, in no coordinate's direction: differences see ten times that."""
    turn = torch.linalg.qr(torch.randn(20, 20)).Q
    lower = torch.linalg.qr((turn * torch.logspace(0, -3, 20)).mT).R.mT
    normal = dist.MultivariateNormal(torch.ones(20), scale_tril=lower * lower.diagonal().sign())
    modes = climb(normal.log_prob, torch.zeros(2, 20), 40)
    assert modes.converged.all()
    assert (modes.value - normal.log_prob(normal.loc)).abs().max() < 1e-6
    assert (modes.log_masses()).abs().max() < 1e-3


def test_a_saddle_is_left():
    """Curvature of the wrong sign leads away, and no saddle counts as a mode."""

    def log_density(z):
        return -((z[:, 0] ** 2 - 4) ** 2) / 8 - z[:, 1] ** 2

    modes = climb(log_density, torch.tensor([[0.1, 1.0], [0.0, 0.0]]), 40)
    assert torch.allclose(modes.gaussians.loc[0], torch.tensor([2.0, 0.0]), atol=1e-3)
    assert modes.converged.tolist() == [True, False]


def test_not_finite_on_the_way():
    def log_density(z):
        return z[:, 0].log() * 3 - z[:, 0]  # a Gamma, on its own axis

    modes = climb(log_density, torch.tensor([[0.01], [30.0]]), 40)
    assert torch.allclose(modes.gaussians.loc, torch.full((2, 1), 3.0), atol=1e-3)
    assert modes.converged.all()


def test_a_gradient_that_cannot_be_differentiated():
    """Differences of gradients do without second derivatives."""
    modes = climb(lambda z: -Once.apply(z).sum(-1), torch.ones(1, 2), 40)
    assert modes.converged.all()
    assert torch.allclose(modes.gaussians.loc, torch.zeros(1, 2), atol=1e-6)


# By gradients alone


@pytest.mark.parametrize("is_dense", [True, False])
def test_climbs_by_gradients(is_dense):
    """In the units of another Gaussian, from many sds away, all points side by side."""
    scale_tril = 1e-3 * torch.tensor(SCALE_TRIL)
    normal = dist.MultivariateNormal(torch.ones(3), scale_tril=scale_tril)
    units = scale_tril @ torch.tensor([[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, -0.5, 0.5]])
    units = units if is_dense else normal.variance.sqrt()
    points = 1 + 0.02 * torch.randn(6, 3)
    ends, values = climb_by_gradients(normal.log_prob, points, units, 60)
    assert torch.allclose(values, normal.log_prob(normal.loc), atol=1e-4)
    assert torch.allclose(normal.log_prob(ends), values)
    assert torch.allclose((ends - 1) / normal.variance.sqrt(), torch.zeros(6, 3), atol=0.02)


def test_climbs_by_gradients_end_at_their_own_maxima():
    """A point beyond the edge stays, and two others find a maximum each."""

    def log_density(z):
        inside = -((z[:, 0] ** 2 - 4) ** 2) / 8 - z[:, 1] ** 2
        return torch.where(z[:, 0] > 8, torch.nan, inside)

    points = torch.tensor([[-1.0, 3.0], [5.0, -3.0], [9.0, 0.0]])
    ends, values = climb_by_gradients(log_density, points, torch.ones(2), 60)
    assert torch.allclose(ends[:2], torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), atol=1e-3)
    assert values[:2].abs().max() < 1e-6
    assert torch.equal(ends[2], points[2])


def test_a_climb_is_left_with_the_time():
    steps = 0

    def slow(points):
        nonlocal steps
        steps += 1
        float(points.detach().sum())  # such a density is not captured
        time.sleep(0.02)
        return -(points**4).sum(-1) - points.sum(-1)

    with TimeLimit(0.2) as limit, cut_off("the climb"):
        climb_by_gradients(slow, 50 * torch.ones(3, 4), torch.ones(4), 1000)
    assert limit.left_out == ["the climb"]
    assert steps < 50
