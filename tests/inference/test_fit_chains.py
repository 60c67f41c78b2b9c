# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits that end in draws by chains."""

import math
import sys
import time

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics import importance
from pyro_artransform.diagnostics.checks import Check
from pyro_artransform.inference import first_draws
from pyro_artransform.inference.initialization.start import AT_DRAWS, UNCHANGED
from pyro_artransform.sampling import mcmc
from tests.inference import models
from tests.inference.conftest import SOON, Interrupting
from tests.inference.conftest import quick_fit as fit
from tests.inference.models import small
from tests.sampling.densities import schools, schools_moments
from tests.sampling.test_mcmc import flat, regression_moments
from tests.sampling.test_starts import AT_FIVE, narrow


def fitted(model, *args, **options):
    return fit(model, *args, **{"seed": 0, "progress": False, "draws": 400, **options})


def are_right(chains):
    """Draws of :func:`models.regression`, within five standard errors."""
    mean, sd = regression_moments()
    draws = torch.stack(
        [chains.by_chain["loc"].flatten(), chains.by_chain["scale"].log().flatten()]
    )
    ess = torch.stack([chains.ess["loc"], chains.ess["scale"]])
    assert ((draws.mean(1) - mean).abs() < 5 * sd / ess.sqrt()).all()
    assert ((draws.std(1) / sd - 1).abs() < 5 / ess.sqrt()).all()


def test_draws_say_how_many_and_nothing_else():
    numbers = {**SOON, "first_draws._NUM_DRAWS": 50}
    usual, same = (fitted(models.regression, draws=n, numbers=numbers) for n in (None, 50))
    assert usual.num_steps == same.num_steps > 0
    assert usual.history == same.history
    assert usual.verdict == same.verdict
    assert torch.equal(usual.draws["loc"], same.draws["loc"])


def test_draws_are_all_that_chains_kept():
    result = fitted(models.regression, num_steps=3)
    assert result.start == AT_DRAWS
    assert result.chains.trusted, result
    are_right(result.chains)
    assert result.draws is result.chains.draws
    assert result.chains.min_ess >= 400
    assert result.verdict.startswith("Draws trusted: ")
    for name, value in result.draws.items():
        assert torch.equal(value, result.chains.by_chain[name].flatten(0, 1))
        assert torch.equal(value.mean(0), result.summary()[name]["mean"])
    assert len(result.predict()["y"]) == len(result.draws["loc"])


