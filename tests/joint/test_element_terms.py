# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The log joint density by element of a plate: it adds up, and each element has its own alone."""

import copy

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate

from pyro_artransform.joint import LogJoint, log_density_by_element
from pyro_artransform.joint.coordinates import Coordinates
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


def nested(y=Y):
    return models.nested_plates()


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


@config_enumerate
def mixture(y=Y):
    """Each element is in one of two states, whose probabilities all have in common."""
    weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.HalfNormal(1.0))
        state = pyro.sample("state", dist.Bernoulli(weight))
        pyro.sample("y", dist.Normal(z * state, 1.0), obs=y[:, 0])


@config_enumerate
def states_alone(y=Y):
    """Nothing lies outside of the plate."""
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.HalfNormal(1.0))
        state = pyro.sample("state", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z * state, 1.0), obs=y[:, 0])


def in_coordinates(log_joint):
    ones = torch.ones_like(log_joint.start)
    centered = 0.3 * ones
    mapped = log_joint.mapped_sites()
    for name, part in log_joint.latents.split(centered).items():
        if name not in mapped:
            part.fill_(1.0)
    return log_joint.with_coordinates(Coordinates(centered, 0.5 * ones, mapped))


def elements_of(log_joint, plate):
    """For each coordinate the element that it belongs to, -1 for none."""
    labels = -torch.ones_like(log_joint.start)
    for name, part in log_joint.latents.split(labels).items():
        site = log_joint.latents.sites[name]
        for frame in site.plates:
            if frame.name == plate:
                dim = len(site.batch_shape) + frame.dim
                index = torch.arange(frame.size).to(part)
                part.copy_(index.reshape(-1, *[1] * (part.dim() - dim - 1)).expand(part.shape))
    return labels


CASES = {
    "one plate": (models.one_plate, "data", "plate", False),
    "outer plate in -2": (schools, "groups", "plate", False),
    "inner plate": (schools, "rows", "plate", False),
    "coordinates": (schools, "groups", "plate", True),
    "crossed": (nested, "outer", "plate", False),
    "crossed, the other": (nested, "inner", "plate", False),
    "supports": (models.supports, "simplices", "plate", False),
    "vmap": (product, "groups", "vmap", False),
    "loop": (number, "groups", "loop", False),
    "enumerated": (mixture, "groups", "plate", False),
    "enumerated alone": (states_alone, "groups", "plate", False),
}


@pytest.mark.parametrize("name", CASES)
def test_elements_add_up_and_are_their_own(name):
    model, plate, strategy, has_coordinates = CASES[name]
    log_joint = LogJoint(model)
    log_joint = in_coordinates(log_joint) if has_coordinates else log_joint
    assert log_joint.strategy == strategy
    z = torch.randn(3, log_joint.latents.latent_dim)
    expected, labels = log_joint(z), elements_of(log_joint, plate)
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


@pytest.mark.parametrize("model", [schools, product, mixture])
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


def of_some(size, has_states):
    """One of a sub-sampled plate, with a scale of its own."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5), pyro.plate("data", size, subsample_size=5):
        z = pyro.sample("z", dist.LogNormal(loc, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5)) if has_states else 0.0
        pyro.sample("y", dist.Normal(z + k, 1.0), obs=models.data())


@pytest.mark.parametrize("has_states", [False, True])
def test_the_scale_of_a_subsampled_plate_is_taken_out(has_states):
    model = config_enumerate(of_some)
    whole, part = LogJoint(model, (5, has_states)), LogJoint(model, (50, has_states))
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
    elements, rest = log_density_by_element(
        log_joint, torch.tensor([[0.0] * 3, [9.0] * 3]), "groups"
    )
    assert elements.isnan().all(-1).tolist() == rest.isnan().tolist() == [False, True]


def test_what_has_no_elements_is_refused():
    def loop():
        for i in pyro.plate("loop", 2):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    @config_enumerate
    def coupled():
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        state = pyro.sample("state", dist.Bernoulli(0.5))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(state, 1.0), obs=models.data())

    for model, plate, words in (
        (models.one_plate, "date", r"expected one of \['data'\], got 'date'"),
        (loop, "loop", "a loop or unknown"),
        (coupled, "data", "all of them depend on"),
    ):
        log_joint = copy.copy(LogJoint(model))
        with pytest.raises(ValueError, match=words):
            log_density_by_element(log_joint, log_joint.start[None], plate)
