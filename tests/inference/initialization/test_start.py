# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0


import math
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_value
from torch import nn

from pyro_artransform import AutoAmortized, AutoIAF, AutoStructuredFlow
from pyro_artransform.inference.initialization.start import (
    AT_BATCHES,
    AT_DRAWS,
    FAILED,
    UNCHANGED,
    find_initial_minibatch_guide,
    find_start,
    minibatch_density,
)
from pyro_artransform.inference.loader import Batch
from pyro_artransform.inference.optimization.objective import PyroObjective
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling.run_mcmc import from_nothing
from tests.inference import models
from tests.inference.conftest import quick_fit
from tests.inference.models import small


def start_of(model, guide, num_draws=100):
    guide.set_up()
    log_joint = LogJoint(model).with_coordinates(guide.prior_coordinates)
    ensemble = from_nothing(log_joint, num_draws)
    ensemble.run(num_draws)
    return find_start(log_joint, guide, ensemble)


def elbo(model, guide, count=2000):
    with torch.no_grad():
        z, log_q = guide.rsample_and_log_prob(count)
        return (LogJoint(model)(z) - log_q).mean().item()


def state(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def best_diagonal():
    """The ELBO of the best Gaussian without correlations."""
    scale_tril = torch.tensor(models.SCALE_TRIL)
    precision = torch.cholesky_inverse(scale_tril)
    best = dist.Normal(torch.ones(3), precision.diagonal().rsqrt())
    return -torch.distributions.kl_divergence(
        dist.MultivariateNormal(best.mean, covariance_matrix=best.variance.diag()),
        dist.MultivariateNormal(torch.ones(3), scale_tril=scale_tril),
    )


@pytest.mark.parametrize(
    ("model", "options", "best", "below", "above"),
    [
        (models.raw_scales, {}, models.raw_scales_evidence, 1.0, 0.1),
        (models.gaussian, {"full_rank": False}, best_diagonal, 0.2, 0.2),
        # its mode is in the neck, which is no place to start
        (models.funnel, {"coordinates": "model"}, lambda: 0.0, 3.0, 0.1),
    ],
)
def test_the_start_is_as_good_as_a_gaussian_can_be(model, options, best, below, above):
    guide = small(model, **options)
    found, expected = start_of(model, guide), best()
    assert found.name == AT_DRAWS
    for value in (found.elbo, elbo(model, guide)):
        assert expected - below < value < expected + above


def test_no_candidate_loses_to_the_noise_of_a_wide_guide():
    """The standard error of its ELBO is as large as the ELBO, by a single draw."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Poisson(z.exp()), obs=torch.tensor(100.0))

    torch.manual_seed(0)
    assert start_of(model, small(model, init_scale=10.0)).name != UNCHANGED


@pytest.mark.usefixtures("quick")
def test_a_guide_that_is_good_already_stays_as_it_is():
    guide = small(models.gaussian)
    guide.set_up()
    guide.start_at(torch.ones(3), torch.tensor(models.SCALE_TRIL))
    before = state(guide)
    assert start_of(models.gaussian, guide, 50).name == UNCHANGED
    assert same(before, state(guide))


@pytest.mark.usefixtures("quick")
def test_starts_that_are_not_finite_are_skipped():
    """The density is NaN around where the guide is, and at most of the candidates."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.full((2,), 3.0), 1.0).to_event(1))
        pyro.factor("root", 0 * (z[..., 0] - 1).sqrt())

    guide = small(model, init_loc_fn=init_to_value(values={"z": torch.zeros(2)}))
    with pyro.validation_enabled(False):
        found = start_of(model, guide, 50)
    assert found.name != UNCHANGED
    assert torch.tensor(found.elbo).isfinite()
    assert all(value.isfinite().all() for value in guide.parameters())
    assert (guide.sample_posterior(100)["z"].mean(0) - 3).abs().max() < 1


def test_where_chains_find_nothing_the_guide_stays_and_the_verdict_says_so():
    """Only draws within 1e-9 of zero have a density, and no search is as narrow as the guide."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("narrow", torch.where(z.abs().amax(-1) < 1e-9, 0.0, torch.nan))

    start = init_to_value(values={"z": torch.zeros(2)})
    guide = small(model, init_loc_fn=start, init_scale=1e-11)
    with pyro.validation_enabled(False):
        result = quick_fit(model, guide, num_steps=1, progress=False)
    assert result.start == FAILED
    assert "Initialization failed, since no Gaussian" in result.verdict
    assert all(value.isfinite().all() for value in guide.parameters())


def test_a_model_without_gradients():
    @torch.no_grad()
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match=r"got one without: does the model use torch\.no_grad"):
        quick_fit(model, small(model), progress=False)


def test_nothing_finite_with_infinite_data():
    """The site is named."""

    def model(x, tables, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("fine", dist.Normal(slope, 1.0), obs=torch.tensor(0.0))
        loc = slope * (x + sum(tables["more"]))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    x = torch.tensor([0.0, 1.0, torch.inf])
    tables = {"more": (torch.zeros(3), torch.full((3,), torch.nan))}
    words = (
        r"^(?!.*fine).*finite log density.*"
        r"y is not finite\. Tried were .* The prior may exclude the data: check supports, priors and data\. "
        r"Give an init_loc_fn with values at which density and gradient are finite$"
    )
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=words):
        quick_fit(model, small(model), x, tables, y=torch.zeros(3), progress=False)


# Elements of mini-batches: near the posterior of all data from one of them

SIZE, BATCH = 400, 40


def hierarchy(y, unit=1.0, total=SIZE):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 1e3 * unit))
    with pyro.plate("groups", total, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(mean, unit))
        pyro.sample("y", dist.Normal(z, 0.5 * unit), obs=y)


def drawing(y, size=BATCH):
    """The same, with a mini-batch that the plate draws."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1e3))
    with pyro.plate("groups", len(y), subsample_size=size):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=pyro.subsample(y, event_dim=0))