def bent():
    """The data bend the posterior, so that no coordinates from the prior make it a Gaussian."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(z[..., 1] - z[..., 0] ** 2, 1.0), obs=torch.tensor(0.0))


def test_a_poor_guide_beside_trusted_draws_is_not_trusted():
    result = fitted(bent, AutoNormal(bent))
    assert result.verdict.startswith("Draws trusted: ")
    assert " About the guide alone: Not trusted: " in result.verdict
    assert result.ok
    assert result.failed == ()
    about = repr(result).index("About the guide alone (the draws do not depend on it): not trusted")
    assert repr(result).index("nats below the log evidence: the guide is not flexible") > about


def test_the_guide_is_where_the_draws_are():
    """On the unconstrained space, with their correlation."""
    torch.set_default_dtype(torch.float32)
    result = fitted(models.gaussian, draws=1000)
    flow, drawn = (
        torch.cat([value.reshape(len(value), -1) for value in each.values()], 1)
        for each in (result.guide.sample_posterior(20_000), result.draws)
    )
    assert ((flow.mean(0) - drawn.mean(0)).abs() < 0.2 * drawn.std(0)).all()
    assert torch.allclose(torch.corrcoef(flow.T), torch.corrcoef(drawn.T), atol=0.1)
    assert torch.allclose(flow.std(0), drawn.std(0), rtol=0.15)


def test_chains_that_have_not_mixed_are_not_trusted_whatever_the_guide_is(monkeypatch):
    """They end after a block: the guide is trained, and no other chains replace them."""
    begun, from_nothing = [], first_draws.from_nothing

    def ends_early(*args):
        ensemble = from_nothing(*args)
        run = ensemble.run
        monkeypatch.setattr(ensemble, "run", lambda count: run(count, most=16))
        begun.append(ensemble)
        return ensemble

    monkeypatch.setattr(first_draws, "from_nothing", ends_early)
    result = fitted(models.regression, small(models.regression), draws=2000)
    (ensemble,) = begun
    assert ensemble.num_trajectories < 40
    assert result.num_steps > 0
    assert not result.chains.trusted
    assert result.verdict.startswith("Draws not trusted: ")
    assert result.chains.num_gradients == ensemble.num_gradients
    assert len(result.draws["loc"]) == result.chains.by_chain["loc"].numel()


def near_five():
    loc = pyro.param("loc", torch.full((2,), 5.0))
    scale = pyro.param("scale", torch.full((2,), 0.02), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("is_written", [True, False], ids=["hand-written", "AutoNormal"])
def test_a_guide_that_no_chain_could_check_is_not_trusted(is_written):
    guide = near_five if is_written else AutoNormal(narrow, init_loc_fn=AT_FIVE, init_scale=0.02)
    result = fitted(narrow, guide, draws=None, numbers={})
    assert result.num_steps > 0
    assert not result.trusted
    assert not result.ok
    assert (result.draws, result.chains) == (None, None)
    words = "Not trusted: the guide was not checked by chains, since none could start: expected a"
    assert result.verdict.startswith(words)
    assert "region is not finite" in result.verdict
    assert result.failed[0].check is Check.NO_CHAINS
    same = fitted(narrow, guide, draws=100, num_steps=1)
    assert Check.NO_CHAINS in {each.check for each in same.failed}
    # without chains that check it: the guide alone
    result = fitted(narrow, guide, draws=0, num_steps=1)
    assert Check.NO_CHAINS not in {each.check for each in result.failed}


def test_draws_that_only_start_the_guide():
    result = fitted(models.regression, small(models.regression), draws=0, num_steps=3)
    assert result.draws is None
    assert result.chains is None
    assert (result.num_steps, result.start) == (3, AT_DRAWS)
    assert "Draws" not in result.verdict


def test_a_fit_has_draws_in_any_case():
    """And the guide is trained from them; a second fit goes on from the trained guide."""
    guide = small(models.regression)
    result = fitted(models.regression, guide, draws=None, num_steps=200, numbers={})
    assert (result.num_steps, result.start) == (200, AT_DRAWS)
    assert result.chains.trusted
    assert len(result.draws["loc"]) == result.chains.by_chain["loc"].numel()
    again = fitted(models.regression, guide, draws=None, num_steps=1, seed=1)
    assert again.start == UNCHANGED
    assert abs(again.elbo - result.elbo) < 0.1


@pytest.mark.parametrize("make", [AutoDelta, AutoNormal, lambda model: models.hand_written])
def test_any_guide(make):
    """Which may have no place to be put at, and is trained by Pyro's ELBO beside the draws."""
    result = fitted(models.regression, make(models.regression), num_steps=10)
    assert result.num_steps == 10
    assert result.chains.trusted, result
    are_right(result.chains)


def test_the_guide_is_weighed_in_its_own_coordinates():
    """Modes are searched for in those of the prior, which a Gaussian guide has not."""
    guide = AutoNormal(schools)
    result = fitted(schools, guide, draws=50, num_steps=30)
    expected = importance(schools, guide)
    noise = math.hypot(result.elbo_se, expected.elbo_se)
    assert abs(result.elbo - expected.elbo) < 5 * noise


