# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws by chains, beside moments that are known."""

import math
import re
import signal
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)

from pyro_artransform import AutoIAF, capture
from pyro_artransform.diagnostics.chains import GuideChains
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.inference import mcmc as run
from pyro_artransform.inference.evaluation.missed_modes import NOT_SEARCHED
from pyro_artransform.inference.mcmc import to_chains
from pyro_artransform.time_limit import TimeLimit
from tests.inference import models
from tests.inference.models import small

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def mcmc(model, guide, num_samples=400, *args, **options):
    return run(model, guide, num_samples, *args, **{"seed": 0, "progress": False, **options})


def schools():
    """The eight schools, centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, torch.tensor(ERRORS)), obs=torch.tensor(EFFECTS))


def schools_moments():
    """Means and sds of mu, log tau and the effects, by quadrature over log tau."""
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
    total = weights @ loc
    return total, (weights @ (var + (loc - total) ** 2)).sqrt()


def flat(chains):
    """All draws of the schools on the unconstrained space, shape ``(n, 10)``."""
    mu, tau, theta = (chains.by_chain[name].flatten(0, 1) for name in ("mu", "tau", "theta"))
    return torch.cat([mu[:, None], tau.log()[:, None], theta], 1)


def flat_ess(chains):
    return torch.cat([chains.ess[name].reshape(-1) for name in ("mu", "tau", "theta")])


def started(guide):
    guide()
    return guide


@pytest.mark.parametrize(
    "make",
    [
        partial(AutoIAF, num_transforms=2, hidden_dims=8),
        pytest.param(AutoNormal, marks=pytest.mark.slow),
        pytest.param(AutoMultivariateNormal, marks=pytest.mark.slow),
    ],
)
def test_eight_schools(make):
    """Of guides that nobody has trained; where a guide has no coordinates of the prior it takes longer."""
    chains = mcmc(schools, make(schools), 1000)
    assert chains.trusted, chains
    mean, sd = schools_moments()
    draws, ess = flat(chains), flat_ess(chains)
    assert ((draws.mean(0) - mean).abs() < 5 * sd / ess.sqrt()).all()
    # log tau has a tail: a kurtosis of about six
    assert ((draws.std(0) / sd - 1).abs() < 5 * 1.2 / ess.sqrt()).all()
    assert chains.min_ess >= 1000
    assert chains.max_rhat <= 1.02


def regression_guide():
    """Of :func:`models.regression`, without a transform, and far from good."""
    pyro.sample("scale", dist.LogNormal(0.5, 1.0))
    pyro.sample("loc", dist.Normal(0.0, 2.0))


def regression_moments():
    """The mean and sd of the location and of the log of the scale, by quadrature."""
    loc, log_scale = torch.meshgrid(
        torch.linspace(-8, 10, 400), torch.linspace(-3, 4, 400), indexing="ij"
    )
    data = dist.Normal(loc[..., None], log_scale.exp()[..., None]).log_prob(models.data()).sum(-1)
    prior = dist.Normal(0.0, 3.0).log_prob(loc) + dist.Normal(0.0, 1.0).log_prob(log_scale)
    weights = (data + prior).flatten().softmax(0)
    points = torch.stack([loc.flatten(), log_scale.flatten()])
    mean = points @ weights
    return mean, ((points - mean[:, None]).square() @ weights).sqrt()


GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAF": small,
    "hand-written": lambda model: regression_guide,
}


@pytest.mark.parametrize("kind", GUIDES)
def test_guides(kind):
    model = models.regression
    chains = mcmc(model, GUIDES[kind](model), 400)
    assert chains.trusted, chains
    mean, sd = regression_moments()
    loc, scale = (chains.by_chain[name].flatten() for name in ("loc", "scale"))
    draws = torch.stack([loc, scale.log()])
    ess = torch.stack([chains.ess["loc"], chains.ess["scale"]])
    assert ((draws.mean(1) - mean).abs() < 5 * sd / ess.sqrt()).all()
    assert ((draws.std(1) / sd - 1).abs() < 5 / ess.sqrt()).all()


def test_a_model_that_is_run_by_loop():
    """Of a density with a jump, by quadrature."""
    chains = mcmc(models.branching, AutoNormal(models.branching), 50)
    assert chains.num_chains == 8
    assert chains.trusted, chains
    z = torch.linspace(-6, 6, 4001)
    density = dist.Normal(z, torch.where(z > 0, 1.0, 2.0)).log_prob(torch.tensor(0.3))
    weights = (density + dist.Normal(0.0, 1.0).log_prob(z)).softmax(0)
    mean = weights @ z
    sd = (weights @ (z - mean) ** 2).sqrt()
    assert abs(chains.by_chain["z"].mean() - mean) < 5 * sd / chains.min_ess**0.5


def shaped():
    pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    with pyro.plate("rows", 3):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    models.tilted("rate", dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 1.0))


def test_shapes_and_supports():
    chains = mcmc(shaped, AutoNormal(shaped), 300, num_chains=6)
    shapes = {"share": (3,), "z": (3, 2), "rate": ()}
    assert {name: value.shape[1:] for name, value in chains.draws.items()} == shapes
    assert {len(value) for value in chains.draws.values()} == {300}
    size = chains.by_chain["z"].shape[1]
    assert {name: value.shape for name, value in chains.by_chain.items()} == {
        name: (6, size, *shape) for name, shape in shapes.items()
    }
    unconstrained = {**shapes, "share": (2,)}
    for each in (chains.ess, chains.ess_tail, chains.rhat):
        assert {name: value.shape for name, value in each.items()} == unconstrained
    assert chains.min_ess == min(float(value.min()) for value in chains.ess.values())
    assert chains.max_rhat == max(float(value.max()) for value in chains.rhat.values())
    share = chains.by_chain["share"].flatten(0, 1)
    assert torch.allclose(share.sum(-1), torch.ones(len(share)))
    assert (share.mean(0) - torch.tensor([2.0, 3.0, 4.0]) / 9).abs().max() < 0.05
    assert abs(chains.draws["rate"].mean() - 3) < 5 * 3**0.5 / 300**0.5
    # of one draw of all sites a row: what a site has in draws is a row of its chains
    rows = chains.by_chain["rate"].flatten()
    place = (rows == chains.draws["rate"][7]).nonzero()[0]
    assert torch.equal(chains.by_chain["z"].flatten(0, 1)[place][0], chains.draws["z"][7])


def test_a_seed_makes_draws_repeatable_and_leaves_the_generators():
    model = models.regression
    guide, state = started(AutoNormal(model)), torch.get_rng_state()
    one, same, other = (mcmc(model, guide, 100, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.draws["loc"], same.draws["loc"])
    assert not torch.equal(one.draws["loc"], other.draws["loc"])


def test_what_it_says(capsys):
    model = models.regression
    chains = mcmc(model, AutoNormal(model), 100)
    assert chains.verdict.startswith("Draws trusted: ")
    assert "effective draws of the worst latent, R-hat at most 1.0" in chains.verdict
    text = repr(chains)
    assert text.startswith(f"Chains: {chains.verdict}")
    assert "16 of " in text
    assert "there are enough effective draws" in text
    assert chains.num_gradients > 16 * chains.by_chain["loc"].shape[1]
    assert capsys.readouterr().out == ""


def test_max_seconds_ends_with_what_there_is(monkeypatch):
    monkeypatch.setattr(capture, "_PATIENCE", 10**9)  # else they end before the time does
    chains = mcmc(models.regression, AutoNormal(models.regression), 10**6, max_seconds=3.0)
    assert not chains.trusted
    assert chains.stopped_because == "the time was over"
    assert "effective draws, not 1000000" in chains.verdict
    assert chains.by_chain["loc"].shape[1] > 1  # on a slow machine, too
    # all draws that there are
    assert len(chains.draws["loc"]) == chains.by_chain["loc"].numel()
    # with the verdict's search for modes
    assert chains.seconds < 20


def test_no_time_at_all():
    chains = mcmc(models.regression, AutoNormal(models.regression), 10, max_seconds=1e-9)
    assert not chains.trusted
    assert chains.by_chain["loc"].shape == (16, 1)
    assert re.search(r"chains do not agree: .*above 1.02\. Let them run for longer", chains.verdict)


def test_interrupt_keeps_what_there_is(monkeypatch):
    monkeypatch.setattr(capture, "_PATIENCE", 10**9)  # the model runs at each gradient
    count = 0

    def model():
        nonlocal count
        count += 1
        models.regression()
        if count == 400:
            signal.raise_signal(signal.SIGINT)

    chains = mcmc(model, AutoNormal(model), 10**6)
    assert chains.stopped_because == "it was interrupted"
    assert not chains.trusted
    assert chains.by_chain["loc"].shape[1] > 10
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_chains_in_two_modes_speak_for_modes_first():
    """They move in each, and none of the draws of a wide guide in eight dimensions are accepted."""
    model = models.two_modes(8, 20.0, 0.5)
    located = init_to_value(values={"z": 10 * torch.eye(8)[0]})
    guide = started(AutoNormal(model, init_scale=10.0, init_loc_fn=located))
    chains = GuideChains(ModelAndGuide.of(model, guide, (), {}), 16)
    chains.run(100, most=150)
    words = to_chains(chains, 100, [], TimeLimit(), "", NOT_SEARCHED).verdict
    assert re.search(r"chains do not agree: .*above 1.02\. They move, but .* several modes", words)


def test_draws_of_many_latents_say_that_nothing_was_searched_for():
    def model():
        prior, posterior = (dist.Normal(torch.zeros(201), s).to_event(1) for s in (1.1, 1.0))
        models.tilted("z", prior, posterior)

    chains = mcmc(model, started(AutoNormal(model, init_scale=1.0)), 50)
    assert chains.trusted
    assert chains.verdict.endswith(" draws, but mass elsewhere was not searched for.")


def test_a_gradient_that_fails_where_the_density_does_not():
    """Proposals go there by values alone; what is learned from gradients leaves these out."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        pyro.factor("root", torch.where(z > 2, 0 * z, -(2 - z).sqrt()).sum(-1))

    chains = mcmc(model, AutoNormal(model), 50, seed=0, progress=False, max_seconds=3)
    assert bool(chains.draws["z"].isfinite().all())


