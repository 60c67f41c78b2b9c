# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_artransform.guides import MixtureGuide
from pyro_artransform.model import LogJoint

DIM = 2
LOCS = ((-4.0, 1.0), (4.0, -1.0))
SHARES = (0.75, 0.25)


def exact():
    """A mixture of two normals of sds 1 and 0.5."""
    parts = dist.Normal(torch.tensor(LOCS), torch.tensor([[1.0], [0.5]])).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor(SHARES)), parts)


def model():
    prior = dist.Normal(torch.zeros(DIM), 5.0).to_event(1)
    z = pyro.sample("z", prior)
    pyro.factor("likelihood", exact().log_prob(z) - prior.log_prob(z))


def at_modes(scales=(1.0, 0.5)):
    guide = MixtureGuide(model, hidden_dims=8, num_transforms=2)
    guide.set_up()
    for component, loc, scale in zip(guide.components, LOCS, scales):
        component.start_at(torch.tensor(loc), scale * torch.eye(DIM))
    return guide


def weighed(**options):
    guide = at_modes(**options)
    return guide, guide.weigh(LogJoint(model), 2000)


def test_weights_are_the_mass_of_modes():
    guide, (weights, se) = weighed()
    # the components are the modes, so that nothing is random but where draws between them belong
    assert weights == pytest.approx(torch.tensor(SHARES), abs=1e-3)
    assert torch.equal(guide.weights, weights)
    assert (se < 1e-3).all()


def test_weights_of_components_that_are_too_wide_have_standard_errors():
    _, (weights, se) = weighed(scales=(1.5, 1.0))
    assert (se > 0.002).all()
    assert (se < 0.02).all()
    assert ((weights - torch.tensor(SHARES)).abs() < 4 * se).all()


def test_draws_have_the_density_of_the_mixture():
    guide, _ = weighed()
    z, log_q = guide.rsample_and_log_prob(4000)
    assert log_q.detach() == pytest.approx(exact().log_prob(z).detach(), abs=0.01)
    assert guide.log_prob({"z": z}).detach() == pytest.approx(log_q.detach(), abs=1e-4)
    share = float((z[:, 0] > 0).double().mean())
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))


def test_draws_are_in_random_order():
    guide = at_modes()
    torch.manual_seed(0)
    right = (guide.sample_posterior(1000)["z"][:, 0] > 0).double()
    changes = (right[1:] != right[:-1]).double().mean()
    assert float(changes) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 1000))


def gradient_of_loss(draw, parameter):
    """The path gradient of the negative ELBO of draws."""
    z, log_q = draw.rsample_and_log_prob(512, path=True)
    (gradient,) = torch.autograd.grad((log_q - LogJoint(model)(z)).mean(), [parameter])
    return gradient


@pytest.mark.parametrize("is_component", [False, True])
def test_path_gradient_vanishes_where_components_are_modes(is_component):
    guide, _ = weighed()
    draw = guide.components[0] if is_component else guide
    assert (gradient_of_loss(draw, guide.transform[0].transforms[1].log_scale).abs() < 1e-3).all()
    wider, _ = weighed(scales=(1.2, 0.5))
    draw = wider.components[0] if is_component else wider
    # d/d log s of KL(N(0, s^2) | N(0, 1)) is s^2 - 1 for one component, with its weight for the mixture
    expected = (1.2**2 - 1) * (1 if is_component else float(wider.weights[0]))
    gradient = gradient_of_loss(draw, wider.transform[0].transforms[1].log_scale)
    # four standard errors of 512 squares
    assert gradient == pytest.approx(torch.full((DIM,), expected), abs=4 * (2 / 512) ** 0.5 * 0.5)


def test_a_draw_far_from_a_component_has_a_density():
    guide = at_modes(scales=(1e-3, 0.5))
    value = guide.log_prob({"z": torch.tensor([[4.0, -1.0], [1e4, 0.0]])})
    assert float(value[0].detach()) == pytest.approx(math.log(0.5 / (2 * math.pi * 0.25)), abs=1e-3)
    assert not value.isnan().any()


def test_svi_and_predictive():
    guide = at_modes(scales=(0.3, 0.3))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-2}), Trace_ELBO(32, vectorize_particles=True))
    losses = torch.tensor([svi.step() for _ in range(80)])
    assert float(losses[-20:].mean()) < float(losses[:20].mean()) - 0.3
    assert Predictive(model, guide=guide, num_samples=7)()["z"].shape == (7, DIM)


def test_errors():
    with pytest.raises(ValueError, match="num_components: expected a positive integer, got 0"):
        MixtureGuide(model, num_components=0)
    with pytest.raises(NotImplementedError, match="no transform"):
        at_modes().get_transform()
