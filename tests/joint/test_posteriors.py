# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The log joint density by element of a plate adds up, and each element has its own, as posteriors."""

import copy

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate

from pyro_artransform import AutoIAF, AutoStructuredFlow
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.joint import LogJoint, log_density_by_element
from pyro_artransform.joint.coordinates import Coordinates
from pyro_artransform.joint.posteriors import Posteriors, over_data_sets
from pyro_artransform.testing import redraw
from tests.joint import models

Y = torch.linspace(-1.0, 3.0, 8, dtype=torch.float64).reshape(4, 2)


def schools(y=Y):
    """Groups in the dimension -2 that have vectors of latents, a scale each, and rows of data."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    with pyro.plate("groups", len(y), dim=-2):
        width = pyro.sample("width", dist.LogNormal(0.0, tau))
        pairs = dist.Normal(loc[..., None], tau[..., None] * torch.ones(2)).to_event(1)
        z = pyro.sample("z", pairs)
        with pyro.plate("rows", y.shape[1], dim=-1):
            theta = pyro.sample("theta", dist.Normal(z.sum(-1), width))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def product(y=Y):
    """A matrix-vector product takes no draws on the left, so that there is vmap alone."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(y @ beta, z), obs=y[:, 0])


def number(y=Y):
    """Another Python number for each draw, so that there is the loop alone."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.HalfNormal(1.0))
        scale = 1 + float(loc.detach()) ** 2
        pyro.sample("y", dist.Normal(z, scale).expand([len(y)]), obs=y[:, 0])


def in_coordinates(log_joint):
    ones = torch.ones_like(log_joint.start)
    centered = 0.3 * ones
    mapped = log_joint.mapped_sites()
    for name, part in log_joint.latents.split(centered).items():
        if name not in mapped:
            part.fill_(1.0)
    return log_joint.with_coordinates(Coordinates(centered, 0.5 * ones, mapped))


CASES = {
    "one plate": (models.one_plate, "data", "plate", False),
    "outer plate in -2": (schools, "groups", "plate", False),
    "inner plate": (schools, "rows", "plate", False),
    "coordinates": (schools, "groups", "plate", True),
    "crossed": (models.nested_plates, "outer", "plate", False),
    "crossed, the other": (models.nested_plates, "inner", "plate", False),
    "supports": (models.supports, "simplices", "plate", False),
    "vmap": (product, "groups", "vmap", False),
    "loop": (number, "groups", "loop", False),
}


@pytest.mark.parametrize("name", CASES)
def test_elements_add_up_and_are_their_own(name):
    model, plate, strategy, has_coordinates = CASES[name]
    log_joint = LogJoint(model)
    log_joint = in_coordinates(log_joint) if has_coordinates else log_joint
    assert log_joint.strategy == strategy
    z = torch.randn(3, log_joint.latents.latent_dim)
    expected = log_joint(z)
    labels = log_joint.latents.elements_of(log_joint.plates[plate])
    for slower in dict.fromkeys((strategy, "vmap", "loop")):
        if slower == "vmap" and strategy == "loop":
            continue
        log_joint.strategy = slower
        elements, rest = log_density_by_element(log_joint, z, plate)
        assert elements.shape == (3, log_joint.plates[plate].size)
        assert torch.allclose(elements.sum(-1) + rest, expected, rtol=1e-12)
        for i in range(elements.shape[1]):
            moved = z + 0.3 * (labels == i)
            after = log_density_by_element(log_joint, moved, plate)[0]
            changes = (after - elements).abs() > 1e-9
            assert (changes.any(0) == (torch.arange(elements.shape[1]) == i)).all()


@pytest.mark.parametrize("model", [schools, product])
def test_other_data_of_an_element_change_it_alone(model):
    log_joint = LogJoint(model, (Y,))
    other = Y.clone()
    other[2] += 1
    z = torch.randn(3, log_joint.latents.latent_dim)
    elements, rest = log_density_by_element(log_joint, z, "groups")
    moved, rest_moved = log_density_by_element(log_joint.with_arguments((other,)), z, "groups")
    is_changed = ((moved - elements).abs() > 1e-9).all(0)
    assert is_changed.tolist() == [False, False, True, False]
    assert torch.equal(rest, rest_moved)


def of_some(size):
    """One of a sub-sampled plate, with a scale of its own."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5), pyro.plate("data", size, subsample_size=5):
        z = pyro.sample("z", dist.LogNormal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=models.data())


def test_the_scale_of_a_subsampled_plate_is_taken_out():
    whole, part = LogJoint(of_some, (5,)), LogJoint(of_some, (50,))
    z = torch.randn(3, whole.latents.latent_dim)
    expected, found = (log_density_by_element(each, z, "data") for each in (whole, part))
    assert torch.allclose(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_draws_that_the_model_cannot_take_are_nan():
    def model():
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if (z > 5).any():
                raise ValueError("too large")

    log_joint = LogJoint(model)
    z = torch.tensor([[0.0] * 3, [9.0] * 3])
    elements, rest = log_density_by_element(log_joint, z, "groups")
    assert elements.isnan().all(-1).tolist() == rest.isnan().tolist() == [False, True]


def test_what_has_no_elements_is_refused():
    def loop():
        for i in pyro.plate("loop", 2):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    @config_enumerate
    def with_states():
        with pyro.plate("data", 5):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            state = pyro.sample("state", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(loc + state, 1.0), obs=models.data())

    for model, plate, words in (
        (models.one_plate, "date", r"expected one of \['data'\], got 'date'"),
        (loop, "loop", "a loop or unknown"),
        (with_states, "data", "without discrete latents that are summed out"),
    ):
        log_joint = copy.copy(LogJoint(model))
        with pytest.raises(ValueError, match=words):
            log_density_by_element(log_joint, log_joint.start[None], plate)


# Posteriors, one for each element

SETS = torch.tensor([[0.3, -1.2, 2.2], [0.9, 1.6, -0.3], [0.8, 1.9, 0.1], [2.0, 2.1, 1.4]]).double()


def many(y):
    with pyro.plate("sets", len(y), dim=-2):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(y.new_ones(())))
        with pyro.plate("groups", y.shape[-1], dim=-1):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def shared(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
    with pyro.plate("sets", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, 0])


