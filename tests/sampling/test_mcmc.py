# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws by chains, beside moments that are known."""

import math
import signal
from functools import cache
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.model import LogJoint
from pyro_artransform.model.replay import capture, execution, recording
from pyro_artransform.sampling import Ensemble
from pyro_artransform.sampling import mcmc as run
from pyro_artransform.sampling.chains import chains_of
from pyro_artransform.sampling.run_mcmc import from_nothing
from tests.inference import models
from tests.model.replay.test_capture import hierarchy
from tests.sampling.densities import schools, schools_log_tau, schools_moments


def mcmc(model, *args, **options):
    return run(model, *args, **{"seed": 0, "progress": False, **options})


def flat(chains):
    """All draws of the schools on the unconstrained space, ``(n, 10)``, and their effective numbers."""
    names = "mu", "tau", "theta"
    mu, tau, theta = (chains.by_chain[name].flatten(0, 1) for name in names)
    draws = torch.cat([mu[:, None], tau.log()[:, None], theta], 1)
    return draws, torch.cat([chains.ess[name].reshape(-1) for name in names])


def test_eight_schools():
    chains = mcmc(schools, draws=1000)
    assert chains.trusted, chains
    (mean, sd), (draws, ess) = schools_moments(), flat(chains)
    assert ((draws.mean(0) - mean).abs() < 5 * sd / ess.sqrt()).all()
    # log tau has a tail: a kurtosis of about six
    assert ((draws.std(0) / sd - 1).abs() < 5 * 1.2 / ess.sqrt()).all()
    # 3 % of log tau are below this quantile, by quadrature: 1,000 draws in its tails, four errors
    below = float((draws[:, 1] < schools_log_tau(0.03)).double().mean())
    assert below == pytest.approx(0.03, abs=4 * (0.03 * 0.97 / 1000) ** 0.5)
    assert chains.min_ess >= 1000
    assert chains.max_rhat <= 1.02


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


@cache
def of_regression(num_chains=None, dtype=torch.float64):
    return mcmc(models.regression, draws=400 if num_chains is None else 200, num_chains=num_chains)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_location_and_a_scale(dtype):
    torch.set_default_dtype(dtype)
    chains = of_regression(dtype=dtype)
    assert chains.trusted, chains
    assert chains.draws["loc"].dtype == dtype
    mean, sd = regression_moments()
    loc, scale = (chains.by_chain[name].flatten() for name in ("loc", "scale"))
    draws = torch.stack([loc, scale.log()])
    ess = torch.stack([chains.ess["loc"], chains.ess["scale"]])
    assert ((draws.mean(1) - mean).abs() < 5 * sd / ess.sqrt()).all()
    assert ((draws.std(1) / sd - 1).abs() < 5 / ess.sqrt()).all()


def test_a_model_that_is_run_by_loop():
    chains = mcmc(models.branching, draws=50)
    assert (chains.num_chains, chains.num_superchains) == (8, 8)
    assert chains.trusted, chains
    assert "A Python number is made of the values of latents" in chains.rows()["slow"]
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


@cache
def of_shapes():
    return mcmc(shaped, draws=300, num_chains=6)


def test_shapes_and_supports():
    chains = of_shapes()
    shapes = {"share": (3,), "z": (3, 2), "rate": ()}
    assert {name: value.shape[1:] for name, value in chains.draws.items()} == shapes
    size = chains.by_chain["z"].shape[1]
    assert {len(value) for value in chains.draws.values()} == {6 * size}
    assert {name: value.shape for name, value in chains.by_chain.items()} == {
        name: (6, size, *shape) for name, shape in shapes.items()
    }
    unconstrained = {**shapes, "share": (2,)}
    for each in (chains.ess, chains.ess_tail, chains.rhat):
        assert {name: value.shape for name, value in each.items()} == unconstrained
    assert chains.min_ess == min(float(value.min()) for value in chains.ess.values())
    assert chains.max_rhat == max(float(value.max()) for value in chains.rhat.values())
    assert (chains.num_chains, chains.num_superchains, chains.bfmi.shape) == (6, 6, (6,))
    share = chains.by_chain["share"].flatten(0, 1)
    assert torch.allclose(share.sum(-1), torch.ones(len(share)))
    assert (share.mean(0) - torch.tensor([2.0, 3.0, 4.0]) / 9).abs().max() < 0.05
    assert abs(chains.draws["rate"].mean() - 3) < 5 * 3**0.5 / 300**0.5
    # one chain after another
    assert torch.equal(chains.by_chain["z"].flatten(0, 1), chains.draws["z"])


def test_a_seed_makes_draws_repeatable_and_leaves_the_generators(capsys):
    state = torch.get_rng_state()
    one, same, other = (mcmc(models.regression, draws=50, seed=seed) for seed in (3, 3, 4))
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.draws["loc"], same.draws["loc"])
    assert not torch.equal(one.draws["loc"], other.draws["loc"])


