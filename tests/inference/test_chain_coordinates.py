# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The coordinates in which chains move."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoAmortized, AutoIAF, AutoStructuredFlow
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import StopReason
from pyro_artransform.sampling.run_mcmc import from_nothing


@pytest.mark.parametrize("make", [AutoIAF, AutoStructuredFlow, AutoAmortized])
def test_chains_keep_the_coordinates_of_the_model_where_the_user_wants_them(make):
    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("elements", 8):
            pyro.sample("z", dist.Normal(torch.zeros(8), v.exp()))

    def coordinates_of(guide):
        return from_nothing(
            ModelAndGuide.of(model, guide, (), {}).log_joint, 100
        ).log_joint.coordinates

    guide = make(model, coordinates="model")
    guide()
    assert coordinates_of(guide) is None
    assert coordinates_of(make(model)) is not None


def test_a_funnel_without_data_is_in_units_of_the_prior():
    """The scale of z is exp(v), and of v one datum tells."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("z", dist.Normal(torch.zeros(8), v.exp()[..., None]).to_event(1))
        pyro.sample("y", dist.Normal(v, 2.0), obs=torch.tensor(-3.0))

    found = from_nothing(LogJoint(model), 400)
    assert found.run(400).is_enough(400)
    assert found.end is StopReason.ENOUGH
    assert found.log_joint.coordinates.centered[1:].max() < 0.1
    v, precision = found.draws[..., 0], 1 / 9 + 1 / 4
    # 400 effective draws: 0.05 sd, and 4 % of an sd; three of each
    assert abs(v.mean() + 0.75 / precision) < 0.15 / precision**0.5
    assert abs(v.std() * precision**0.5 - 1) < 0.12


def test_groups_with_much_data_are_sampled_as_written():
    """A hierarchy of 20 groups of which each is known to 1 % of their sd."""
    y = torch.linspace(-2.0, 2.0, 20)

    def model():
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", 20):
            z = pyro.sample("z", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(z, 0.01), obs=y)

    found = from_nothing(LogJoint(model), 400)
    assert found.run(400).is_enough(400)
    assert found.end is StopReason.ENOUGH
    assert found.log_joint.coordinates is None
    tau = torch.linspace(0.3, 6.0, 4001)
    width = (tau.square() + 1e-4).sqrt()[:, None]
    mass = dist.HalfNormal(2.0).log_prob(tau) + dist.Normal(0.0, width).log_prob(y).sum(-1)
    weights = mass.softmax(0)
    mean = weights @ tau
    sd = (weights @ (tau - mean).square()).sqrt()
    draws = found.draws[..., 0].exp()
    assert abs(draws.mean() - mean) < 0.25 * sd
    assert abs(draws.std() / sd - 1) < 0.18
