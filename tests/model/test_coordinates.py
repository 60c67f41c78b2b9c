# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam

from pyro_artransform.model import LogJoint
from pyro_artransform.model.coordinates.centering import centered_by_curvature
from pyro_artransform.model.coordinates.coordinates import Coordinates


def hierarchy():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", 3):
        z = pyro.sample("z", dist.Normal(m, s))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.3, -1.0, 2.0]))


def in_coordinates(log_joint, centered):
    """A density with this lambda for all latents that may be mapped."""
    sites = dict.fromkeys(log_joint.mapped_sites(), True)
    centered = torch.full_like(log_joint.start, centered)
    return log_joint.with_coordinates(Coordinates(log_joint.latents, sites, centered))


def test_lambda_one_is_the_model_as_it_is_written():
    log_joint = LogJoint(hierarchy)
    x = torch.randn(4, log_joint.latents.latent_dim)
    assert torch.allclose(in_coordinates(log_joint, 1.0).to_unconstrained(x)[0], x)


@pytest.mark.parametrize("centered", [0.0, 0.4])
def test_it_is_what_pyros_reparametrizer_makes_of_a_model(centered):
    """In the neck, too, where the scale is lost beside the location, and the density would be one of zero."""
    density = in_coordinates(LogJoint(hierarchy), centered)
    expected = LogJoint(pyro.poutine.reparam(hierarchy, {"z": LocScaleReparam(centered)}))
    x = torch.randn(5, 5)
    x[-2:, 1] = torch.tensor([-60.0, -300.0])
    found, wanted = density(x), expected(x)
    assert torch.allclose(found[:3], wanted[:3])
    if not centered:
        assert torch.allclose(found, wanted)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(density(x).sum(), x)
    assert gradient[:4].isfinite().all()


def by_index():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3):
        z = pyro.sample("z", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(z[torch.tensor([0, 1, 2, 2])], 1.0).to_event(1), obs=torch.ones(4))


def by_loop():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.Normal(0.0, scale))
    pyro.sample(
        "y",
        dist.Normal(float(z.detach()), 1.0) if z < -9 else dist.Normal(z, 1.0),
        obs=torch.ones(()),
    )


@config_enumerate
def kinds_before_locations():
    """Does not broadcast, and the map of its latents comes by a discrete one."""
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    k = pyro.sample("k", dist.Categorical(probs))
    with pyro.plate("kinds", 3):
        z = pyro.sample("z", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(z[k], 1.0), obs=torch.tensor(0.3))


@pytest.mark.parametrize("model", [by_index, by_loop, kinds_before_locations])
def test_many_draws_are_evaluated_as_single_ones(model):
    log_joint = LogJoint(model)
    density = in_coordinates(log_joint, 0.3)
    x = torch.randn(4, log_joint.latents.latent_dim)
    u, ladj = density.to_unconstrained(x)
    assert torch.allclose(density(x), log_joint(u) + ladj)
    single = torch.cat([density(row[None]) for row in x])
    assert torch.allclose(density(x), single)


def test_a_draw_that_the_model_cannot_take_is_not_a_number():

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        if (scale > 100).any():
            raise ValueError("expected a small scale")
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(()))

    density = in_coordinates(LogJoint(model), 0.3)
    x = torch.tensor([[0.1, 0.2], [9.0, 0.2]])
    assert density(x).isnan().tolist() == [False, True]
    assert density.to_unconstrained(x)[0].isnan().all(-1).tolist() == [False, True]


def test_the_map_needs_neither_data_nor_what_follows_its_latents():
    runs = []

    def model():
        by_index()
        runs.append(1)

    density = in_coordinates(LogJoint(model), 0.0)
    assert density.strategy == "vmap"
    runs.clear()
    density.to_unconstrained(torch.randn(3, 4))
    assert not runs


def test_lambda_by_curvature_weighs_the_data_against_the_prior():
    """Of h = scale^2 / sigma^2 for normal data, whatever the point."""
    sigma = torch.tensor([0.01, 1.0, 100.0])

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 3):
            pyro.sample(
                "y", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), sigma), obs=sigma
            )

    density = in_coordinates(LogJoint(model), 0.0)
    x = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    x[:, 0] = torch.tensor(2.0).log()
    h = 4 / sigma**2
    expected = torch.where(h > 19, 1.0, h / (1 + h))
    assert torch.allclose(centered_by_curvature(density, x)[1:], expected, atol=1e-5)
    assert centered_by_curvature(density, x)[0] == 1
