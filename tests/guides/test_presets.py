# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import nn

from pyro_artransform.flows.conditioners import MaskedMLP, TiltedSiLU
from pyro_artransform.flows.univariate import RationalQuadraticSpline
from pyro_artransform.guides import AutoIAF, AutoMAF
from tests.guides import models

both = pytest.mark.parametrize("kind", [AutoIAF, AutoMAF])


@both
def test_arguments_reach_the_flow(kind):
    options = {"hidden_dims": [7, 5], "nonlinearity": nn.Tanh(), "skip_connections": True}
    guide = kind(models.gaussian, num_transforms=2, **options)
    guide(models.data())
    networks = [m for m in guide.modules() if isinstance(m, MaskedMLP)]
    assert len(networks) == 2
    for network in networks:
        assert network.hidden_dims == (7, 5)
        assert isinstance(network.nonlinearity, nn.Tanh)
        assert network.skip is not None
    assert networks[0].order.tolist() != networks[1].order.tolist()


@both
def test_full_rank_by_default_where_it_is_cheap(kind):
    for size, full_rank, expected in ((200, None, True), (201, None, False), (201, True, True)):
        model = partial(pyro.sample, "z", dist.Normal(torch.zeros(size), 1).to_event(1))
        guide = kind(model, num_transforms=1, hidden_dims=4, full_rank=full_rank)
        guide()
        assert (guide.transform.transforms[1].lower is not None) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_transforms": 0}, ValueError, "num_transforms: expected a positive integer, got 0"),
        ({"hidden_dims": [8, 0]}, ValueError, "hidden_dims: expected"),
        ({"nonlinearity": "tanh"}, TypeError, "nonlinearity: expected a function or a module"),
        ({"skip_connections": "no"}, ValueError, "skip_connections: expected True or False, got"),
        ({"hidden_dim": 8}, TypeError, "unexpected keyword argument 'hidden_dim'"),
    ],
)
@both
def test_bad_arguments_at_construction(kind, options, error, message):
    with pytest.raises(error, match=message.format(kind.__name__)):
        kind(models.regression, **options)


@pytest.mark.parametrize(
    ("kind", "dim", "width", "nonlinearity"),
    [
        (AutoIAF, 16, (128,), nn.SiLU),
        (AutoIAF, 120, (360,), TiltedSiLU),
        (AutoMAF, 40, (80, 80), nn.ELU),
    ],
)
def test_networks_grow_with_the_latents(kind, dim, width, nonlinearity):
    guide = kind(lambda: pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1)))
    guide()
    networks = [module for module in guide.modules() if isinstance(module, MaskedMLP)]
    assert [network.hidden_dims for network in networks] == [width] * 3
    assert all(type(network.nonlinearity) is nonlinearity for network in networks)


@pytest.mark.slow
def test_bends_in_one_dimension():
    """Affine layers of one coordinate are a Gaussian together: the skewed target tells.

    The best Gaussian on the unconstrained space, of location -1/2 and scale 1, is 0.081 nats short;
    the Monte Carlo error of the ELBO below is 0.002.
    """

    def model():
        pyro.sample("x", dist.Exponential(torch.ones(())))

    guide = AutoIAF(model, num_transforms=2, hidden_dims=8)
    optimizer = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.99}
    optim = pyro.optim.ExponentialLR(optimizer)
    svi = SVI(model, guide, optim, Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=0))
    for _ in range(350):
        svi.step()
        optim.step()
    with torch.no_grad():
        z, log_q = guide.rsample_and_log_prob(20_000)
    log_p = z[:, 0] - z[:, 0].exp()
    assert -0.04 < (log_p - log_q).mean() < 0.008
    splines = [m for m in guide.modules() if isinstance(m, RationalQuadraticSpline)]
    assert len(splines) == 2
    other = AutoMAF(model, num_transforms=2, hidden_dims=8)
    other()
    other.load_state_dict(guide.state_dict())


def stays_finite(model, guide, elbo, steps):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    assert all(math.isfinite(svi.step()) for _ in range(steps))
    assert all(parameter.isfinite().all() for parameter in guide.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_plain_svi_stays_finite_in_float32(seed):
    """One particle and Adam at 1e-2, on a simplex, a scale and a location; shortened."""
    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(seed)

    def model():
        probs = pyro.sample("probs", dist.Dirichlet(torch.tensor([0.5, 2.0, 10.0])))
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(()), 10.0))
        pyro.sample("obs", dist.Normal(loc * probs[0], scale), obs=torch.tensor(3.0))

    guide = AutoIAF(model)
    stays_finite(model, guide, Trace_ELBO(), 40)
    assert {value.dtype for value in guide().values()} == {torch.float32}


@both
def test_no_draw_goes_far(kind):
    """However far the layers send it: three of them multiply their scales."""
    guide = kind(models.regression)
    guide(models.data())
    flow = guide.transform.transforms[0]
    draws = flow(torch.full((1, guide.latent_dim), 1e6))
    assert draws.max() < 150
    assert torch.equal(flow(draws / 100), draws / 100)


def test_plain_svi_with_the_bound_of_renyi_stays_finite_in_float32():
    """The weight of a far draw is zero, so nothing calls it back; seed 8 ended in NaN after 44 steps."""
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float32)
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float32)

    def schools():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, errors), obs=effects)

    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(8)
    elbo = RenyiELBO(num_particles=8, vectorize_particles=True)
    stays_finite(schools, AutoIAF(schools), elbo, 60)
