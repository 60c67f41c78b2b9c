# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import torch
from pyro import distributions as dist

from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import State, TransformedDensity


def test_density_in_the_base_space_of_a_transform():
    """By the change of variables: a transform to the posterior gives a standard normal."""
    log_joint = LogJoint(lambda: pyro.sample("z", dist.LogNormal(1.0, 0.5)))
    target = TransformedDensity(
        log_joint, lambda x: (1 + 0.5 * x, math.log(0.5) * torch.ones(len(x)))
    )
    x = torch.linspace(-2, 2, 5)[:, None]
    state = target(x)
    assert torch.allclose(state.log_density, dist.Normal(0.0, 1.0).log_prob(x)[:, 0])
    assert torch.allclose(state.gradient, -x)
    assert torch.allclose(state.latent, 1 + 0.5 * x)
    assert not state.latent.requires_grad
    # its own coordinates by default
    assert torch.equal(TransformedDensity(log_joint)(x[:2]).latent, x[:2])
    target(x[:2])
    assert target.num_gradients == 7


def test_states_of_chains():
    one, other = (
        State(torch.full((3, 2), v), torch.full((3, 2), v), torch.full((3,), v), torch.ones(3, 2))
        for v in (1.0, 2.0)
    )
    one.gradient[2, 1] = torch.nan
    assert one.is_finite.tolist() == [True, True, False]
    mixed = one.where(torch.tensor([True, False, False]), other)
    assert mixed.base[:, 0].tolist() == mixed.log_density.tolist() == [1.0, 2.0, 2.0]
    assert State.cat([one, other]).at(torch.tensor([3, 0])).latent[:, 1].tolist() == [2.0, 1.0]
