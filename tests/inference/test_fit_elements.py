# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits by mini-batches of models with latents in crossed and nested plates."""

from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoStructuredFlow
from tests.inference.conftest import quick_fit as fit
from tests.inference.loaders import shuffled

NUM_USERS, NUM_ITEMS, NUM_ROWS, NOISE = 20, 40, 300, 0.5
loader_of = partial(shuffled, batch_size=50)


def crossed_plates(user, item, y, scale, family):
    with pyro.plate("users", NUM_USERS):
        a = pyro.sample("a", dist.Normal(0.0, scale))
    with pyro.plate("items", NUM_ITEMS):
        b = pyro.sample("b", dist.Normal(0.0, 0.9))
    with pyro.plate("rows", NUM_ROWS, subsample_size=len(y)):
        pyro.sample("y", family(a[..., user] + b[..., item]), obs=y)


def crossed(*data):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    crossed_plates(*data, 0.7, lambda loc: dist.Normal(mean + loc, NOISE))


def counts(*data):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    crossed_plates(*data, sd, lambda loc: dist.Poisson((mean + loc).exp()))


def with_outliers(*data):
    freedom = pyro.sample("freedom", dist.Gamma(2.0, 0.1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    crossed_plates(*data, 0.7, lambda loc: dist.StudentT(freedom, loc, scale))


def ratings():
    generator = torch.Generator().manual_seed(0)
    user = torch.randint(NUM_USERS, (NUM_ROWS,), generator=generator)
    item = torch.randint(NUM_ITEMS, (NUM_ROWS,), generator=generator)
    y = torch.randn(NUM_ROWS, generator=generator) + (user % 3 + item % 4) / 3
    return user, item, y


def exact(user, item, y):
    """Mean and sds of all latents, and the log evidence."""
    one_hot = torch.nn.functional.one_hot
    design = torch.cat(
        [torch.ones(len(y), 1), one_hot(user, NUM_USERS), one_hot(item, NUM_ITEMS)], 1
    )
    prior = torch.tensor([4.0, *[0.49] * NUM_USERS, *[0.81] * NUM_ITEMS])
    covariance = (design.T @ design / NOISE**2 + prior.reciprocal().diag()).inverse()
    marginal = NOISE**2 * torch.eye(len(y)) + design * prior @ design.T
    evidence = dist.MultivariateNormal(torch.zeros(len(y)), marginal).log_prob(y)
    return covariance @ design.T @ y / NOISE**2, covariance.diagonal().sqrt(), float(evidence)


def test_crossed_plates():
    """The guide and its Gaussian start are found from batches, which are all that the fit sees."""
    data = ratings()
    mean, sd, evidence = exact(*data)
    result = fit(crossed, loader=loader_of(*data), num_steps=1, seed=0, progress=False)
    assert isinstance(result.guide, AutoStructuredFlow)
    assert result.start == "a Gaussian fitted by natural-gradient steps"
    assert result.khat < 0.7
    # links of users through items beyond four eigenvectors are left out
    assert evidence - 0.1 < result.elbo < evidence + 4 * result.elbo_se + 1e-6
    draws = result.guide.sample_posterior(10_000)
    flat = torch.cat([draws["mean"][:, None], draws["a"], draws["b"]], 1)
    # five standard errors of 10,000 draws, and what is left out
    assert ((flat.mean(0) - mean).abs() < 0.06 * sd).all()
    assert ((flat.std(0) / sd - 1).abs() < 0.06).all()
    graph = result.guide.graph
    assert graph.root == (("mean",),)
    assert graph.parents("a", 0) == (("mean",),)
    linked = {("a", int(i)) for i in data[0][data[1] == 7]}
    assert set(graph.parents("b", 7)) == {("mean",), *linked}


def test_a_guide_of_elements_is_saved(tmp_path):
    data, path = ratings(), tmp_path / "guide.pt"
    guide = AutoStructuredFlow(crossed)
    fit(crossed, guide, loader=loader_of(*data), num_steps=2, progress=False)
    guide.save(path)
    loaded = AutoStructuredFlow(crossed)
    loaded.set_up(*data)  # with all data, not by elements
    loaded.load(path)
    values = guide.sample_posterior(5)
    assert torch.allclose(loaded.log_prob(values), guide.log_prob(values))
    assert loaded.graph.elimination == guide.graph.elimination


@pytest.mark.slow
def test_nested_plates_with_unknown_scales():
    num_schools, num_classes, num_rows = 12, 60, 600
    generator = torch.Generator().manual_seed(1)
    school_of = torch.arange(num_classes) % num_schools
    of_class = torch.randint(num_classes, (num_rows,), generator=generator)
    effects = torch.randn(num_schools, generator=generator), torch.randn(60, generator=generator)
    y = effects[0][school_of[of_class]] + 0.5 * effects[1][of_class]
    y = y + torch.randn(num_rows, generator=generator)

    def nested(index, y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("schools", num_schools):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("classes", num_classes):
            v = pyro.sample("v", dist.Normal(u[..., school_of], scale))
        with pyro.plate("rows", num_rows, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(v[..., index], 1.0), obs=y)

    options = {"num_steps": 200, "seed": 0, "progress": False}
    result = fit(nested, loader=loader_of(of_class, y), **options)
    assert isinstance(result.guide, AutoStructuredFlow)
    assert result.khat < 0.7
    whole = fit(nested, of_class, y, guide=AutoStructuredFlow(nested), **options)
    errors = result.log_evidence_se + whole.log_evidence_se
    assert abs(result.log_evidence - whole.log_evidence) < 4 * errors + 0.05
    assert set(result.guide.graph.parents("v", 13)) == {("scale",), ("u", 1)}


def test_many_elements_that_rows_read_in_pairs_have_another_guide():
    def paired(home, away, y):
        with pyro.plate("teams", 210):
            skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
        with pyro.plate("games", 100, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(skill[..., home] - skill[..., away], 1.0), obs=y)

    home, away = torch.randint(210, (2, 100), generator=torch.Generator().manual_seed(0))
    loader = loader_of(home, (home + 1 + away % 209) % 210, torch.zeros(100))
    result = fit(paired, loader=loader, num_steps=1, progress=False)
    assert result.rows()["guide"] == "AutoIAF, for 210 latents and subsampled data"


def test_the_gaussian_so_far_at_a_time_limit():
    data = ratings()
    result = fit(crossed, loader=loader_of(*data), max_seconds=0.1, progress=False)
    assert "the time limit was reached" in result.verdict
    assert result.start == "a Gaussian fitted by natural-gradient steps"
    assert -1e4 < result.elbo < exact(*data)[2]


NUM_GAMES = 400


def matches(home, away, y):
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("teams", NUM_USERS):
        skill = pyro.sample("skill", dist.Normal(0.0, sd))
    with pyro.plate("games", NUM_GAMES, subsample_size=len(y)):
        won = dist.Bernoulli(logits=skill[..., home] - skill[..., away])
        pyro.sample("y", won, obs=y)


def test_rows_that_read_two_elements_of_a_plate():
    """Teams that have met depend on each other: they are shared latents, fully dependent."""
    generator = torch.Generator().manual_seed(0)
    home = torch.randint(NUM_USERS, (NUM_GAMES,), generator=generator)
    away = (home + 1 + torch.randint(NUM_USERS - 1, (NUM_GAMES,), generator=generator)) % NUM_USERS
    y = (home > away).float()
    guide = AutoStructuredFlow(matches)
    loader = loader_of(home, away, y)
    result = fit(matches, guide, loader=loader, num_steps=1, seed=0, progress=False)
    assert result.start == "a Gaussian fitted by natural-gradient steps"
    assert len(guide.graph.root) == 1 + NUM_USERS
    # The Gaussian of the start is 0.7 to 1.7 nats below, since the posterior is skewed: better teams always
    # win. Independent teams would cost 2.8 more. The median, since the mean of weights of a k-hat of 0.8
    # varies by two nats.
    assert result.log_evidence - result.importance.log_weights.median() < 2.5


@pytest.mark.parametrize("model", [pytest.param(counts, marks=pytest.mark.slow), with_outliers])
def test_the_start_far_from_normal_data(model):
    """A full Newton step from the medians of the prior overshoots by hundreds of nats."""
    user, item, y = ratings()
    y = (y.exp() + 5).round() if model is counts else torch.where(user == 3, 30 * y, y)
    result = fit(model, loader=loader_of(user, item, y), num_steps=1, seed=0, progress=False)
    assert result.start == "a Gaussian fitted by natural-gradient steps"
    # of a Gaussian, in nats; full steps ended in a singular matrix, and 140 nats lower
    assert result.log_evidence - result.elbo < 10