def hierarchy():
    """The start is a median of few draws from the prior, and the guide has coordinates from the prior."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(loc, 1.0)), 1.0), obs=torch.ones(()))


@pytest.mark.parametrize("model", [models.regression, hierarchy])
@pytest.mark.parametrize("guides", [[], [AutoIAF]])
def test_draws_are_those_of_mcmc(model, guides):
    """With the same seed, whatever random numbers the guide takes."""
    made = [guide(model) for guide in guides]
    found = fitted(model, *made, draws=50, num_steps=1, seed=5)
    chains = mcmc(model, draws=50, seed=5, progress=False)
    assert torch.equal(found.draws["loc"], chains.draws["loc"])


def test_max_seconds_ends_steps_and_chains():
    result = fitted(models.regression, small(models.regression), draws=10**5, max_seconds=2.0)
    assert not result.chains.trusted
    assert result.chains.stopped_because == "the time limit was reached"
    assert "effective draws, not 100000" in result.verdict
    assert repr(result).startswith("Draws trusted: no, ")
    assert {each.check for each in result.failed} >= {Check.ESS}
    # the verdict comes after
    assert result.seconds < 10


def test_the_verdict_on_draws_is_said_before_the_guide_is_trained(capsys):
    seen = []

    def look(step, elbo):
        seen.append(capsys.readouterr().err)

    result = fitted(models.regression, num_steps=2, callback=look, progress=True)
    lines = [line for line in seen[0].splitlines() if line.startswith("Draws")]
    assert lines == [f"{result.chains.answer}. Training the guide (Ctrl-C keeps the draws)"]
    assert result.chains.answer == repr(result).splitlines()[0]
    fitted(models.regression, num_steps=2, callback=look)
    fitted(models.regression, num_steps=2, draws=0, callback=look, progress=True)
    assert "Draws" not in "".join([*seen[1:], capsys.readouterr().err])


def test_draws_are_kept_if_the_guide_is_not_wanted(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Interrupting())
    result = fitted(models.regression, small(models.regression), draws=None, progress=True)
    assert (result.num_steps, result.start) == (0, UNCHANGED)
    assert result.ok, result
    assert "it was interrupted after step 0" in result.verdict
    assert torch.isfinite(result.draws["loc"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regression", "schools"])
def test_errors_are_those_of_so_many_effective_draws(name):
    """Over 12 seeds: the root mean square of errors in their standard errors is about one."""
    model = {"regression": models.regression, "schools": schools}[name]
    errors = []
    for seed in range(12):
        pyro.clear_param_store()
        chains = fitted(model, seed=seed, numbers={}).chains
        assert chains.trusted, chains
        if name == "schools":
            mean, sd = schools_moments()
            draws, ess = flat(chains)
        else:
            mean, sd = regression_moments()
            loc, scale = chains.by_chain["loc"], chains.by_chain["scale"]
            draws = torch.stack([loc.flatten(), scale.log().flatten()], 1)
            ess = torch.stack([chains.ess["loc"], chains.ess["scale"]])
        errors.append((draws.mean(0) - mean) / sd * ess.sqrt())
    found = torch.stack(errors).square().mean(0).sqrt()
    # of 12 values of each latent, known to a fifth
    assert found.max() < 1.8
    assert 0.7 < found.square().mean().sqrt() < 1.4


def with_a_location():
    """Of a datum of 4 the location of the prior is 4, and the posterior has a sd of 0.5**0.5 there."""
    loc = pyro.param("loc", torch.tensor(3.0))
    z = pyro.sample("z", dist.Normal(loc, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(4.0))


def test_draws_are_those_at_the_parameters_that_were_trained():
    result = fitted(with_a_location, num_steps=400)
    assert pyro.param("loc").item() == pytest.approx(4.0, abs=0.3)
    mean, sd = pyro.param("loc").item() / 2 + 2, 0.5**0.5
    found = result.chains.by_chain["z"]
    assert abs(float(found.mean()) - mean) < 5 * sd / result.chains.min_ess**0.5


def test_chains_at_the_first_parameters_judge_no_trained_guide():
    result = fitted(with_a_location, num_steps=100, draws=None)
    assert result.draws is None
    assert result.marginals is None
    assert "Marginals not checked, since there are no chains" in result.verdict


def test_a_point_is_not_told_that_chains_have_not_mixed():
    result = fitted(models.gaussian, AutoDelta(models.gaussian), num_steps=10)
    assert "since the guide has a point mass or draws that are not finite" in result.verdict


def test_the_time_of_chains_is_their_own():
    def slow(*_):
        time.sleep(0.02)

    result = fitted(models.regression, draws=None, num_steps=20, callback=slow)
    assert result.chains.seconds < result.seconds - 0.4
