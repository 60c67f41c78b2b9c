# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits by mini-batches: what they reach, see and say."""

import math
import time

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_artransform
from pyro_artransform import AutoAmortized
from pyro_artransform.diagnostics import importance
from pyro_artransform.inference.initialization.start import AT_BATCHES
from tests.inference import loaders
from tests.inference.conftest import SOON
from tests.inference.conftest import quick_fit as fit
from tests.inference.loaders import DIM, Autoencoder, listed, rows, shuffled, small


def fitted(model, guide, loader, **kwargs):
    options = {"num_particles": 4, "progress": False}
    return fit(model, guide, loader=loader, **{**options, **kwargs})


def check(result, steps):
    assert result.num_steps == len(result.history) == steps
    assert result.num_skipped == 0
    assert all(map(math.isfinite, result.history))
    assert math.isfinite(result.elbo)
    assert result.elbo_se >= 0
    return result


def test_regression_reaches_the_posterior(capfd):
    """Of 43 rows in batches of 10, the last of them of 3."""
    x, y = rows()
    mean, sd, evidence = loaders.exact(x, y)
    guide = small(loaders.regression)
    options = {"epochs": 40, "num_particles": 16, "seed": 0}
    result = fitted(loaders.regression, guide, shuffled(x, y), **options)
    check(result, 200)
    draws = guide.sample_posterior(10_000)["weights"]
    # an error of the fit of 0.05 deviations, and 0.01 by the number of draws
    assert ((draws.mean(0) - mean).abs() < 0.1 * sd).all()
    assert ((draws.std(0) / sd - 1).abs() < 0.1).all()
    assert abs(result.elbo - evidence) < 0.05 + 4 * result.elbo_se
    assert result.start == AT_BATCHES
    assert capfd.readouterr() == ("", "")
    assert result.trusted
    assert "other modes were not searched for" in result.verdict
    assert abs(result.log_evidence - evidence) < 4 * result.log_evidence_se + 1e-6
    assert "nan" not in repr(result)


