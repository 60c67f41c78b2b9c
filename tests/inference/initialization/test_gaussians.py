# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.inference.config import InitializationConfig
from pyro_artransform.inference.initialization.gaussians import (
    Gaussians,
    climb,
    elbos,
    fit_independent,
    fit_mean_fields,
)
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


def test_mean_field_fits_are_made_from_the_best_points():
    scale = torch.tensor([0.5, 2.0])
    normal = dist.Normal(torch.tensor([3.0, -1.0]), scale).to_event(1)
    points = torch.tensor([[0.0, 0.0], [500.0, 1.0], [5.0, 1.0]])
    config = InitializationConfig(num_mean_fields=2)
    found = fit_mean_fields(normal.log_prob, points, antithetic(2), config)
    assert torch.allclose(found.loc, torch.tensor([3.0, -1.0]), atol=0.5)
    assert ((found.scale_tril / scale).log().abs() < 0.3).all()
    assert not found.loc.requires_grad


def test_mean_field_without_a_density_stays_and_harms_no_other():
    normal = dist.Normal(torch.tensor(53.0).sqrt(), 0.05, validate_args=False)

    def log_density(z):
        return normal.log_prob((z[:, 0] + 50).sqrt())

    found = fit_independent(log_density, torch.tensor([[-100.0], [0.0]]), InitializationConfig())
    assert found.loc[0] == -100.0
    assert abs(found.loc[1] - 3.0) < 1.0, found.loc
    assert found.scale_tril.isfinite().all()


def climbed(log_density, points, noise):
    """The modes, the best Gaussians on the way, and their ELBOs."""
    modes, best = climb(log_density, points, noise, max_steps=40)
    return modes, best, elbos(log_density, best, noise)


def antithetic(dim):
    half = torch.randn(32, dim)
    return torch.cat([half, -half])


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_gaussian_of_any_scale(unit):
    scale_tril = unit * torch.tensor(SCALE_TRIL)
    normal = dist.MultivariateNormal(torch.full((3,), unit), scale_tril=scale_tril)
    points = 20 * unit * torch.randn(4, 3)
    modes, best, best_elbo = climbed(normal.log_prob, points, antithetic(3))
    assert modes.converged.all()
    assert torch.allclose(modes.gaussians.loc / unit, torch.ones(4, 3), atol=1e-6)
    found = modes.gaussians.scale_tril / unit
    assert torch.allclose(found, torch.tensor(SCALE_TRIL).expand(4, 3, 3), atol=1e-6)
    assert torch.allclose(modes.value, normal.log_prob(normal.loc))
    assert (best_elbo > -1e-6).all()
    assert torch.allclose(best.loc / unit, torch.ones(4, 3), atol=1e-3)


def test_coordinates_that_are_nearly_functions_of_each_other():
    """A condition number of 1e10, in no coordinate's direction."""
    turn = torch.linalg.qr(torch.randn(20, 20)).Q
    lower = torch.linalg.qr((turn * torch.logspace(0, -5, 20)).mT).R.mT
    normal = dist.MultivariateNormal(torch.ones(20), scale_tril=lower * lower.diagonal().sign())
    _, best, best_elbo = climbed(normal.log_prob, torch.zeros(2, 20), antithetic(20))
    assert (best_elbo > -1e-4).all()
    assert torch.allclose(best.loc, normal.loc, atol=1e-4)


def test_a_saddle_is_left():
    """Curvature of the wrong sign leads away, and no saddle counts as a mode."""

    def log_density(z):
        return -((z[:, 0] ** 2 - 4) ** 2) / 8 - z[:, 1] ** 2

    modes, _, _ = climbed(log_density, torch.tensor([[0.1, 1.0], [0.0, 0.0]]), antithetic(2))
    assert torch.allclose(modes.gaussians.loc[0], torch.tensor([2.0, 0.0]), atol=1e-3)
    assert modes.converged.tolist() == [True, False]


def test_best_gaussian_of_a_funnel_is_not_at_its_mode():
    def log_density(z):
        below = dist.Normal(0.0, (z[:, :1] / 2).exp()).log_prob(z[:, 1:]).sum(-1)
        return dist.Normal(0.0, 3.0).log_prob(z[:, 0]) + below

    found = antithetic(6)
    modes, _, best_elbo = climbed(log_density, torch.ones(1, 6), found)
    assert modes.gaussians.loc[0, 0] < -10
    assert best_elbo > elbos(log_density, modes.gaussians, found) + 1


def test_not_finite_on_the_way():
    def log_density(z):
        return z[:, 0].log() * 3 - z[:, 0]  # a Gamma, on its own axis

    modes, best, _ = climbed(log_density, torch.tensor([[0.01], [30.0]]), antithetic(1))
    assert torch.allclose(modes.gaussians.loc, torch.full((2, 1), 3.0), atol=1e-3)
    assert best.scale_tril.isfinite().all()


def test_a_gradient_that_cannot_be_differentiated():
    """PyTorch gives zeros for it, and nothing that is found so passes for a mode."""
    modes, best, _ = climbed(lambda z: -Once.apply(z).sum(-1), torch.ones(1, 2), antithetic(2))
    assert not modes.converged.any()
    assert best.loc.isfinite().all()
