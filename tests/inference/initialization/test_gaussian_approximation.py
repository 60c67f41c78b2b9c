# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoStructuredFlow
from pyro_artransform.graphs.factorization import lower_factor
from pyro_artransform.inference.config import InitializationConfig
from pyro_artransform.inference.initialization.gaussian_approximation import (
    ascend,
    ascend_with_graph,
    elbo_of,
    expectations,
    match_scores,
    pattern_of,
)
from pyro_artransform.inference.initialization.gaussians import (
    Gaussians,
    antithetic_noise,
    elbos,
)
from pyro_artransform.inference.initialization.start import UNCHANGED, find_start
from pyro_artransform.joint import LogJoint
from tests.graphs.markov_graphs import GRAPHS, chain, crossed, dominant_precision, grid, tree

STEPS = 20


def correlated(dim, condition):
    """The factor of a Gaussian whose sds differ by a condition, along axes of no coordinate."""
    turn = torch.linalg.qr(torch.randn(dim, dim)).Q
    return lower_factor((turn * torch.logspace(0, -math.log10(condition), dim))[None])[0]


def gap(log_density, found, count=256):
    """How far the ELBOs are below a log evidence of 0, shape ``(S,)``."""
    return -elbos(log_density, found, antithetic_noise(found.loc, count))


@pytest.mark.parametrize(
    ("dim", "unit", "distance"),
    [(1, 1.0, 1.0), (3, 1e-4, 1e4), (3, 1e4, 1e3), (20, 1.0, 100.0), (60, 0.01, 10.0)],
)
def test_a_gaussian_is_found_to_round_off(dim, unit, distance):
    """Of any unit, from any number of sds away, from a few more draws than dimensions."""
    scale_tril = unit * correlated(dim, 10.0)
    normal = dist.MultivariateNormal(torch.full((dim,), unit), scale_tril=scale_tril)
    points = distance * unit * torch.randn(4, dim)
    found = match_scores(normal.log_prob, points, dim + 16, STEPS)
    assert gap(normal.log_prob, found).abs().max() < 1e-6
    assert torch.allclose(found.loc / unit, torch.ones_like(found.loc), atol=1e-4)


def test_units_that_differ_by_orders():
    """Sds over eight orders of magnitude, as in a regression on columns as they are."""
    units = torch.tensor([1e-4, 1.0, 1e4])
    scale_tril = units[:, None] * correlated(3, 3.0)
    normal = dist.MultivariateNormal(units, scale_tril=scale_tril)
    points = torch.stack([torch.zeros(3), torch.randn(3), 10 * units * torch.randn(3)])
    found = match_scores(normal.log_prob, points, 32, STEPS)
    assert gap(normal.log_prob, found).abs().max() < 1e-6


def test_coordinates_that_are_nearly_functions_of_each_other():
    """A condition number of 1e10 of the covariance, in no coordinate's direction."""
    normal = dist.MultivariateNormal(torch.ones(20), scale_tril=correlated(20, 1e5))
    found = match_scores(normal.log_prob, torch.zeros(2, 20), 36, STEPS)
    assert gap(normal.log_prob, found).abs().max() < 1e-4


@pytest.mark.parametrize("start", [-40.0, 0.0, 10.0])
def test_a_posterior_whose_curvature_is_none_or_all(start):
    """The log of a Poisson rate of 100 under a wide prior: where it starts, a Newton step overflows.

    The best Gaussian is within 0.01 nats of the posterior, a gamma density.
    """

    def log_density(z):
        return (100 * z - z.exp()).sum(-1) - math.lgamma(100.0)

    found = match_scores(log_density, torch.full((1, 1), start), 32, STEPS)
    assert gap(log_density, found, 4096).item() < 0.01
    assert abs(found.loc.item() - math.log(100)) < 0.02


def half(z):
    """The density of a Gaussian, which fails in a half of the space."""
    normal = dist.Normal(3.0, 1.0).log_prob(z).sum(-1)
    return torch.where(z[..., 0] < 1, torch.nan, normal)


