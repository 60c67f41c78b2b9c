# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of the cases: at the top level of a module, so that a guide of one can be pickled."""

from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro import distributions as dist

DATA = (1.3, 0.2, 2.9, -0.4, 1.7, 0.8, 3.1, 1.1)


def regression():
    """A location and a positive scale, given eight numbers; two latent dimensions, bent."""
    data = torch.tensor(DATA)
    loc = pyro.sample("loc", dist.Normal(torch.zeros(()), torch.full((), 3.0)))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), torch.ones(())))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(loc, scale), obs=data)


def regression_on(data):
    """The same with the data as an argument."""
    loc = pyro.sample("loc", dist.Normal(data.new_zeros(()), data.new_full((), 3.0)))
    scale = pyro.sample("scale", dist.LogNormal(data.new_zeros(()), data.new_ones(())))
    with pyro.plate("data", len(data)):
        return pyro.sample("obs", dist.Normal(loc, scale), obs=data)


def predictive_on(data, observed=None):
    """The same with what is observed apart from what it is observed at."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(()), torch.full((), 3.0)))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), torch.ones(())))
    with pyro.plate("data", len(data)):
        return pyro.sample("obs", dist.Normal(slope * data, scale), obs=observed)


def locals_on(data):
    """One latent for each datum."""
    loc = pyro.sample("loc", dist.Normal(data.new_zeros(()), data.new_full((), 3.0)))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(loc, data.new_ones(())))
        return pyro.sample("obs", dist.Normal(z, data.new_ones(())), obs=data)


def far_target():
    """Far from zero, and nothing else is hard about it."""
    pyro.sample("z", dist.Normal(torch.full((2,), -300.0), torch.ones(2)).to_event(1))


def wide_prior():
    """Two dimensions, one of them positive, for starting values."""
    pyro.sample("z", dist.Normal(torch.zeros(()), torch.full((), 10.0)))
    pyro.sample("s", dist.LogNormal(torch.zeros(()), torch.full((), 10.0)))


def subsampled():
    """Local latents in a plate that is sub-sampled, and no data."""
    with pyro.plate("items", 20, subsample_size=5):
        pyro.sample("z", dist.Normal(torch.zeros(()), torch.ones(())))


def dynamic_support():
    """The support of one latent depends on another one."""
    upper = pyro.sample("upper", dist.LogNormal(torch.zeros(()), torch.ones(())))
    inner = pyro.sample("inner", dist.Uniform(torch.zeros(()), upper))
    pyro.sample("obs", dist.Normal(inner, 0.1), obs=torch.full((), 0.7))


def standard():
    """A standard Normal, which is its own posterior."""
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


# Posteriors that are known: of log evidence 0, with exact draws


class Target(NamedTuple):
    """A model and exact draws of its posterior."""

    model: Callable
    draws: Callable[[int], torch.Tensor]


def anywhere(site):
    """A starting value for a flat prior."""
    return torch.zeros(site["fn"].shape())


def _flat(log_density, draws):
    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        pyro.factor("target", log_density(z))

    return Target(model, draws)


def _correlated():
    distribution = dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    return _flat(distribution.log_prob, lambda n: distribution.sample((n,)))


def _bent(bend):
    """The second coordinate given the first: ``bend`` is its location and scale."""

    def log_density(z):
        below = dist.Normal(*bend(z[..., 0])).log_prob(z[..., 1])
        return dist.Normal(0.0, 1.5).log_prob(z[..., 0]) + below

    def draws(n):
        first = 1.5 * torch.randn(n)
        return torch.stack([first, dist.Normal(*bend(first)).sample()], -1)

    return _flat(log_density, draws)


def _two_modes(apart, weight):
    locs = torch.tensor([[-apart / 2, 0.0], [apart / 2, 0.0]])

    def log_density(z):
        parts = dist.Normal(locs, 1.0).to_event(1).log_prob(z.unsqueeze(-2))
        return (parts + torch.tensor([weight, 1 - weight]).log()).logsumexp(-1)

    def draws(n):
        return locs[(torch.rand(n) > weight).long()] + torch.randn(n, 2)

    return _flat(log_density, draws)


def local_linear_trend(num=4):
    """Levels and slopes that are random walks, step by step."""
    scales = [pyro.sample(f"s{k}", dist.HalfNormal(torch.ones(()))) for k in range(3)]
    level = slope = torch.zeros(())
    for t in range(num):
        level = pyro.sample(f"level_{t}", dist.Normal(level + slope, scales[0]))
        slope = pyro.sample(f"slope_{t}", dist.Normal(slope, scales[1]))
        datum = torch.tensor(t).sin()
        pyro.sample(f"y_{t}", dist.Normal(level, scales[2]), obs=datum)


# means of groups: of four they are known well, and of eight they say nothing of how much groups differ
MEANS = (0.62, 0.41, 0.55, 0.44, 1.9, -0.6, 0.3, 0.9, -0.2, 1.2, 0.6, -1.0)


def _errors():
    return torch.tensor([0.1] * 4 + [1.0] * 8)


def weak_hierarchy():
    """A hierarchy as one writes it, whose scale may be anything below the differences of groups."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 3.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(())))
    with pyro.plate("groups", len(MEANS)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, _errors()), obs=torch.tensor(MEANS))


def weak_hierarchy_log_tau(share: float) -> float:
    """A quantile of the log of its scale, by quadrature; all else is Gaussian."""
    log_tau, eye = torch.linspace(-12, 4, 4001), torch.eye(len(MEANS))
    tau = log_tau.exp()
    covariance = (tau**2)[:, None, None] * eye + _errors().square().diag() + 9.0
    density = dist.MultivariateNormal(torch.zeros(len(MEANS)), covariance)
    log_joint = density.log_prob(torch.tensor(MEANS)) + dist.HalfCauchy(1.0).log_prob(tau) + log_tau
    below = log_joint.softmax(0).cumsum(0)
    return float(log_tau[int((below < share).sum())])


def targets() -> dict[str, Target]:
    """All of them, in the default dtype."""
    return {
        "a correlated Gaussian": _correlated(),
        "a funnel": _bent(lambda x: (torch.zeros_like(x), (x / 2).exp())),
        "a banana": _bent(lambda x: (0.5 * x**2, torch.ones_like(x))),
        "modes 4 apart": _two_modes(4.0, 0.7),
        "modes 20 apart": _two_modes(20.0, 0.7),
    }


# Hierarchies whose prior has another density than the family that it looks like


def _hierarchy(make):
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros(()), torch.ones(())))
    with pyro.plate("groups", 3):
        x = pyro.sample("x", make(torch.zeros(()), tau))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([1.0, 5.0, -1.0]))


def masked_hierarchy():
    """The second of three has no prior."""
    mask = torch.tensor([True, False, True])
    _hierarchy(lambda loc, scale: dist.Normal(loc, scale).mask(mask))


class Shifted(dist.Normal):
    """A Normal distribution whose location is one more than it says."""

    def log_prob(self, value):
        return super().log_prob(value - 1.0)


def shifted_hierarchy():
    _hierarchy(Shifted)