class Encoder(nn.Module):
    def forward(self, y):
        return pyro.subsample(y, event_dim=0)[:, None]


def chains_of(density):
    ensemble = from_nothing(density, 400)
    ensemble.run(400)
    return ensemble


def started(model, y, guide=None):
    guide = guide or AutoAmortized(model, Encoder())
    guide(y)
    batch, log_joint = Batch((y,), {}), LogJoint(model, (y,))
    elbo_draws = PyroObjective(model, guide, batch, log_joint).elbo_draws
    start = find_initial_minibatch_guide(log_joint, guide, batch, elbo_draws, chains_of)
    return guide, start


@pytest.mark.parametrize("unit", [1.0, 1e4])
def test_globals_are_near_the_posterior_of_all_data(unit):
    y, model = unit * (70.0 + torch.randn(BATCH) * 1.25**0.5), partial(hierarchy, unit=unit)
    guide, start = started(model, y, AutoAmortized(model, Encoder(), coordinates="model"))
    assert start.name == AT_BATCHES
    draws = guide.sample_posterior(2000, y)
    scale = unit * (1.25 / SIZE) ** 0.5
    # a mini-batch knows as much as this
    assert (draws["mean"].mean() - y.mean()).abs() < 0.2 * scale
    assert (draws["mean"].std() / scale - 1).abs() < 0.1
    local = guide.transform.locals[0].affine
    assert (local.log_scale.exp() / (unit * 0.2**0.5) - 1).abs() < 0.1
    # 1 / 5 is what the prior's mean weighs, beside an element's data: the sd over 40 seeds is 0.1
    slope = (local.linear.weight[0, -1] / math.sqrt(SIZE)).item()
    assert abs(slope / (0.2 * scale) - 1) < 0.4
    if unit == 1.0:
        steps_follow_the_noise_of_mini_batches(guide)


def steps_follow_the_noise_of_mini_batches(guide):
    ratio = SIZE / BATCH
    units = {id(parameter): unit for parameter, unit in guide.step_scales().items()}
    *flow, affine = guide.transform.globals.transform.transforms
    scale = affine.log_scale.detach().exp()
    assert torch.allclose(units.pop(id(affine.loc)), math.sqrt(ratio) * scale)
    bent = [parameter for part in flow for parameter in part.parameters()]
    assert units.keys() == {id(parameter) for parameter in bent}
    assert all(unit == ratio**-0.5 for unit in units.values())


def test_a_guide_that_is_better_already_stays():
    y = torch.randn(BATCH)
    guide = AutoAmortized(hierarchy, Encoder(), flow=None, local_flow=None)
    _, first = started(hierarchy, y, guide)
    local = guide.transform.locals[0]
    local.units = None  # a slope in y as it is, which a Gaussian would shift
    with torch.no_grad():
        local.affine.loc.zero_()
        local.affine.linear.weight[0, 0] = 0.8
    before = state(guide)
    _, start = started(hierarchy, y, guide)
    assert start.name == UNCHANGED
    assert start.elbo > first.elbo
    assert same(before, state(guide))


def test_of_a_plate_that_draws_its_mini_batch():
    y = 70.0 + torch.randn(10 * 20) * 1.25**0.5
    guide, start = started(partial(drawing, size=20), y)
    assert start.name != UNCHANGED
    mean = guide.sample_posterior(1000, y)["mean"]
    assert (mean.mean() - y.mean()).abs() < 5 * (1.25 / 20) ** 0.5
    assert (mean.std() / (1.25 / len(y)) ** 0.5 - 1).abs() < 0.1