def test_what_it_says():
    chains = of_regression()
    assert chains.verdict.startswith("Draws trusted: ")
    assert chains.ok
    assert "effective draws of the worst latent, R-hat at most 1.0" in chains.verdict
    text = repr(chains)
    assert text.startswith(
        f"Draws trusted: yes, {chains.min_ess:,.0f} effective draws of the worst"
    )
    assert "8 superchains of 4 chains, " in text
    assert "there are enough effective draws" in text
    assert chains.num_gradients > 32 * chains.by_chain["loc"].shape[1]
    assert f"acceptance {chains.acceptance:.2f}, E-BFMI at least" in text
    assert "diverged" not in text
    assert 0.6 < chains.acceptance < 0.95
    assert 0.1 < chains.step_size < 3
    # momenta of two dimensions are half of the energy
    assert 0.3 < chains.bfmi.median() < 2.5


def test_summary_has_constrained_names_with_their_convergence():
    chains = of_shapes()
    found = chains.summary()
    assert set(found) == {"share", "z", "rate"}
    assert torch.allclose(found["rate"]["mean"], chains.by_chain["rate"].mean())
    columns = {"ess_bulk": chains.ess, "ess_tail": chains.ess_tail, "r_hat": chains.rhat}
    assert all(torch.equal(found["z"][name], value["z"]) for name, value in columns.items())
    # a simplex of three has two dimensions: the worst of them for all
    assert found["share"]["r_hat"].shape == found["share"]["mean"].shape == (3,)
    assert (found["share"]["r_hat"] == chains.rhat["share"].max()).all()
    assert float(found["share"]["ess_bulk"].min()) >= 300
    assert "r_hat" in str(found)


def test_modes_that_are_left_out_are_a_note():
    ensemble = from_nothing(LogJoint(models.location), 50)
    ensemble.run(50)
    ensemble.left_out = 2e-5
    found = chains_of(ensemble, 50, 1.0, "", "")
    assert found.trusted
    assert "about 0.002 % of the posterior" in found.verdict


def test_draws_of_divergent_trajectories_are_not_trusted():
    """A corner where the density falls off a cliff of 2,000 nats."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("cliff", torch.where(z[..., 0] < 0, -2000.0, 0.0))

    chains = mcmc(model, draws=100)
    assert chains.num_divergent > 0.01 * chains.by_chain["z"][..., 0].numel()
    assert not chains.trusted
    assert not chains.ok
    assert "% of the trajectories diverged" in chains.verdict
    total = chains.by_chain["z"][..., 0].numel()
    told = f"gradients, {chains.num_divergent:,} of {total:,} trajectories diverged"
    assert told in chains.rows()["chains"]
    assert (chains.by_chain["z"][..., 0] >= 0).all()


def test_max_seconds_ends_with_what_there_is(monkeypatch):
    monkeypatch.setattr(capture, "_PATIENCE", 10**9)  # else they end before the time does
    chains = mcmc(models.regression, draws=10**5, max_seconds=3.0)
    assert not chains.trusted
    assert chains.stopped_because == "the time limit was reached"
    assert "effective draws, not 100000" in chains.verdict
    assert "remedy        Allow more time, or ask for fewer draws" in repr(chains)
    assert chains.by_chain["loc"].shape[1] > 1  # on a slow machine, too
    # all draws that there are
    assert len(chains.draws["loc"]) == chains.by_chain["loc"].numel()
    assert chains.seconds < 10


def test_no_time_at_all():
    chains = mcmc(models.regression, draws=10, max_seconds=1e-9)
    assert not chains.trusted
    assert chains.by_chain["loc"].shape == (16, 1)
    words = "Draws not trusted: time was over before chains had adapted (draws of each chain: 1)."
    assert chains.verdict.startswith(f"{words} Allow more time")


def test_interrupt_keeps_what_there_is(monkeypatch):
    monkeypatch.setattr(capture, "_PATIENCE", 10**9)  # the model runs at each gradient
    count = 0

    def model():
        nonlocal count
        count += 1
        models.regression()
        if count == 500:
            signal.raise_signal(signal.SIGINT)

    chains = mcmc(model, draws=50_000)
    assert chains.stopped_because == "it was interrupted"
    assert not chains.trusted
    assert chains.by_chain["loc"].shape[1] > 10
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_gradient_that_fails_where_the_density_does_not():
    """What is learned from gradients leaves these out."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        pyro.factor("root", torch.where(z > 2, 0 * z, -(2 - z).sqrt()).sum(-1))

    chains = mcmc(model, draws=50, max_seconds=0.5)
    assert bool(chains.draws["z"].isfinite().all())


def test_arguments_of_the_model():
    values = models.data()
    chains = mcmc(models.regression, values + 5, draws=50)
    assert abs(chains.by_chain["loc"].mean() - 5.6) < 0.7
    by_name = mcmc(models.regression, draws=50, values=values + 5)
    assert abs(by_name.by_chain["loc"].mean() - 5.6) < 0.7


