# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Amortized guides in coordinates from the model's prior."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, config_enumerate

from pyro_artransform import AutoAmortized
from pyro_artransform.diagnostics import importance
from pyro_artransform.inference.initialization.start import minibatch_density
from pyro_artransform.model import LogJoint
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import Encoder, data, redraw, traces
from tests.guides.training import particles_agree

SIZE = 12
X = torch.linspace(-1.0, 1.0, SIZE).double().cos()


def hierarchy(y, size=5, noise=1.0):
    """Scales that depend on others, priors with covariates, a local with a local parent, nested plates."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(y.new_ones(())))
    slopes = pyro.sample("slopes", dist.Normal(y.new_zeros(2), scale[..., None]).to_event(1))
    with pyro.plate("inner", 3, dim=-2) as cell, pyro.plate("groups", SIZE, size, dim=-1) as index:
        local = pyro.sample("local", dist.LogNormal(mean + slopes[..., 0] * X[index], scale))
        child = pyro.sample("child", dist.Normal(local.log() + cell[:, None], scale))
        pyro.sample("y", dist.Normal(child, noise), obs=y[index].expand(3, -1))


def by_arguments(y, x, index=None):
    """A mini-batch in the arguments, the covariates of priors included."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("groups", SIZE, None if index is not None else len(y), subsample=index):
        z = pyro.sample("z", dist.Normal(mean + x, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def set_up(model, *args, **options):
    guide = AutoAmortized(model, **options)
    guide(*args)
    return redraw(guide)


def encode(y):
    """Features of each element of the nested plates."""
    return y.expand(3, -1)[..., None]


@pytest.mark.parametrize("encoder", [None, encode], ids=["embeddings", "encoder"])
def test_draws_and_densities_are_of_the_sites(encoder):
    guide = set_up(lambda y: hierarchy(y, SIZE), data(), encoder=encoder)
    assert list(guide.prior_coordinates.with_location) == ["scale", "slopes", "local", "child"]
    trace, _ = traces(guide.model, guide, data())
    names = ("mean", "scale", "slopes", "local", "child")
    values = {name: trace.nodes[name]["value"][None].detach() for name in names}
    assert torch.allclose(guide.log_prob(values, data())[0], trace.log_prob_sum())
    # a plate that takes parts of 5, and pads the last one
    expected = guide.log_prob(draws := guide.sample_posterior(3, data()), data())
    in_parts = set_up(hierarchy, data(), encoder=encoder)
    in_parts.load_state_dict(guide.state_dict())
    assert torch.allclose(in_parts.log_prob(draws, data()), expected)
    again = in_parts.sample_posterior(2000, data())
    draws = guide.sample_posterior(2000, data())
    for name in ("slopes", "child"):
        one, other = (found[name].double().arctan().mean(0) for found in (draws, again))
        assert torch.allclose(one, other, atol=5 * (2 / 2000) ** 0.5)  # five standard errors


@pytest.mark.parametrize("encoder", [None, encode], ids=["embeddings", "encoder"])
def test_particles_at_once_and_one_by_one_have_the_same_mean(encoder):
    particles_agree(hierarchy, set_up(hierarchy, data(), encoder=encoder), data())


def test_the_exact_posterior_has_equal_weights():
    """In units of the prior, z = mean + x: given the mean, x is Normal(4 (y - mean) / 5, 1 / 5)."""
    y = data()
    options = {"flow": None, "local_flow": None, "coordinates": {"z": 0.0}}
    guide = AutoAmortized(hierarchies.groups, **options)
    guide(y)
    precision = 1 / 9 + 12 / 1.25
    mean, scale = y.sum() / 1.25 / precision, precision**-0.5
    with torch.no_grad():
        local, globals_ = guide.transform.locals[0], guide.transform.globals
        globals_.transform.parts[-1].set_(mean.reshape(1), torch.tensor([[scale]]))
        local.affine.log_scale.fill_(-0.5 * math.log(5.0))
        local.affine.loc.fill_(-0.8 * mean)
        local.affine.linear.weight[0, -1] = -0.8 * scale * math.sqrt(12)
        local.table[:, -2] = 0.8 * y
    covariance = 1.25 * torch.eye(12) + 9
    evidence = dist.MultivariateNormal(torch.zeros(12).double(), covariance.double()).log_prob(y)
    found = importance(hierarchies.groups, guide, 200, y)
    assert abs(found.elbo - evidence) < 1e-8
    assert found.elbo_se < 1e-8

    def largest_gradient(**options):
        loss = Trace_ELBO(**options).differentiable_loss(hierarchies.groups, guide, y)
        parameters = [p for p in guide.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return max(gradient.abs().max() for gradient in gradients if gradient is not None)

    at_once = {"num_particles": 5, "vectorize_particles": True, "max_plate_nesting": 2}
    with guide.path_gradient():
        for options in ({}, {"num_particles": 3}, at_once):
            assert largest_gradient(**options) < 1e-10
    assert largest_gradient() > 0.1


def test_mini_batches_as_arguments():
    y, index = data(), torch.tensor([7, 1, 3])
    # an encoder: the arguments say which elements there are
    guide = set_up(by_arguments, y[:3], X[:3], encoder=Encoder())
    assert guide.sample_posterior(4, y, X)["z"].shape == (4, SIZE)
    assert guide.sample_posterior(4, y[:5], X[:5])["z"].shape == (4, 5)

    def plates(y, x, index):
        return pyro.plate("groups", SIZE, subsample=index)

    guide = set_up(by_arguments, y[index], X[index], index, create_plates=plates)
    assert guide(y[index], X[index], index)["z"].shape == (3,)
    with pytest.raises(ValueError, match=r"all 12 elements.*mini-batch of 3.*coordinates='model'"):
        guide.sample_posterior(4)
    assert guide.sample_posterior(4, y, X, torch.arange(SIZE))["z"].shape == (4, SIZE)
    # where priors are the same for all elements, any mini-batch has what the map needs
    same = guide.sample_posterior(4, y[:5], torch.zeros(5), torch.arange(5))
    density = guide.log_prob(same, y, torch.zeros(SIZE), torch.arange(SIZE))
    assert torch.allclose(guide.log_prob(same, y[:5], torch.zeros(5), torch.arange(5)), density)


def test_lambda_is_by_the_data_or_as_asked_for():
    for noise, least, most in ((10.0, 0.0, 0.1), (0.01, 0.9, 1.0)):
        guide = AutoAmortized(lambda y, noise=noise: hierarchy(y, noise=noise))
        guide(data())
        child = guide.prior_coordinates.centered[-1]
        pyro.clear_param_store()
        assert least <= child <= most
    guide = set_up(hierarchy, data(), coordinates={"local": 0.25})
    assert list(guide.prior_coordinates.with_location) == ["local"]
    assert not guide.chooses_coordinates
    for model, coordinates in ((hierarchy, "model"), (hierarchies.standard, "prior")):
        guide = AutoAmortized(model, coordinates=coordinates)
        guide(*[data()][: model is hierarchy])
        assert guide.prior_coordinates is None
        assert "coordinates" not in "".join(guide.state_dict())


def test_latents_that_depend_on_hidden_ones_have_no_map():
    """In a guide for a part of a model their priors are other ones in each run."""
    guide = set_up(poutine.block(hierarchy, hide=["mean"]), data())
    assert list(guide.prior_coordinates.with_location) == ["scale", "slopes", "child"]


def test_the_density_of_a_mini_batch_in_coordinates():
    """It is the same density in all coordinates: the Jacobian of these counts once."""
    guide = set_up(hierarchy, data())
    log_joint = LogJoint(poutine.condition(hierarchy, {"groups": torch.arange(5)}), (data(),))
    density = minibatch_density(log_joint, 5 / SIZE, ["mean", "scale", "slopes"])
    coordinates = guide.coordinates.for_elements(log_joint.latents)
    mapped = density.with_coordinates(coordinates)
    x = 0.3 * torch.randn(6, log_joint.latents.latent_dim).double()
    u, ladj = mapped.to_unconstrained(x)
    assert torch.allclose(mapped(x), density(u) + ladj)


def test_a_discrete_latent_comes_before_the_mapped_ones():
    @config_enumerate
    def model():
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(2)))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        kind = pyro.sample("kind", dist.Categorical(probs))
        with pyro.plate("groups", SIZE):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(locs[kind] + z, 1.0), obs=X)

    guide = set_up(model)
    assert list(guide.prior_coordinates.with_location) == ["scale", "z"]
    trace, _ = traces(guide.model, guide)
    names = ("locs", "probs", "scale", "z")
    values = {name: trace.nodes[name]["value"][None].detach() for name in names}
    assert torch.allclose(guide.log_prob(values)[0], trace.log_prob_sum())