def test_the_prior_of_shared_latents_counts_once():
    """In the density of a mini-batch alone, which is a function though the plate draws."""
    y, z = torch.randn(BATCH), torch.randn(7, 1 + BATCH)
    prior = dist.Normal(0.0, 1e3).log_prob(z[:, 0])
    local = dist.Normal(z[:, :1], 1.0).log_prob(z[:, 1:]).sum(-1)
    data = dist.Normal(z[:, 1:], 0.5).log_prob(y).sum(-1)
    density = minibatch_density(LogJoint(hierarchy, (y,)), BATCH / SIZE, ["mean"])
    assert torch.allclose(density(z), prior + local + data)

    def positive():
        with pyro.plate("groups", SIZE, subsample_size=BATCH):
            pyro.sample("rate", dist.LogNormal(0.0, 1.0))

    # the Jacobian of elements counts once, as their density does
    density = minibatch_density(LogJoint(positive), BATCH / SIZE)
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 1:]).sum(-1)
    assert torch.allclose(density(z[:, 1:]), expected)
    log_joint = LogJoint(drawing, (torch.randn(SIZE),))
    density = minibatch_density(log_joint, BATCH / SIZE, ["mean"])
    state = torch.get_rng_state()
    assert torch.equal(density(z), density(z))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(log_joint(z), log_joint(z))


@pytest.mark.parametrize("guide", [AutoIAF, AutoStructuredFlow])
def test_vague_priors(guide):
    """As BUGS had them: all draws of the prior are far from where the data can be, and so are medians."""

    def model():
        precision = pyro.sample("precision", dist.Gamma(0.001, 0.001))
        mean = pyro.sample("mean", dist.Normal(0.0, 1000.0))
        with pyro.plate("groups", 6):
            logits = pyro.sample("logits", dist.Normal(mean, precision.rsqrt()))
            counts = torch.tensor([10.0, 23.0, 17.0, 5.0, 26.0, 8.0])
            pyro.sample("y", dist.Binomial(50.0, logits=logits), obs=counts)

    made = guide(model)
    found = quick_fit(model, made, draws=100)
    assert found.chains.trusted
    pooled = torch.tensor(89 / 300).logit()
    assert abs(found.draws["mean"].mean() - pooled) < 0.4
    assert -2 < found.draws["precision"].log().mean() < 4


# Where one mini-batch says little about some global latents

USERS, PER_BATCH = 100, 10
TIME = torch.tensor([-1.0, 0.0, 1.0])


def correlated(y, total=USERS):
    """Intercepts and slopes of users, of which the slopes and the correlation have hardly any data."""
    rho = pyro.sample("rho", dist.Uniform(y.new_tensor(-1.0), 1.0))
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    slope = pyro.sample("slope", dist.Normal(y.new_zeros(()), 2.0))
    of_mean = pyro.sample("of_mean", dist.HalfNormal(y.new_ones(())))
    of_slope = pyro.sample("of_slope", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("users", total, subsample_size=len(y)):
        a = pyro.sample("a", dist.Normal(mean, of_mean))
        loc = slope + rho * of_slope / of_mean * (a - mean)
        b = pyro.sample("b", dist.Normal(loc, of_slope * torch.sqrt(1 - rho**2)))
        line = a[..., None] + b[..., None] * TIME.to(y)
        pyro.sample("y", dist.Normal(line, 0.5).to_event(1), obs=y)


def features(y, total=USERS):
    return torch.stack([y.mean(-1), (y * TIME.to(y)).mean(-1)], -1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_correlation_and_a_scale(seed):
    """They start neither at the edge of the support nor at zero, where float32 has no gradient."""
    torch.manual_seed(1)
    e = torch.randn(USERS, 2, dtype=torch.float32)
    lines = 1 + 0.8 * e[:, :1] + (0.1 * e[:, 1:] - 0.5) * TIME.to(e)
    y = lines + 0.5 * torch.randn(USERS, 3, dtype=torch.float32)
    guide, begun = AutoAmortized(correlated, features), []

    def callback(step, elbo):
        if not begun:
            begun.append(guide.median(y))

    batches = list(y.split(PER_BATCH))
    options = {"num_steps": 100, "num_particles": 8, "seed": seed, "progress": False}
    result = quick_fit(correlated, guide, loader=batches, callback=callback, **options)
    assert begun[0]["rho"].abs() < 0.9
    assert 0.02 < begun[0]["of_slope"] < 1.0
    assert result.num_skipped == 0
    # -366 and -368, and -353 after 1,500 steps; from scales near zero it is below -1e4
    assert result.elbo > -400
