# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.inference.initialization.gaussians import elbos
from pyro_artransform.inference.initialization.newton import climb as climb_by
from tests.inference.models import SCALE_TRIL, Once


def climb(log_density, points, noise):
    """The modes, the best Gaussians on the way, and their ELBOs."""
    modes, best = climb_by(log_density, points, noise, max_steps=40)
    return modes, best, elbos(log_density, best, noise)


def noise(dim):
    half = torch.randn(32, dim)
    return torch.cat([half, -half])


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_gaussian_of_any_scale(unit):
    scale_tril = unit * torch.tensor(SCALE_TRIL)
    normal = dist.MultivariateNormal(unit * torch.ones(3), scale_tril=scale_tril)
    points = 20 * unit * torch.randn(4, 3)
    modes, best, best_elbo = climb(normal.log_prob, points, noise(3))
    assert modes.converged.all()
    assert torch.allclose(modes.gaussians.loc, normal.loc.expand(4, 3), atol=1e-6 * unit)
    assert torch.allclose(modes.gaussians.scale_tril, scale_tril.expand(4, 3, 3), atol=1e-6 * unit)
    assert torch.allclose(modes.value, normal.log_prob(normal.loc))
    assert (best_elbo > -1e-6).all()
    assert torch.allclose(best.loc, modes.gaussians.loc, atol=1e-3 * unit)


def test_axes_of_very_different_scales():
    scales = torch.tensor([1e-5, 1.0, 1e5])
    normal = dist.Normal(scales, scales).to_event(1)
    modes, _, best_elbo = climb(normal.log_prob, torch.zeros(1, 3), noise(3))
    assert modes.converged.all()
    assert torch.allclose(modes.gaussians.scale_tril[0].diagonal(), scales, rtol=1e-4)
    assert (best_elbo > -1e-4).all()


def test_each_point_climbs_to_the_mode_near_it():
    def log_density(z):
        return -((z[:, 0] ** 2 - 25) ** 2) / 200

    modes, _, _ = climb(log_density, torch.tensor([[-3.0], [4.0], [9.0]]), noise(1))
    assert torch.allclose(modes.gaussians.loc[:, 0], torch.tensor([-5.0, 5.0, 5.0]), atol=1e-3)
    assert modes.converged.all()


def test_a_saddle_is_left():
    """Curvature of the wrong sign leads away, and no saddle counts as a mode."""

    def log_density(z):
        return -((z[:, 0] ** 2 - 4) ** 2) / 8 - z[:, 1] ** 2

    modes, _, _ = climb(log_density, torch.tensor([[0.1, 1.0], [0.0, 0.0]]), noise(2))
    assert torch.allclose(modes.gaussians.loc[0], torch.tensor([2.0, 0.0]), atol=1e-3)
    assert modes.converged.tolist() == [True, False]


def test_best_gaussian_of_a_funnel_is_not_at_its_mode():
    def log_density(z):
        below = dist.Normal(0.0, (z[:, :1] / 2).exp()).log_prob(z[:, 1:]).sum(-1)
        return dist.Normal(0.0, 3.0).log_prob(z[:, 0]) + below

    found = noise(6)
    modes, _, best_elbo = climb(log_density, torch.ones(1, 6), found)
    assert modes.gaussians.loc[0, 0] < -10
    assert best_elbo > elbos(log_density, modes.gaussians, found) + 1


def test_not_finite_on_the_way():
    def log_density(z):
        return z[:, 0].log() * 3 - z[:, 0]  # a Gamma, on its own axis

    modes, best, _ = climb(log_density, torch.tensor([[0.01], [30.0]]), noise(1))
    assert torch.allclose(modes.gaussians.loc, torch.full((2, 1), 3.0), atol=1e-3)
    assert best.scale_tril.isfinite().all()


def test_flat_and_linear_directions():
    modes, best, _ = climb(lambda z: -0.5 * z[:, 0] ** 2 + 0 * z[:, 1], torch.ones(1, 2), noise(2))
    assert not modes.converged.any()
    assert best.scale_tril.isfinite().all()
    _, best, _ = climb(lambda z: z.sum(-1), torch.ones(1, 2), noise(2))
    assert best.loc.isfinite().all()


def test_a_gradient_that_cannot_be_differentiated():
    """PyTorch gives zeros for it, and nothing that is found so passes for a mode."""
    modes, best, _ = climb(lambda z: -Once.apply(z).sum(-1), torch.ones(1, 2), noise(2))
    assert not modes.converged.any()
    assert best.loc.isfinite().all()


def test_a_gradient_that_has_no_graph():
    with pytest.raises(RuntimeError):
        climb(lambda z: -(z.detach() ** 2).sum(-1), torch.ones(1, 2), noise(2))