def test_modes_that_proposals_reach_have_their_shares():
    """Eight sds apart, a quarter of the mass in the one that the guide is at."""
    model = models.two_modes(1, 8.0, 0.25)
    located = init_to_value(values={"z": torch.zeros(1)})
    chains = mcmc(model, AutoNormal(model, init_loc_fn=located, init_scale=1.0), 400, seed=0)
    assert chains.trusted
    share = float((chains.by_chain["z"] < 4).double().mean())
    # four standard errors of as many effective draws as it has
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / chains.min_ess) ** 0.5)


def test_another_mode_is_reported():
    """Chains agree, all in one of two modes, of which the other one is a hundred sds away."""
    model = models.two_modes(2, 100.0, 0.5)
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"z": torch.zeros(2)}))
    chains = mcmc(model, guide, 200)
    assert chains.max_rhat < 1.02
    assert not chains.trusted
    assert re.search(r"about (49|50|51) % of the posterior is in 1 other mode", chains.verdict)


def test_arguments_of_model_and_guide():
    values = models.data()
    chains = mcmc(models.regression, AutoNormal(models.regression), 50, values + 5)
    assert abs(chains.by_chain["loc"].mean() - 5.6) < 0.7
    by_name = mcmc(models.regression, AutoNormal(models.regression), 50, values=values + 5)
    assert abs(by_name.by_chain["loc"].mean() - 5.6) < 0.7


