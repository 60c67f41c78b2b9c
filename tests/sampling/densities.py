# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Densities whose moments are known, by tensors or by a model, and a hierarchy's exact posterior."""

import pyro
import torch
from pyro import distributions as dist

from pyro_artransform.diagnostics.convergence import mean_ess
from pyro_artransform.sampling import State

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def gaussian(scale):
    """Independent normals of these sds, shape ``(D,)``."""
    return lambda x: State(x, x, -(x / scale).square().sum(-1) / 2, -x / scale**2)


def two_modes(dim, distance, share):
    """Standard normals, ``distance`` from each other in each coordinate: the one on the left has a share."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
        locs = distance / 2 * torch.tensor([[-1.0], [1.0]]).expand(2, dim)
        parts = dist.Normal(locs, 1.0).to_event(1).log_prob(z.unsqueeze(-2))
        shares = torch.tensor([share, 1 - share]).log()
        pyro.factor("target", (parts + shares).logsumexp(-1))

    return model


def schools():
    """The eight schools, centred: weak data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, torch.tensor(ERRORS)), obs=torch.tensor(EFFECTS))


def _given_tau():
    """A grid of log tau ``(n, 1)``, its weights, and means and variances of mu, log tau, theta there."""
    y, errors = torch.tensor(EFFECTS), torch.tensor(ERRORS)
    log_tau = torch.linspace(-12, 6, 4001)[:, None]
    tau = log_tau.exp()
    variance = errors**2 + tau**2
    precision = 1 / 25 + (1 / variance).sum(-1)
    mean = (y / variance).sum(-1) / precision
    data = dist.Normal(0.0, variance.sqrt()).log_prob(y).sum(-1)
    data = data + 0.5 * precision * mean**2 - 0.5 * precision.log()
    weights = (data + dist.HalfCauchy(5.0).log_prob(tau)[:, 0] + log_tau[:, 0]).softmax(0)
    share = tau**2 / variance
    # given tau the effect is share * y + (1 - share) * mu with a variance of share * errors^2
    loc = share * y + (1 - share) * mean[:, None]
    var = share * errors**2 + (1 - share) ** 2 / precision[:, None]
    loc = torch.cat([mean[:, None], log_tau, loc], 1)
    var = torch.cat([1 / precision[:, None], 0 * log_tau, var], 1)
    return log_tau, weights, loc, var


def schools_moments():
    """Means and sds of mu, log tau and the effects, by quadrature over log tau."""
    _, weights, loc, var = _given_tau()
    total = weights @ loc
    return total, (weights @ (var + (loc - total) ** 2)).sqrt()


def schools_log_tau(share):
    """A quantile of log tau."""
    log_tau, weights, *_ = _given_tau()
    return float(log_tau[int((weights.cumsum(0) < share).sum())])


def moments_are(ensemble, mean, sd):
    """Whether draws have means and sds of the unconstrained space, within five standard errors."""
    draws, white = ensemble.draws.flatten(0, 1), (ensemble.draws - mean) / sd
    assert ((draws.mean(0) - mean).abs() < 5 * sd / ensemble.convergence().bulk.sqrt()).all()
    error = white.square().std((0, 1)) / mean_ess(white.square()).sqrt()
    assert ((white.square().mean((0, 1)) - 1).abs() < 5 * error).all()


def nowhere():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("wall", torch.where(z[..., 0] > -9, torch.nan, 0.0))