def coupled(y):
    with pyro.plate("sets", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
    pyro.factor("steps", -(z[..., 1:] - z[..., :-1]).square().sum(-1))


@config_enumerate
def with_states(y):
    with pyro.plate("sets", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        state = pyro.sample("state", dist.Bernoulli(y.new_tensor(0.5)))
        pyro.sample("y", dist.Normal(z + state, 1.0), obs=y[:, 0])


def set_up(model, kind=AutoStructuredFlow, **options):
    guide = kind(model, **options)
    guide.set_up(SETS)
    return ModelAndGuide.of(model, guide, (SETS,), {})


@pytest.mark.parametrize("coordinates", ["model", "prior"])
def test_weights_of_each_are_those_of_its_own_latents_and_data(coordinates):
    subject = set_up(many, coordinates=coordinates)
    redraw(subject.guide._parts[0], 0.5)
    found = Posteriors.of(subject.log_joint, subject.guide)
    assert (found.plate, found.size) == ("sets", 4)
    state = torch.get_rng_state()
    z, weights, rest = found.log_weights(50)
    torch.set_rng_state(state)
    same, log_q = subject.guide.rsample_and_log_prob(50)
    assert torch.allclose(z, same)
    assert torch.allclose(weights.sum(1) + rest, subject.log_joint(z) - log_q)
    # of another one's parameters nothing is seen
    _, affine = subject.guide._parts
    with torch.no_grad():
        affine.log_scale[found.elements == 2] += 0.3
    torch.set_rng_state(state)
    changed = (found.log_weights(50)[1] - weights).abs().amax(0) > 1e-9
    assert changed.tolist() == [False, False, True, False]


def test_log_determinants_of_each_are_those_of_blocks_of_the_jacobian():
    guide = redraw(set_up(many, num_transforms=2).guide, 0.5)
    flow, elements = guide._parts[0], torch.tensor([0, 1, 2, 3] * 2 + [k // 3 for k in range(12)])
    x = torch.randn(20).double()
    jacobian = torch.func.jacrev(lambda x: flow(x[None])[0])(x)
    y, terms = flow.call_and_ladj_by_coordinate(x[None])
    assert torch.allclose(y, flow(x[None]))
    for k in range(4):
        block = jacobian[elements == k][:, elements == k]
        assert torch.allclose(torch.linalg.slogdet(block)[1], terms[0, elements == k].sum())


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (shared, AutoStructuredFlow),
        (coupled, AutoStructuredFlow),
        (with_states, AutoStructuredFlow),
        (many, AutoIAF),
    ],
)
def test_there_are_not_many_where_latents_are_shared_or_no_graph_says_so(model, kind):
    subject = set_up(model, kind)
    assert Posteriors.of(subject.log_joint, subject.guide) is None


# Data sets, each with latents of its own


def of_schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("schools", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        loc = pyro.deterministic("loc", theta + shares[..., 0])
        return pyro.sample("y", dist.Normal(loc, sigma), obs=y)


def indexed(y=None):
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[0], 1.0), obs=y)


def mixing(y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.mean(), 1.0), obs=y)


def test_densities_are_those_of_each_data_set_alone():
    data, sigma = torch.randn(6, 4).double(), torch.tensor(2.0).double()
    many = over_data_sets(of_schools, {"y": data})
    log_joint = LogJoint(many, (sigma,), {"y": torch.zeros(4).double()})
    shapes = {name: tuple(site.shape) for name, site in log_joint.latents.sites.items()}
    assert shapes == {"mu": (6, 1), "tau": (6, 1), "shares": (6, 1, 3), "theta": (6, 4)}
    z = torch.randn(5, log_joint.latents.latent_dim, dtype=torch.float64)
    by_element, rest = log_density_by_element(log_joint, z, "data_sets")
    assert (rest == 0).all()
    elements = log_joint.latents.elements_of(log_joint.plates["data_sets"])
    for k in range(6):
        alone = LogJoint(of_schools, (sigma, data[k]))
        assert torch.allclose(by_element[:, k], alone(z[:, elements == k]), atol=1e-6)


@pytest.mark.parametrize("model", [indexed, mixing])
def test_what_mixes_data_sets_is_refused(model):
    with pytest.raises(ValueError, match="takes data sets in a plate to the left of its own"):
        over_data_sets(model, {"y": torch.randn(4)})()


def test_data_without_a_site_or_of_several_numbers_are_refused():
    with pytest.raises(ValueError, match="as many data sets of each site"):
        over_data_sets(of_schools, {"y": torch.zeros(3, 4), "x": torch.zeros(2)})
    with pytest.raises(ValueError, match="data: expected sites of"):
        over_data_sets(of_schools, {"x": torch.zeros(3)})(1.0)
