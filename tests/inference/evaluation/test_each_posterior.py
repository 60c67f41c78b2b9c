# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import math
import warnings

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_value

from pyro_artransform import AutoStructuredFlow, fit
from pyro_artransform.diagnostics import psis_resample
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.diagnostics.psis import fit_tails
from pyro_artransform.inference.config import EvaluationConfig, FitConfig
from pyro_artransform.inference.evaluation.each_posterior import EachSearch, weigh_each
from pyro_artransform.joint.posteriors import Posteriors
from tests.inference.conftest import quick_fit

SIZE, MANY = 12, 300


def gammas(y):
    """Rates with a Gamma prior of Poisson counts, for each data set a posterior that is known."""
    with pyro.plate("sets", len(y)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        level = pyro.sample("level", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("count", dist.Poisson(rate), obs=y)
        pyro.sample("x", dist.Normal(level, 1.0), obs=y.new_ones(()))


def log_evidence(y):
    of_count = (y + 2).lgamma() - (y + 1).lgamma() - (y + 2) * math.log(2)
    return of_count + dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))


@pytest.fixture(scope="module")
def result():
    y = torch.arange(SIZE).double()
    pyro.clear_param_store()
    return y, fit(gammas, AutoStructuredFlow(gammas), y, seed=0, progress=False)


def test_small_gaps_of_many_posteriors_are_trusted(result):
    y, found = result
    assert found.trusted, found.verdict
    assert abs(found.log_evidence - float(log_evidence(y).sum())) < 0.01


def test_each_posterior_is_resampled_by_its_own_weights():
    """Of a guide whose rates are all too small and too wide, where all weights together are hopeless."""
    y, one = torch.arange(SIZE).double(), torch.ones(SIZE).double()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoStructuredFlow(gammas, coordinates="model")
    guide.set_up(y)
    posterior = dist.Gamma(y + 2, 2 * one)
    loc = (y + 2).log() - math.log(2) - 0.3 / (y + 2).sqrt()
    sd = (1.3 * (y + 2).rsqrt(), 1.3 * 0.5**0.5 * one)
    guide.start_at(torch.cat([loc, 0.5 * one]), torch.cat(sd))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = psis_resample(gammas, guide, 2000, y)
    rate, level = draws["rate"], draws["level"]
    assert rate.shape == level.shape == (2000, SIZE)
    # about 5,000 effective draws of 10,000; the guide's means are 0.3 sd off
    sd = posterior.variance.sqrt()
    assert ((rate.mean(0) - posterior.mean) / sd).abs().max() < 0.1
    assert (rate.std(0) / sd - 1).abs().max() < 0.08
    assert (level.mean(0) - 0.5).abs().max() < 0.07
    # the latents of a data set stay together, those of others do not: both are independent here
    assert torch.corrcoef(rate.T).fill_diagonal_(0.0).abs().max() < 0.1
    guide.start_at(torch.cat([loc, 0.5 * one]), torch.cat((0.2 * sd / posterior.mean, 0.6 * one)))
    with pytest.warns(
        UserWarning, match=r"k-hat of \d+ of 12 posteriors is up to \d.*above 0.7 resampling"
    ):
        psis_resample(gammas, guide, 100, y)


class Spread(Posteriors):
    """Posteriors whose log weights have a noise of their own, a function of their shape."""

    noise = torch.zeros

    def log_weights(self, n):
        z, weights, rest = super().log_weights(n)
        return z, weights + type(self).noise(weights.shape), rest


def normal(sds):
    return staticmethod(lambda shape: sds * torch.randn(shape).double() - 0.5 * sds**2)


def pareto(shape):
    """One draw in 15 has a weight of a Pareto law of index 0.5."""
    excess = 0.5 * dist.Exponential(1.0).sample(shape).double()
    return excess * (torch.rand(shape) < 1 / 15)