def padded(x, y, mask):
    """Batches of one shape, of which a mask says which rows are there."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(DIM), 3.0).to_event(1))
    scale, here = poutine.scale(scale=43 / float(mask.sum())), poutine.mask(mask=mask.bool())
    with pyro.plate("data", len(x)), scale, here:
        pyro.sample("y", dist.Normal((x * weights).sum(-1), loaders.NOISE), obs=y)


@pytest.mark.slow
def test_a_padded_last_batch_has_the_weight_of_its_rows():
    """Those that are there do not show in the shapes."""
    x, y = rows()
    y = y + torch.arange(43).ge(40) * 30  # the last three rows matter
    mean, sd, _ = loaders.exact(x, y)
    parts = [torch.nn.functional.pad(v, (0,) * (2 * v.dim() - 1) + (7,)).split(10) for v in (x, y)]
    masks = (torch.arange(50) < 43).split(10)
    guide, options = small(padded), {"epochs": 60, "num_particles": 8, "seed": 0}
    fitted(padded, guide, list(zip(*parts, masks)), **options)
    draws = guide.sample_posterior(2000)["weights"]
    assert ((draws.mean(0) - mean).abs() < 0.5 * sd).all()


def test_stock_guide():
    x, y = rows()
    mean, sd, evidence = loaders.exact(x, y)
    guide = AutoNormal(loaders.regression)
    options = {"epochs": 80, "num_particles": 16, "seed": 0}
    result = check(fitted(loaders.regression, guide, shuffled(x, y), **options), 400)
    assert ((guide.median()["weights"] - mean).abs() < 0.3 * sd).all()
    assert result.trusted
    assert result.importance.num_samples == 400
    assert abs(result.log_evidence - evidence) < 4 * result.log_evidence_se


def test_autoencoder():
    """Guide and model are trained, and a short last batch is one more."""
    networks, (x, _) = Autoencoder(), rows()
    guide = networks.guide()
    guide(x[:10])
    before = {name: value.detach().clone() for name, value in networks.named_parameters()}
    result = check(fitted(networks.model, guide, shuffled(x), epochs=20, seed=0), 100)
    assert all(not torch.equal(v, before[k]) for k, v in networks.named_parameters())
    assert sum(result.history[-10:]) > sum(result.history[:10]) + 1
    assert "of the 43 elements of plate 'rows': element" in result.verdict
    assert math.isnan(result.log_evidence)
    assert not guide.path


@pytest.mark.slow
def test_amortized_locals_and_globals():
    _, y = rows()
    guide = AutoAmortized(loaders.groups, loaders.Mean(), flow=None, local_flow=None)
    options = {"epochs": 160, "num_particles": 8, "seed": 0}
    result = fitted(loaders.groups, guide, shuffled(y), **options)
    check(result, 800)
    # a linear encoder can be exact; what is left is the noise of the batches
    evidence = loaders.groups_evidence(y)
    assert -1 < result.elbo - evidence < 4 * result.elbo_se
    # the verdict by element
    assert result.trusted, result
    assert abs(result.log_evidence - evidence) < 0.1
    assert len(result.elements["groups"].khat) == 43
    assert result.importance.num_samples == result.num_samples == 250
    assert "other modes were not searched for" in result.verdict
    part = fitted(loaders.groups, guide, shuffled(y[:20]), epochs=1)
    assert not part.trusted
    assert not part.elements
    assert "a pass over the loader covers 46.5 % of the data" in part.verdict


def test_a_loader_of_one_batch_is_as_good_as_arguments():
    x, y = rows()
    _, _, evidence = loaders.exact(x, y)
    loader, options = (
        shuffled(x, y, batch_size=100),
        {"epochs": 150, "num_particles": 16, "seed": 0},
    )
    result = fitted(loaders.regression, small(loaders.regression), loader, **options)
    assert result.num_steps == 150
    assert result.trusted, result
    assert abs(result.log_evidence - evidence) < 0.02


def test_weights_of_all_data_from_a_pass():
    """Those of the same draws with all data at once."""
    x, y = rows()
    guide = small(loaders.regression)
    result = fitted(loaders.regression, guide, shuffled(x, y), epochs=3, seed=0)
    check(result, 15)
    found = importance(loaders.regression, guide, 5_000, x, y)
    # both errors are zero if the start, which is exact, is better than the steps
    assert abs(result.elbo - found.elbo) <= 5 * math.hypot(result.elbo_se, found.elbo_se) + 1e-6
    assert result.elbo_se <= 3 * found.elbo_se * 5_000**0.5 / 1000**0.5 + 1e-6
    assert abs(result.log_evidence - found.log_evidence) < 0.2
    for loader in (shuffled(x, y, drop_last=True), loaders.weighted(x, y), loaders.Unknown(x, y)):
        result = fitted(loaders.regression, small(loaders.regression), loader, num_steps=3)
        assert math.isnan(result.khat)
        assert result.importance is None
        assert result.elbo_se > 0.3  # the batches that nobody saw, of which there may be any


@pytest.mark.slow
def test_an_amortized_guide_in_a_loop_says_how_long_it_takes_and_ends_in_time():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 200, subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))[:, None]
            pyro.sample("y", dist.Normal(z.expand(len(y), 5), 1.0).to_event(1), obs=y)

    guide, began = AutoAmortized(model, lambda y: y), time.perf_counter()
    options = {"loader": torch.randn(200, 5).split(50), "max_seconds": 8, "progress": False}
    with pytest.warns(UserWarning, match=r"about .* seconds, and [\d,]+ steps about") as caught:
        result = pyro_artransform.fit(model, guide, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    # it took a minute, without a step; on a busy machine the last batch of a phase takes its time
    assert time.perf_counter() - began < 20
    assert result.one_at_a_time
    assert "increase max_seconds" in result.verdict


def test_arguments_of_all_kinds():
    seen = []

    def model(x, y, size):
        seen.append((len(x), size))
        loaders.regression(x, y, size)

    x, y = rows()
    by_name = [{"x": a, "y": b} for a, b in listed(x, y)]
    for loader in (listed(x, y), [*map(list, listed(x, y))], by_name):
        seen.clear()
        check(fitted(model, small(model), loader, num_steps=7, size=43), 7)
        # passes over all data join batches
        assert set(seen) == {(10, 43), (3, 43), (43, 43)}


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_each_step_sees_the_next_batch(kind):
    """After the trials of step sizes the loader is at its beginning."""
    seen, at_step = [], []

    def model(x, y):
        seen.append(x[0, 0].item())
        loaders.regression(x, y)

    def callback(step, elbo):
        at_step.append(seen[-1])

    batches = listed(*rows())
    fitted(model, kind(model), batches, epochs=3, callback=callback)
    assert at_step == [batch[0][0, 0].item() for batch in batches] * 3


def test_draws_by_passes_over_a_loader():
    x, y = rows()
    mean, sd, _ = loaders.exact(x, y)
    guide = small(loaders.regression)
    result = fitted(loaders.regression, guide, shuffled(x, y), draws=200, seed=0)
    assert result.trusted, result
    draws = result.draws["weights"]
    assert len(draws) >= 200
    assert draws.shape[1:] == (DIM,)
    # four standard errors of 200 effective draws
    assert ((draws.mean(0) - mean).abs() < 4 * sd / 200**0.5).all()


def test_ends_by_itself():
    numbers = {**SOON, "optimization.schedule._MAX_CONSTANT": 3000}
    x, y = rows()
    guide = AutoNormal(loaders.regression)
    result = fitted(loaders.regression, guide, shuffled(x, y), seed=1, numbers=numbers)
    assert result.stopped_because == "the ELBO stopped improving"
    assert 40 <= result.num_steps <= 500
    assert not result.num_steps % 5