def test_an_arviz_data_set():
    model = models.regression
    chains = mcmc(model, AutoNormal(model), 50, num_chains=4)
    found = chains.to_inference_data(model)
    assert found.posterior["loc"].shape == chains.by_chain["loc"].shape
    assert found.log_likelihood["y"].shape == (*chains.by_chain["loc"].shape, 6)
    import arviz

    ess = float(arviz.ess(found, method="mean")["loc"])
    # that of ranks may be smaller
    assert float(chains.ess["loc"]) <= ess * (1 + 1e-6)


def test_predictions_of_chains_for_new_rows():
    def model(x, values=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.01), obs=values)

    chains = mcmc(model, AutoNormal(model), 50, torch.ones(6), torch.ones(6), num_chains=4)
    pytest.importorskip("arviz")
    found = chains.to_inference_data(model, torch.tensor([2.0, 3.0])).predictions["y"].values
    expected = chains.by_chain["slope"][..., None] * torch.tensor([2.0, 3.0])
    assert torch.allclose(torch.tensor(found), expected, atol=0.1)


def discrete():
    pyro.sample("kind", dist.Bernoulli(0.5))
    pyro.sample("loc", dist.Normal(0.0, 1.0))


def lacking():
    pyro.sample("loc", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "options", "words"),
    [
        (models.subsampled, AutoNormal, {}, "one that sees all its data, got one that sub-samples"),
        (models.location, AutoDelta, {}, "draws that differ, got one value of loc"),
        (models.regression, lambda _: lacking, {}, "scale"),
        (models.location, AutoNormal, {"num_samples": 0}, "num_samples: expected a positive"),
        (
            models.location,
            AutoNormal,
            {"num_chains": 2},
            "num_chains: expected an integer of at least 4",
        ),
        (models.location, AutoNormal, {"seed": -1}, "seed: expected"),
        (models.location, AutoNormal, {"max_seconds": 0.0}, "max_seconds: expected a positive"),
    ],
)
def test_what_is_refused(model, guide, options, words):
    with pytest.raises(ValueError, match=words):
        mcmc(model, guide(model), **options)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"leave it"):
        mcmc(models.location, AutoNormal(models.location))


def test_nothing_is_trained_or_left_in_the_guide():
    guide = started(small(models.regression))
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    mcmc(models.regression, guide, 50)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.parameters())


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    chains = mcmc(models.regression, AutoNormal(models.regression), 200)
    assert chains.trusted
    assert chains.draws["loc"].dtype == torch.float32
    mean, sd = regression_moments()
    assert abs(chains.by_chain["loc"].mean() - mean[0]) < 5 * sd[0] / chains.min_ess**0.5


def test_a_funnel_in_coordinates_of_the_prior():
    """Which is none there: the neck is reached, as far as the prior has it."""
    chains = mcmc(models.funnel, small(models.funnel), 1000)
    assert chains.trusted, chains
    v = chains.by_chain["v"].flatten()
    assert abs(v.std() / 3 - 1) < 5 / (2 * float(chains.ess["v"])) ** 0.5
    share = (v < -5).double().mean()
    expected = 0.5 * math.erfc(5 / 3 / 2**0.5)
    assert abs(share - expected) < 5 * (expected / float(chains.ess_tail["v"])) ** 0.5
