# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch
from pyro import distributions as dist

from pyro_artransform.inference.initialization.gaussians import Gaussians, elbos, evaluated
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


def test_evaluated():
    z = torch.randn(3, 2000, 2)
    found = evaluated(lambda z: z.sum(-1).log(), z)
    assert found.shape == (3, 2000)
    assert not found.isnan().any()
    assert torch.equal(found == -torch.inf, z.sum(-1) <= 0)
    infinite = evaluated(lambda z: torch.full_like(z[:, 0], torch.inf), z)
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
    law = dist.MultivariateNormal(torch.zeros(3), covariance)
    for factor in (0.8, 1.25):
        other = Gaussians(found.loc, factor * found.scale_tril)
        assert elbos(law.log_prob, other, noise) < elbos(law.log_prob, found, noise)
