# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoStructuredFlow
from pyro_artransform.inference.config import InitializationConfig
from pyro_artransform.inference.initialization.batch_and_match import match_scores
from pyro_artransform.inference.initialization.sparse_ascent import (
    ascend_with_graph,
    elbo_of,
    expectations,
    pattern_of,
)
from pyro_artransform.inference.initialization.start import UNCHANGED, find_start
from pyro_artransform.joint import LogJoint
from tests.graphs.markov_graphs import GRAPHS, chain, crossed, dominant_precision, grid, tree

# dense Gaussians would find them as well
FEW = InitializationConfig(max_dense_dim=1)
LINEAR = {
    "chain with globals": chain(30, 2),
    "tree": tree(31),
    "grid": grid(6, 6),
    "crossed plates": crossed(10, 6),
    "complete": GRAPHS["complete"],
}


def gaussian_of(neighbours):
    """A mean, and a precision with the zeros of a graph whose correlations are strong."""
    generator = torch.Generator().manual_seed(3)
    precision = dominant_precision(neighbours, 0.05, generator)
    return torch.randn(len(neighbours), generator=generator), precision


def linear_model(loc, precision):
    prior = dist.Normal(torch.zeros(len(loc)), 1.0).mask(False).to_event(1)
    z = pyro.sample("z", prior)
    away = z - loc
    pyro.factor("posterior", -0.5 * (away @ precision * away).sum(-1))


def started(model, *args):
    guide = AutoStructuredFlow(model, hidden_dim=4)
    guide.set_up(*args)
    log_joint = LogJoint(model, args)
    initial = find_start(log_joint, partial(model, *args), guide, FEW)
    return guide, log_joint, initial


@pytest.mark.parametrize("neighbours", LINEAR.values(), ids=LINEAR)
def test_start_of_a_linear_gaussian_model_is_the_posterior(neighbours):
    loc, precision = gaussian_of(neighbours)
    guide, _, initial = started(linear_model, loc, precision)
    assert initial.name == "a Gaussian with the graph of the latents"
    transform, dim = guide.get_transform(), len(loc)
    with torch.no_grad():
        mean = transform(torch.zeros(dim))
        root = transform(torch.eye(dim)) - mean
        inverse = transform.inv(torch.eye(dim)) - transform.inv(torch.zeros(dim))
    covariance = root.T @ root
    away = mean - loc
    trace = (precision * covariance).sum()
    kl = 0.5 * (trace - dim - torch.logdet(precision @ covariance) + away @ precision @ away)
    assert abs(kl) < 1e-6
    # the zeros of the guide are those of the graph
    found = inverse @ inverse.T
    is_edge = precision != 0
    scale = precision.diagonal().sqrt()
    assert not ((found / scale / scale[:, None])[~is_edge].abs() > 1e-9).any()
    parents = guide.graph.elimination.parents
    members = set(guide.graph.elimination.root)
    for j, row in enumerate(inverse):
        changed = set((row.abs() > 1e-12).nonzero()[:, 0].tolist())
        allowed = {i for i, own in enumerate(parents) if j in own} | {j}
        assert changed <= (allowed | members if j in members else allowed)


def volatility(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    steps = pyro.sample("steps", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    h = mu[..., None] + sigma[..., None] * steps
    pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)


def test_start_is_better_than_a_mean_field_fit():
    y = torch.randn(60) * 3
    guide, log_joint, initial = started(volatility, y)
    fitted = match_scores(log_joint, torch.randn(1, 62), 32, 20, is_independent=True)
    before = ascend_with_graph(log_joint, guide.markov_graph(), fitted, 0, 0)
    # of six seeds by 0.15 nats or more; the noise of 4,096 draws is below 0.1
    assert initial.elbo > elbo_of(log_joint, before, torch.randn(4096, 62)) + 0.1
    z, log_q = guide.rsample_and_log_prob(4096)
    assert abs((log_joint(z) - log_q).mean() - initial.elbo) < 0.3


def test_curvature_in_the_pattern_is_that_of_autograd():
    y = torch.randn(12)
    log_joint = LogJoint(volatility, (y,))
    guide = AutoStructuredFlow(volatility)
    guide.set_up(y)
    graph = guide.markov_graph()
    # so narrow that all draws are at the mean
    loc, sd = 0.3 * torch.randn(14), torch.full((14,), 1e-6)
    draws = loc + sd * torch.randn(16, 14)
    found, gradient = expectations(log_joint, graph, draws, sd)
    hessian = torch.autograd.functional.hessian(lambda z: log_joint(z[None])[0], loc.clone())
    rows, columns = pattern_of(graph.elimination, loc.device).pairs()
    assert torch.allclose(found, -hessian[rows, columns], atol=1e-3)
    (expected,) = torch.autograd.functional.jacobian(lambda z: log_joint(z[None]), loc)
    assert torch.allclose(gradient, expected, atol=1e-4)


def test_a_guide_that_is_better_stays_as_it_is():
    loc, precision = gaussian_of(chain(10))
    guide, log_joint, _ = started(linear_model, loc, precision)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    initial = find_start(log_joint, partial(linear_model, loc, precision), guide, FEW)
    assert initial.name == UNCHANGED
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