@pytest.mark.parametrize("num_chains", [4, None])
def test_an_arviz_data_set(num_chains):
    """Its chains are superchains, long enough for ArviZ's R-hat."""
    arviz, chains = pytest.importorskip("arviz"), of_regression(num_chains)
    found = chains.to_inference_data()
    size = chains.by_chain["loc"].numel() // chains.num_superchains
    assert found.posterior["loc"].shape == (chains.num_superchains, size)
    assert found.log_likelihood["y"].shape == (chains.num_superchains, size, 6)
    assert float(found.posterior["loc"].mean()) == pytest.approx(
        float(chains.by_chain["loc"].mean())
    )
    # the chains of the first one, one after the other
    first = chains.by_chain["loc"][: chains.num_chains // chains.num_superchains].flatten()
    assert torch.equal(torch.tensor(found.posterior["loc"].values[0]), first)
    rhat = arviz.rhat(found)
    assert max(float(rhat[name]) for name in ("loc", "scale")) < 1.03


def test_predictions_of_chains_for_new_rows():
    def model(x, values=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.01), obs=values)

    chains = mcmc(model, torch.ones(6), torch.ones(6), draws=50, num_chains=4)
    pytest.importorskip("arviz")
    found = chains.to_inference_data(x := torch.tensor([2.0, 3.0])).predictions["y"].values
    assert torch.allclose(torch.tensor(found), chains.by_chain["slope"][..., None] * x, atol=0.1)


def of_draws(draws):
    pyro.sample("loc", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("error", "model", "args", "options", "words"),
    [
        (ValueError, models.subsampled, (), {}, "one that sees all its data, got one that subsam"),
        (ValueError, of_draws, (), {}, "a parameter 'draws', which is also an option of mcmc"),
        (ValueError, models.location, (), {"draws": 0}, "draws: expected a positive"),
        (ValueError, models.location, (), {"num_chains": 2}, "expected an integer of at least 4"),
        (ValueError, models.location, (), {"seed": -1}, "seed: expected"),
        (ValueError, models.location, (), {"max_seconds": 0.0}, "max_seconds: expected a posit"),
        (TypeError, models.location, (None, 400), {}, "arguments that .*, got 2 by position"),
        (TypeError, models.location, (), {"draw": 4}, "The options of mcmc are draws, init"),
        (TypeError, models.location, (), {"init_loc_fn": 0.0}, "init_loc_fn: expected a func"),
    ],
)
def test_what_is_refused(error, model, args, options, words):
    with pytest.raises(error, match=words):
        mcmc(model, *args, **options)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="to be called outside"):
        mcmc(models.location)


def test_a_funnel_in_coordinates_of_the_prior():
    """Which is none there: the neck is reached, as far as the prior has it."""
    chains = mcmc(models.funnel, draws=1000)
    assert chains.trusted, chains
    v = chains.by_chain["v"].flatten()
    assert abs(v.std() / 3 - 1) < 5 / (2 * float(chains.ess["v"])) ** 0.5
    share = (v < -5).double().mean()
    expected = 0.5 * math.erfc(5 / 3 / 2**0.5)
    assert abs(share - expected) < 5 * (expected / float(chains.ess_tail["v"])) ** 0.5


def test_chains_are_the_same_with_torchscript_and_without(monkeypatch, caplog):
    found = [mcmc(hierarchy, draws=40, num_chains=8)]
    assert not caplog.records
    asked_anew = cache(execution.has_torchscript.__wrapped__)
    monkeypatch.setattr(capture, "has_torchscript", asked_anew)
    for name in ("Graph", "_create_function_from_graph"):
        monkeypatch.delattr(torch._C, name)
    # PyTorch itself calls these two
    jit = SimpleNamespace(_builtins=torch.jit._builtins, is_scripting=lambda: False)
    monkeypatch.setattr(torch, "jit", jit)
    found.append(mcmc(hierarchy, draws=40, num_chains=8))
    assert ["no TorchScript" in record.message for record in caplog.records] == [True]
    assert all(each.trusted for each in found)
    one, other = (each.by_chain["z"] for each in found)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # chains amplify round-off


def test_draws_of_another_density_are_dropped(monkeypatch):
    """The model is another one after some replays, which a comparison finds out."""
    replays, replayed = [], recording.Replay.__call__

    def model():
        loc = 2.0 if len(replays) > 20 else 0.0
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 2**0.5).to_event(1))
        # at twice the location: the posterior is Normal(loc, 1)
        pyro.sample("y", dist.Normal(z, 2**0.5).to_event(1), obs=torch.full((2,), 2 * loc))

    def replay(self, *inputs):
        replays.append(1)
        return replayed(self, *inputs)

    anew, begin_anew = [], Ensemble._forget
    monkeypatch.setattr(recording.Replay, "__call__", replay)
    monkeypatch.setattr(Ensemble, "_forget", lambda self: begin_anew(anew.append(1) or self))
    found = mcmc(model, draws=400, num_chains=16)
    assert anew
    assert (found.by_chain["z"].mean((0, 1)) - 2.0).abs().max() < 0.25
