# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch
from pyro import distributions as dist

from pyro_artransform.inference.config import InitializationConfig
from pyro_artransform.inference.initialization.gaussians import (
    Gaussians,
    concatenate,
    elbos,
    evaluate_density,
    fit_mean_field,
)
from tests.inference.models import SCALE_TRIL


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


def test_elbo_of_a_density_that_is_not_finite():
    identity = torch.eye(2)[None].expand(2, 2, 2)
    gaussians = Gaussians(torch.tensor([[0.0, 0.0], [100.0, 0.0]]), identity)
    values = elbos(lambda z: (5 - z[:, 0]).sqrt(), gaussians, torch.randn(50, 2))
    assert values.isfinite().tolist() == [True, False]
    assert values[1] == -torch.inf


def test_evaluate_density():
    z = torch.randn(3, 2000, 2)
    found = evaluate_density(lambda z: z.sum(-1).log(), z)
    assert found.shape == (3, 2000)
    assert not found.isnan().any()
    assert torch.equal(found == -torch.inf, z.sum(-1) <= 0)
    infinite = evaluate_density(lambda z: torch.full_like(z[:, 0], torch.inf), z)
    assert (infinite == -torch.inf).all()


def test_volume_and_diagonal():
    gaussians = Gaussians(torch.zeros(1, 3), torch.tensor(SCALE_TRIL)[None])
    covariance = gaussians.scale_tril[0] @ gaussians.scale_tril[0].T
    assert torch.allclose(gaussians.log_volume()[0], 0.5 * covariance.logdet())
    found = gaussians.diagonal()
    assert torch.allclose(found.scale_tril[0].diagonal() ** -2, covariance.inverse().diagonal())
    # no diagonal Gaussian has a larger ELBO
    noise = torch.randn(100, 3)
    noise = torch.cat([noise, -noise])
    normal = dist.MultivariateNormal(torch.zeros(3), covariance)
    for factor in (0.8, 1.25):
        other = Gaussians(found.loc, factor * found.scale_tril)
        assert elbos(normal.log_prob, other, noise) < elbos(normal.log_prob, found, noise)


def test_concatenate_and_take():
    one = Gaussians(torch.zeros(1, 2), torch.eye(2)[None])
    two = Gaussians(torch.ones(2, 2), 2 * torch.eye(2).expand(2, 2, 2))
    found = concatenate([one, two])
    assert found.loc[:, 0].tolist() == [0.0, 1.0, 1.0]
    assert torch.equal(found.take([1, 2]).scale_tril, two.scale_tril)


def test_mean_field_fits_independent_gaussians():
    normal = dist.Normal(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])).to_event(1)
    found = fit_mean_field(
        normal.log_prob, torch.tensor([[0.0, 0.0], [5.0, 1.0]]), InitializationConfig()
    )
    assert torch.allclose(found.loc, torch.tensor([3.0, -1.0]), atol=0.5)
    scales = found.scale_tril.diagonal(dim1=-2, dim2=-1)
    assert ((scales / torch.tensor([0.5, 2.0])).log().abs() < 0.3).all()
    assert torch.equal(found.scale_tril, torch.diag_embed(scales))
    assert not found.loc.requires_grad


def test_mean_field_without_a_density_stays_and_harms_no_other():
    normal = dist.Normal(torch.tensor(53.0).sqrt(), 0.05, validate_args=False)

    def log_density(z):
        return normal.log_prob((z[:, 0] + 50).sqrt())

    found = fit_mean_field(log_density, torch.tensor([[-100.0], [0.0]]), InitializationConfig())
    assert found.loc[0] == -100.0
    assert abs(found.loc[1] - 3.0) < 1.0, found.loc
    assert found.scale_tril.isfinite().all()


def test_mean_field_works_without_gradients_around_it():
    with torch.no_grad():
        found = fit_mean_field(
            lambda z: -0.5 * (z**2).sum(-1), torch.full((1, 2), 3.0), InitializationConfig()
        )
    assert found.loc.abs().max() < 1.0
