# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch
from pyro import distributions as dist

from pyro_artransform.inference.initialization.mean_field import mean_field


def test_fits_independent_gaussians():
    law = dist.Normal(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])).to_event(1)
    found = mean_field(law.log_prob, torch.tensor([[0.0, 0.0], [5.0, 1.0]]))
    assert torch.allclose(found.loc, torch.tensor([3.0, -1.0]), atol=0.5)
    scales = found.scale_tril.diagonal(dim1=-2, dim2=-1)
    assert ((scales / torch.tensor([0.5, 2.0])).log().abs() < 0.3).all()
    assert torch.equal(found.scale_tril, torch.diag_embed(scales))
    assert not found.loc.requires_grad


def test_start_without_a_density_stays_and_harms_no_other():
    law = dist.Normal(torch.tensor(53.0).sqrt(), 0.05, validate_args=False)

    def log_density(z):
        return law.log_prob((z[:, 0] + 50).sqrt())

    found = mean_field(log_density, torch.tensor([[-100.0], [0.0]]))
    assert found.loc[0] == -100.0
    assert abs(found.loc[1] - 3.0) < 1.0, found.loc
    assert found.scale_tril.isfinite().all()


def test_works_without_gradients_around_it():
    with torch.no_grad():
        found = mean_field(lambda z: -0.5 * (z**2).sum(-1), torch.full((1, 2), 3.0))
    assert found.loc.abs().max() < 1.0