@pytest.mark.parametrize("is_independent", [False, True])
def test_it_stays_where_the_density_is_finite(is_independent):
    """One point of several is beyond the edge; the others stay within, one begins at it."""
    points = torch.tensor([[-1.0, 0.0], [1.05, 0.0], [6.0, 2.0]])
    lost, *others = (match_scores(half, points[[k]], 32, STEPS, is_independent) for k in range(3))
    assert torch.equal(lost.loc, points[:1])
    for found in (*others, match_scores(half, points, 32, STEPS, is_independent)):
        assert (found.loc - 3).abs().max() < 1
        # of 32 draws of the Gaussian itself half have none beyond the edge
        sds = found.scale_tril if is_independent else found.scale_tril.norm(dim=-1)
        assert (sds < 1.1).all()
    assert ascend(half, lost, 32, STEPS // 2) == lost


def test_gradients_whose_squares_overflow():
    """Such a point stays where it is; beside others these go on."""

    def log_density(z):
        return -0.5 * z.square().sum(-1) - (0.05 * z).exp().sum(-1)

    points = torch.tensor([[1.0], [8000.0]]) * torch.ones(4)
    assert match_scores(log_density, points[1:], 20, STEPS).loc.isfinite().all()
    found = match_scores(log_density, points, 20, STEPS)
    assert found.loc.abs().max() < 1.0


def test_half_of_the_points_go_on_twice():
    """Those of the larger ELBO: of two modes far apart the one start near the larger one is among them."""

    def log_density(z):
        distances = torch.stack([(z - 30.0).square().sum(-1), (z + 30.0).square().sum(-1)])
        return (math.log(3) * torch.tensor([[1.0], [0.0]]) - 0.5 * distances).logsumexp(0)

    points = torch.cat([torch.full((1, 2), 25.0), -30.0 + torch.randn(9, 2)])
    found = match_scores(log_density, points, 32, STEPS)
    assert len(found.loc) == 3
    assert (found.loc - 30).abs().amax(1).min() < 0.1


def test_heavy_tails_from_far_away():
    """Student's t of 2 degrees from 1,000 sds: the best Gaussian is 0.12 nats off a coordinate."""
    student = dist.StudentT(2.0, torch.zeros(5), 1.0).to_event(1)
    found = match_scores(student.log_prob, torch.full((2, 5), 1e3), 32, STEPS)
    assert gap(student.log_prob, found, 4096).max() < 5 * 0.25


def test_no_gradient_and_single_precision():
    scale_tril = correlated(5, 10.0)
    normal = dist.MultivariateNormal(torch.ones(5).float(), scale_tril=scale_tril.float())
    found = match_scores(normal.log_prob, torch.zeros(2, 5).float(), 32, STEPS)
    assert found.loc.dtype == found.scale_tril.dtype == torch.float32
    assert not found.loc.requires_grad
    # gradients have digits to 1e-7, over a condition of 100
    assert gap(normal.log_prob, found).abs().max() < 1e-3


# Natural gradients


def test_ascent_ends_at_the_best_gaussian():
    """Of a gamma density of shape 4 on the log axis, where the best Gaussian is known by quadrature."""
    shape = 4.0

    def log_density(z):
        return (shape * z - z.exp()).sum(-1) - math.lgamma(shape)

    # E[d/dz] = 0 is shape = exp(m + s^2 / 2), and -E[d^2/dz^2] = 1 / s^2 the same
    variance = 1 / shape
    start = Gaussians(torch.ones(1, 1), torch.ones(1, 1, 1))
    found = ascend(log_density, start, 4000, 15)
    # the one with the largest ELBO by 4,000 draws, which know it to 0.005
    assert found.scale_tril.item() ** 2 == pytest.approx(variance, rel=0.2)
    assert found.loc.item() == pytest.approx(math.log(shape) - variance / 2, abs=0.05)


def test_ascent_does_not_lose():
    normal = dist.MultivariateNormal(torch.ones(3), scale_tril=correlated(3, 10.0))
    start = Gaussians(torch.ones(1, 3), normal.scale_tril[None])
    found = ascend(normal.log_prob, start, 64, 5)
    assert gap(normal.log_prob, found).abs() < 1e-10


# Independent Gaussians


def test_independent_gaussians_of_any_unit():
    """The conditional sds of each coordinate, from points one and a hundred sds away."""
    scale = torch.tensor([1e-3, 1.0, 50.0])
    normal = dist.Normal(scale, scale).to_event(1)
    points = scale * torch.tensor([[2.0, 0.0, 0.0], [100.0, -100.0, 10.0]])
    for k in range(2):
        found = match_scores(normal.log_prob, points[[k]], 32, STEPS, is_independent=True)
        best = ascend(normal.log_prob, found, 32, STEPS // 2)
        assert best.is_independent
        assert torch.allclose(best.loc / scale, torch.ones(3), atol=1e-3)
        assert torch.allclose(best.scale_tril / scale, torch.ones(3), atol=1e-3)


def test_the_best_independent_gaussian_has_the_conditional_sds():
    precision = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    normal = dist.MultivariateNormal(torch.tensor([3.0, -1.0]), precision_matrix=precision)
    found = match_scores(normal.log_prob, torch.zeros(1, 2), 64, STEPS, is_independent=True)
    found = ascend(normal.log_prob, found, 64, STEPS // 2)
    assert torch.allclose(
        found.scale_tril[0], precision.diagonal().rsqrt(), rtol=0.25
    )  # of 64 draws
    assert (found.loc[0] - normal.loc).abs().max() < 0.3


# With a graph

# dense Gaussians would find them as well
# a bound whose draws have a heavy tail is known to 0.1 nats by so many
FEW = InitializationConfig(max_dense_dim=1, num_compared=4096)
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
    initial = find_start(log_joint, guide, FEW)
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
    initial = find_start(log_joint, guide, FEW)
    assert initial.name == UNCHANGED
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