@pytest.fixture
def spread():
    """Many posteriors, which are those of the guide but for noise of the weights."""
    y = torch.zeros(MANY).double()

    def model(y):
        with pyro.plate("sets", MANY):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoStructuredFlow(model)
    guide.set_up(y)
    guide.start_at(y, torch.full_like(y, 0.5**0.5))
    log_joint = ModelAndGuide.of(model, guide, (y,), {}).log_joint
    return Spread(**vars(Posteriors.of(log_joint, guide)))


def judged(posteriors, noise):
    type(posteriors).noise = noise
    torch.manual_seed(0)
    return weigh_each(posteriors, FitConfig(evaluation=EvaluationConfig(num_samples=2000)))


def test_many_good_posteriors_are_trusted_though_together_they_are_not(spread):
    each, joint, _ = judged(spread, normal(torch.full((MANY,), 0.2).double()))
    assert joint.khat > 0.7
    assert joint.log_evidence - joint.elbo > 2
    assert bool(each.trusted.all())
    assert each.objection == ""
    assert "each of the 300 posteriors of plate 'sets'" in each.praise
    exact = dist.Normal(0.0, 2**0.5).log_prob(torch.zeros(())).double()
    assert torch.allclose(each.log_evidence, exact.expand(MANY), atol=0.05)
    assert torch.allclose(each.elbo, exact - 0.02, atol=0.02)
    numbers = each.numbers(joint.elbo)
    assert numbers["khat"] == each.khat.max() < 0.7
    assert abs(numbers["log_evidence"] - MANY * float(exact)) < 1


def test_bad_ones_are_named(spread):
    sds = torch.full((MANY,), 0.1).double()
    sds[17], sds[204] = 3.0, 0.6
    each, _, _ = judged(spread, normal(sds))
    assert each.objections.keys() == {17, 204}
    assert not each.trusted[17]
    assert "2 of the 300 elements of plate 'sets' are not good" in each.objection
    assert "17 (k-hat" in each.objection
    assert "204 (an ELBO 0.1" in each.objection


def test_what_exceeds_a_bound_once_by_chance_is_not_named(spread):
    type(spread).noise = staticmethod(pareto)
    torch.manual_seed(0)
    once = sum(tail.khat > 0.7 for tail in fit_tails(spread.log_weights(2000)[1]))
    assert once >= 3
    assert len(judged(spread, staticmethod(pareto))[0].objections) <= once / 3


def eight_schools(y):
    with pyro.plate("sets", len(y), dim=-2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8, dim=-1):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def test_a_fit_names_the_posterior_of_absurd_data():
    y = 10 * torch.randn(SIZE, 8)
    y[3] = 1e6 * torch.tensor([1.0, -1.0] * 4)
    guide = AutoStructuredFlow(eight_schools)
    found = quick_fit(eight_schools, guide, y, seed=0, progress=False, num_steps=50)
    assert not found.trusted
    assert 3 in found.elements.objections
    assert " 3 (" in found.verdict


def test_modes_without_draws_are_found_for_each():
    """Of squares of about 9 the posterior has two modes, of those of less than 0 one."""
    y = torch.tensor([9.0, -1.0, 9.0, -2.0, -1.0]).double()

    def squares(y):
        with pyro.plate("sets", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 2.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(z**2, 0.5), obs=y)
            pyro.sample("x", dist.Normal(w, 1.0), obs=z.new_zeros(()))

    guide = AutoStructuredFlow(
        squares, init_loc_fn=init_to_value(values={"z": y.sign(), "w": 0 * y})
    )
    quick_fit(squares, guide, y, seed=0, progress=False, num_steps=100)
    log_joint = ModelAndGuide.of(squares, guide, (y,), {}).log_joint
    search = EachSearch(Posteriors.of(log_joint, guide), guide.rsample_and_log_prob(1000)[0])
    log_evidence = search.posteriors.log_weights(1000)[1].logsumexp(0) - math.log(1000)
    lost = search.shares_lost(FitConfig(), log_evidence)
    assert torch.allclose(lost, torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0]).double(), atol=0.05)
