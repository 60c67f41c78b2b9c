# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Coordinates in which a field is standard normal given its globals."""

import math
from functools import cache
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_artransform.model import LogJoint
from pyro_artransform.model.coordinates.centering import non_centered
from pyro_artransform.model.graphs.dependencies import value_and_gradient
from pyro_artransform.sampling import Ensemble, mcmc
from pyro_artransform.sampling.conditional_gaussian import ConditionalGaussian, LatentGaussianField
from pyro_artransform.sampling.preconditioning import fisher_divergence
from tests.model.models import hierarchy

N = 120


class RandomWalk(dist.TorchDistribution):
    """A walk that begins at a sd of 5, as users write one: without a location and a scale."""

    arg_constraints: ClassVar[dict[str, object]] = {}
    support = constraints.real_vector

    def __init__(self, scale, num_steps):
        self.scale = scale
        super().__init__(scale.shape, torch.Size([num_steps]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return RandomWalk(self.scale.expand(batch_shape), *self.event_shape)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        steps = torch.randn(sample_shape + self.batch_shape + self.event_shape)
        scales = self.scale[..., None] * torch.ones(self.event_shape)
        return (
            steps * torch.cat([5 * torch.ones_like(scales[..., :1]), scales[..., 1:]], -1)
        ).cumsum(-1)

    def log_prob(self, value):
        steps = dist.Normal(value[..., :-1], self.scale[..., None]).log_prob(value[..., 1:])
        return dist.Normal(0.0, 5.0).log_prob(value[..., 0]) + steps.sum(-1)


def walk(y):
    q = pyro.sample("q", dist.HalfNormal(1.0))
    r = pyro.sample("r", dist.HalfNormal(1.0))
    x = pyro.sample("x", RandomWalk(q, len(y)))
    pyro.sample("y", dist.Normal(x, r[..., None]).to_event(1), obs=y)


def regression(y):
    """Each coefficient depends on all others, by the data."""
    x = torch.randn(len(y), N, generator=torch.Generator().manual_seed(0))
    b = pyro.sample("b", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    pyro.sample("y", dist.Normal((x @ b[..., None])[..., 0], 1.0).to_event(1), obs=y)


def data(num=N, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    steps, noise = torch.randn(2, num, generator=generator)
    return (scale * steps).cumsum(0) + noise


@cache
def fitted(model):
    """The transform, and draws around the start that it is fitted to."""
    torch.manual_seed(0)
    log_joint = non_centered(LogJoint(model, (data(),)), with_shapes=True)
    draws = log_joint.start + 0.3 * torch.randn(400, len(log_joint.start))
    field = LatentGaussianField.of(log_joint)
    assert field is not None
    return log_joint, ConditionalGaussian(field, log_joint, draws, draws.std(0)), draws


@pytest.mark.parametrize(("model", "num_globals"), [(walk, 2), (hierarchy, 2)])
def test_globals_are_the_hubs_of_a_sparse_graph(model, num_globals):
    field = LatentGaussianField.of(non_centered(LogJoint(model, (data(),)), with_shapes=True))
    assert (len(field.of_globals), len(field.of_field)) == (num_globals, N)
    assert sorted(torch.cat([field.of_globals, field.of_field]).tolist()) == list(range(N + 2))


@pytest.mark.parametrize(
    ("model", "num"), [(regression, 50), (walk, 20)], ids=["dense", "few latents"]
)
def test_other_posteriors_have_no_field(model, num):
    assert LatentGaussianField.of(LogJoint(model, (data(num),))) is None


@pytest.mark.parametrize("model", [walk, hierarchy])
def test_a_gaussian_field_is_standard_normal_given_its_globals(model):
    """Its score is minus its coordinates, to 5 % of their sd, as far as the draws reach."""
    torch.manual_seed(0)
    log_joint, transform, draws = fitted(model)
    field = transform._field
    base = torch.randn(50, N + 2)
    base[:, field.of_globals] = draws[:50, field.of_globals]
    base.requires_grad_()
    latents, ladj = transform(base)
    (score,) = torch.autograd.grad((log_joint(latents) + ladj).sum(), base)
    assert (score + base)[:, field.of_field].square().mean().sqrt() < 0.05
    # the inverse, and the log-determinant
    base = transform.inverse(draws[:3])
    latents, ladj = transform(base)
    torch.testing.assert_close(latents, draws[:3])
    for row, found in zip(base, ladj):
        jacobian = torch.autograd.functional.jacobian(lambda x: transform(x[None])[0][0], row)
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian)[1])


def test_a_walk_is_standard_normal_where_its_scale_vanishes():
    """To 0.2 of its sd from a scale of 0.7 down to one of 0.02; by polynomials far from it."""
    torch.manual_seed(0)
    log_joint = non_centered(LogJoint(walk, (data(N, 0.02),)), with_shapes=True)
    field = LatentGaussianField.of(log_joint)
    draws = log_joint.start + 0.3 * torch.randn(400, N + 2)
    draws[:, field.of_globals] = torch.randn(400, 2) * torch.tensor([1.0, 0.1])
    draws[:, field.of_globals] += torch.tensor([-1.2, 0.4])
    transform = ConditionalGaussian(field, log_joint, draws, draws.std(0))
    for quantile in (0.0, -1.0, -2.0):
        base = torch.randn(20, N + 2)
        base[:, field.of_globals] = torch.tensor([quantile, 0.4])
        base.requires_grad_()
        latents, ladj = transform(base)
        (score,) = torch.autograd.grad((log_joint(latents) + ladj).sum(), base)
        assert (score + base)[:, field.of_field].square().mean().sqrt() < 0.2


def volatility(y):
    """The level of the log volatilities is a global, too."""
    sigma = pyro.sample("sigma", dist.LogNormal(-2.0, 1.0))
    nu = pyro.sample("nu", dist.Exponential(0.1))
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    h = pyro.sample("h", RandomWalk(sigma, len(y)))
    scale = (0.5 * (mu[..., None] + h)).exp()
    pyro.sample("y", dist.StudentT(nu[..., None], 0.0, scale).to_event(1), obs=y)


def test_modes_are_found_and_the_center_moves_with_a_level():
    """From draws far from the modes; the level moves all of the field, and all errors add up."""
    torch.manual_seed(0)
    y = torch.randn(400) * (torch.arange(400) / 40).sin().exp()
    log_joint = LogJoint(volatility, (y,))
    draws = torch.randn(400, 403) * torch.tensor([0.3, 0.5, 0.7, *400 * [0.5]])
    draws[:, :2] += torch.tensor([-2.0, 1.5])
    field = LatentGaussianField.of(log_joint)
    points = draws.median(0).values.repeat(40, 1)
    points[:, field.of_globals] = draws[:40, field.of_globals]
    _, is_found = field.conditionals(log_joint, points, draws.std(0))
    _, gradients = value_and_gradient(log_joint, points[is_found])
    transform = ConditionalGaussian(field, log_joint, draws, draws.std(0))
    base = torch.randn(50, 403)
    base[:, :3] = draws[:50, :3]
    base.requires_grad_()
    latents, ladj = transform(base)
    (gradient,) = torch.autograd.grad((log_joint(latents) + ladj).sum(), base)
    of_level = gradient[:, field.of_globals][:, 2] + latents[:, 2] / 9
    assert is_found.sum() > 20  # none after three steps
    assert gradients[:, field.of_field].abs().max() < 1e-3
    assert of_level.std() < 1.0  # 0.33; 68 if the centre is constant


def test_draws_without_curvature_are_refused():
    log_joint, transform, draws = fitted(walk)
    draws = torch.full_like(draws, torch.nan)
    with pytest.raises(ValueError, match="expected a mode of the field given the globals"):
        ConditionalGaussian(transform._field, log_joint, draws, draws.std(0))


def log_likelihood_by_kalman(y, q, r):
    mean, variance, total = torch.zeros_like(q), torch.full_like(q, 25.0), torch.zeros_like(q)
    for t, value in enumerate(y):
        variance = variance + (q.square() if t else 0.0)
        both = variance + r.square()
        total = total - 0.5 * ((value - mean).square() / both + both.log())
        gain = variance / both
        mean, variance = mean + gain * (value - mean), variance * (1 - gain)
    return total


@pytest.mark.parametrize(
    ("scale", "seeds", "most_untrusted"),
    [(0.3, [1], 0), pytest.param(0.02, [1, 2], 1, marks=pytest.mark.slow)],
)
def test_tails_of_a_scale_are_those_of_quadrature(scale, seeds, most_untrusted):
    """Shares of effective draws below exact quantiles, to four standard errors of 400 independent ones.

    Data of the smaller scale allow it to be zero; chains may then fail to mix, and say so.
    """
    y, num_untrusted = data(N, scale), 0
    grid = torch.linspace(-10, 0.2, 400).exp(), torch.linspace(0.5, 1.7, 80)
    q, r = torch.meshgrid(*grid, indexing="ij")
    log_prob = log_likelihood_by_kalman(y, q, r) - (q.square() + r.square()) / 2 + q.log()
    mass = (log_prob - log_prob.max()).exp().sum(1).cumsum(0)
    for seed in seeds:
        chains = mcmc(walk, y, draws=400, seed=seed, progress=False, max_seconds=60)
        if not chains.trusted:
            num_untrusted += 1
            continue
        for share in (0.03, 0.5, 0.97):
            quantile = grid[0][int((mass / mass[-1] < share).sum())]
            error = 4 * math.sqrt(share * (1 - share) / 400)
            assert abs(float((chains.by_chain["q"] < quantile).double().mean()) - share) < error
    assert num_untrusted <= most_untrusted


def test_the_divergence_of_a_gaussian_from_itself_is_zero():
    torch.manual_seed(0)
    scale = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [0.0, 0.0, 100.0]])
    draws = torch.randn(500, 3) @ scale.T
    score = -torch.cholesky_solve(draws.T, scale).T
    found = fisher_divergence(draws, score)
    assert found.shape == (2,)
    assert (found < 1e-4).all()
    assert (fisher_divergence(draws.sinh(), score) > 0.1).all()
    # at the median draw, and at the 95 % quantile, in a tail that is lighter than that of a Gaussian
    draws = torch.randn(500, 1)
    median, tail = fisher_divergence(draws, -draws - 0.1 * draws**3)
    assert 1.5 * median < tail


def test_chains_go_on_in_these_coordinates_and_a_tail_that_is_missing_is_seen():
    """Of a walk's scale: about 1 % is beyond the 1 % quantile, and far more once the lowest tenth is gone."""
    ensemble = Ensemble(non_centered(LogJoint(walk, (data(),)), with_shapes=True), 400)
    with torch.no_grad():
        assert ensemble.run(400).has_mixed
        fitted = ensemble._target.to_latent
        assert isinstance(fitted, ConditionalGaussian)
        latents, _ = ensemble.log_joint.from_unconstrained(ensemble.draws.flatten(0, 1))
        q = latents[:, fitted.of_globals[0]]
        beyond = fitted.share_beyond(latents)
        truncated = fitted.share_beyond(latents[q > q.quantile(0.1)])
    assert (beyond < 0.025).all(), beyond
    assert 0.07 < truncated[0] < 0.15, truncated
