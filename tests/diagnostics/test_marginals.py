# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from functools import cache, partial

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.diagnostics.marginals import marginals_of
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling.run_mcmc import from_nothing
from tests.diagnostics.conjugate import PathGuide, alternating, path

SLOW = pytest.mark.slow


def chains_of(model, num_samples=1000):
    """Chains until there are so many effective draws."""
    ensemble = from_nothing(LogJoint(model), num_samples)
    ensemble.run(num_samples)
    return ensemble


@cache
def of_path(dim, num_samples=1000, dtype=torch.float64):
    torch.manual_seed(0)
    return chains_of(partial(path, dim), num_samples)


def judged(ensemble, model, guide):
    subject = ModelAndGuide.of(model, guide, (), {})
    draws, _ = subject.log_joint.to_unconstrained(subject.draws(4_000))
    return marginals_of(ensemble.log_joint, ensemble.draws, draws)


def marginals(model, guide, num_samples=1000):
    return judged(chains_of(model, num_samples), model, guide)


def _heavy_tails(x):
    """Sinh of normal draws: with a kurtosis of 3.8 heavier than the posterior, of a variance near 1."""
    return torch.sinh(0.25 * x) / 0.25 / 1.03, (torch.cosh(0.25 * x) / 1.03).log().sum(-1)


def _one_in_twenty(dim, value):
    return torch.where(torch.arange(dim) % 20 == 7, value, 0.0)


@pytest.mark.parametrize("dim", [40, pytest.param(1000, marks=SLOW)])
def test_guides_of_a_correlated_path(dim):
    """The bound of 2 D errors is nine standard errors."""
    model, ensemble = partial(path, dim), of_path(dim, max(1000, 2 * dim))
    exact = judged(ensemble, model, PathGuide(dim))
    assert max(exact.mean_bound, exact.sd_bound) < 0.25
    assert exact.words.startswith("all means within 0.")
    assert exact.mean_shift["z"].shape == exact.sd_ratio_se["z"].shape == (dim,)
    for guide, is_good in (
        (PathGuide(dim), True),
        (PathGuide(dim, distort=alternating), True),
        (PathGuide(dim, distort=_heavy_tails), True),
        (PathGuide(dim, 0.7), False),
        (PathGuide(dim, 1.35), False),
        (PathGuide(dim, shift=_one_in_twenty(dim, 0.5)), False),
    ):
        assert judged(ensemble, model, guide).trusted == is_good


def test_errors_are_the_true_ones():
    """Means off by 0.1 sd at most and sds by 10 %: within four standard errors, and 0.01."""
    dim = 40
    factor, shift = 1 + 0.1 * torch.linspace(-1, 1, dim), 0.1 * torch.linspace(1, -1, dim)
    found = judged(of_path(dim), partial(path, dim), PathGuide(dim, factor, shift))
    errors = found.mean_shift["z"] - shift
    assert (errors.abs() < 4 * found.mean_shift_se["z"] + 0.01).all()
    errors = found.sd_ratio["z"] - factor
    assert (errors.abs() < 4 * found.sd_ratio_se["z"] + 0.01).all()
    # of a thousand effective draws, and 4,000 of the guide
    assert found.mean_shift_se["z"].max() < 0.04


def test_few_draws_know_too_little():
    ensemble = of_path(20)
    torch.manual_seed(0)  # some draws of 60 look heavy-tailed
    draws, _ = PathGuide(20).rsample_and_log_prob(60)
    found = marginals_of(ensemble.log_joint, ensemble.draws, draws)
    assert not found.trusted
    assert "but the bounds are wide (means within" in found.words


def test_of_constrained_sites():
    """On the unconstrained space, where the guide is judged: the log of a gamma, and a simplex."""

    def model(shape=20.0):
        pyro.sample("rate", dist.Gamma(shape, shape / 20.0))
        pyro.sample("share", dist.Dirichlet(torch.tensor([8.0, 9.0, 10.0])))

    found = marginals(model, model)
    assert found.trusted, found
    assert found.mean_shift["rate"].shape == ()
    assert found.mean_shift["share"].shape == (2,)
    found = marginals(model, lambda: model(5.0))
    # the variance of the log of a gamma is the trigamma function of its shape
    ratio = (torch.polygamma(1, torch.tensor(5.0)) / torch.polygamma(1, torch.tensor(20.0))).sqrt()
    assert abs(found.sd_ratio["rate"] - ratio) < 0.2
    assert "(rate" in found.words


@pytest.mark.parametrize(
    ("law", "has_mean"),
    # chains of a Cauchy take all their trajectories
    [pytest.param(dist.Cauchy(0.0, 1.0), False, marks=SLOW), (dist.StudentT(3.0), True)],
)
def test_no_bound_of_a_moment_that_does_not_exist(law, has_mean):
    """A Cauchy has neither mean nor sd; with 3 degrees the sd has no standard error."""

    def model():
        pyro.sample("z", law)

    found = marginals(model, model, 100)
    assert not found.trusted
    assert math.isfinite(found.mean_bound) == has_mean
    assert found.sd_bound == math.inf
    assert "unknown, such as that of z, whose tails" in found.words


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    model, ensemble = partial(path, 20), of_path(20, dtype=torch.float32)
    assert judged(ensemble, model, PathGuide(20)).trusted
    found = judged(ensemble, model, PathGuide(20, 0.7))
    assert not found.trusted
    assert found.sd_ratio["z"].dtype == torch.float32


def test_the_worst_latent_is_named_by_its_place_and_shown():
    def model(loc=0.0):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(loc * torch.eye(3)[1:], 1.0).to_event(2))

    def guide():
        loc = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(loc, 1.0).to_event(2))

    found = marginals(model, guide)
    words = "1 of 7 means is off by more than 0.15 posterior sd (b[1, 1] by "
    assert found.words.startswith(words)
    assert repr(found).startswith(f"Marginals: {words}")
