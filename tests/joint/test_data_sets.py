# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.joint import LogJoint, log_density_by_element
from pyro_artransform.joint.data_sets import over_data_sets


def schools(sigma, y=None):
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
    many = over_data_sets(schools, {"y": data})
    log_joint = LogJoint(many, (sigma,), {"y": torch.zeros(4).double()})
    shapes = {name: tuple(site.shape) for name, site in log_joint.latents.sites.items()}
    assert shapes == {"mu": (6, 1), "tau": (6, 1), "shares": (6, 1, 3), "theta": (6, 4)}
    z = torch.randn(5, log_joint.latents.latent_dim, dtype=torch.float64)
    by_element, rest = log_density_by_element(log_joint, z, "data_sets")
    assert (rest == 0).all()
    elements = log_joint.latents.elements_of(log_joint.plates["data_sets"])
    for k in range(6):
        alone = LogJoint(schools, (sigma, data[k]))
        assert torch.allclose(by_element[:, k], alone(z[:, elements == k]), atol=1e-6)


@pytest.mark.parametrize("model", [indexed, mixing])
def test_what_mixes_data_sets_is_refused(model):
    with pytest.raises(ValueError, match="takes data sets in a plate to the left of its own"):
        over_data_sets(model, {"y": torch.randn(4)})()


def test_data_without_a_site_or_of_several_numbers_are_refused():
    with pytest.raises(ValueError, match="as many data sets of each site"):
        over_data_sets(schools, {"y": torch.zeros(3, 4), "x": torch.zeros(2)})
    with pytest.raises(ValueError, match="data: expected sites of"):
        over_data_sets(schools, {"x": torch.zeros(3)})(1.0)
