# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import itertools

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.infer.reparam import LocScaleReparam

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics import sbc, uniformity_pvalue

NUM_DATA = 3


def normal(data=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", NUM_DATA):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=data)


def posterior(data, shift=0.0, width=1.0):
    variance = 1 / (1 + NUM_DATA)
    return dist.Normal(data["y"].sum() * variance + shift, width * variance**0.5)


def exact(data):
    return {"mean": posterior(data).sample((99,))}


def run(fit_one, num_simulations=300, model=normal, **options):
    options = {"observed": ["y"], "progress": False, **options}
    return sbc(model, fit_one, num_simulations=num_simulations, **options)


def test_right_posteriors_pass():
    result = run(exact)
    assert result.passed()
    assert result.ranks["mean"].shape == (300,)
    assert 0 <= result.ranks["mean"].min() <= result.ranks["mean"].max() <= 99
    # two and a half standard errors of 300 draws of a coin
    coverage = result.coverage((0.5, 0.9))["mean"]
    assert torch.allclose(coverage, torch.tensor([0.5, 0.9]), atol=0.07)
    first, _, line = repr(result).splitlines()
    assert first == "SBC with 300 simulations, 99 draws each: passed"
    assert line.startswith("mean ")


@pytest.mark.parametrize("wrong", [{"width": 0.7}, {"width": 1.4}, {"shift": -0.2}], ids=str)
def test_wrong_posteriors_fail(wrong):
    """30 % too narrow, 40 % too wide, or off by 0.4 sd."""
    result = run(lambda data: {"mean": posterior(data, **wrong).sample((99,))})
    assert not result.passed()
    assert "failed" in repr(result)
    if wrong.get("width") == 0.7:
        assert result.coverage([0.9])["mean"] < 0.83


def two_sites(data=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", NUM_DATA):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        return pyro.sample("y", dist.Normal(z**2, 1.0), obs=data)


def test_shapes_and_bonferroni():
    """One coordinate that is wrong fails the whole."""

    def calibrate(wrong):
        def draws(data):
            # the truth is a draw of the prior: so are these, but for one
            scale = dist.LogNormal(0.0, 0.5).sample((50,))
            z = dist.Normal(0.0, scale[:, None].expand(50, 3)).sample()
            z[:, 1] += wrong
            return {"scale": scale, "z": z}

        return run(draws, 100, two_sites, num_draws=50)

    right, wrong = calibrate(0.0), calibrate(1.0)
    assert {k: tuple(r.shape) for k, r in right.ranks.items()} == {"scale": (100,), "z": (100, 3)}
    assert {k: tuple(p.shape) for k, p in wrong.pvalues().items()} == {"scale": (), "z": (3,)}
    assert right.coverage((0.1, 0.5, 0.9))["z"].shape == (3, 3)
    assert right.passed()
    assert not wrong.passed()
    assert wrong.pvalues()["z"].argmin() == 1


def test_data_sites_are_those_that_have_data():
    seen = []

    def fit_one(data):
        seen.append(data["y"])
        return exact(data)

    real = torch.full((NUM_DATA,), 50.0)
    result = sbc(normal, fit_one, real, num_simulations=20, progress=False)
    assert result.passed()
    assert list(result.ranks) == ["mean"]
    assert all(data.shape == (NUM_DATA,) and (data < 20).all() for data in seen)
    assert not torch.equal(seen[0], seen[1])


def test_deterministic_sites_are_no_data():
    """What a reparametrizer computes is ranked, as what is deterministic by name."""

    @pyro.poutine.reparam(config={"mean": LocScaleReparam(0.0)})
    def reparametrized(data=None):
        square = pyro.deterministic("square", normal(data) ** 2)
        pyro.deterministic("total", square.sum())

    def fit_one(data):
        assert list(data) == ["y"]
        return {**exact(data), "square": data["y"].expand(99, 3) ** 2}

    result = run(fit_one, 100, reparametrized)
    assert list(result.ranks) == ["mean", "square"]
    assert result.passed()
    with pytest.raises(ValueError, match=r"expected sites of \['mean_decentered', 'y'\], got"):
        run(fit_one, 2, reparametrized, observed=["mean"])


def test_ties_are_broken_by_chance():
    """Ranks of a discrete latent are uniform too."""

    def coin(data=None):
        pyro.sample("kind", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=data)

    result = run(lambda data: {"kind": dist.Bernoulli(0.3).sample((99,))}, 300, coin)
    assert result.passed()
    assert result.ranks["kind"].unique().numel() > 50


@pytest.mark.parametrize("guide", [AutoIAF, AutoNormal])
def test_fit_one_returns_a_guide(guide):
    """Each fit starts in a param store of its own: the second guide is as new as the first."""
    firsts = []

    def fit_one(data):
        made = guide(normal, init_loc_fn=init_to_sample, init_scale=0.5)
        made(data["y"])
        firsts.append(made.median()["mean"].item())
        svi = pyro.infer.SVI(normal, made, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        svi.step(data["y"])
        return made

    before = pyro.param("kept", torch.tensor(1.0))
    result = run(fit_one, 3, num_draws=20)
    assert result.ranks["mean"].shape == (3,)
    assert len(set(firsts)) == 3
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert torch.equal(pyro.param("kept"), before)


def test_functions_seeds_and_progress(capsys):
    def fit_one(data):
        return lambda n: {"mean": posterior(data).sample((n,))}

    first, second = (run(fit_one, 3, num_draws=30, seed=3, progress=True) for _ in range(2))
    assert (first.num_draws, first.num_simulations) == (30, 3)
    assert torch.equal(first.ranks["mean"], second.ranks["mean"])
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    assert not captured.out


def with_factor(data=None):
    pyro.factor("extra", -(normal(data).sum() ** 2))


@pytest.mark.parametrize(
    ("error", "words", "found", "options"),
    [
        (ValueError, "expected the names of the observed sites", {}, {"observed": None}),
        (ValueError, r"expected sites of \['mean', 'y'\], got \['x'\]", {}, {"observed": ["x"]}),
        (ValueError, r"pyro.factor sites \['extra'\]", {}, {"model": with_factor}),
        (ValueError, r"of shape \(99,\), got \(98,\)", {"mean": torch.zeros(98)}, {}),
        (ValueError, r"draws of \['mean'\], got \['mu'\]", {"mu": torch.zeros(99)}, {}),
        (TypeError, "expected a guide, a dict of draws, or a function", None, {}),
        (ValueError, "num_draws: expected a positive integer, got 0", {}, {"num_draws": 0}),
        (ValueError, "num_simulations: expected a positive", {}, {"num_simulations": 0}),
    ],
)
def test_bad_input(error, words, found, options):
    with pytest.raises(error, match=words):
        run(lambda data: found, **{"num_simulations": 2, **options})


# Uniformity


@pytest.mark.parametrize(("num_ranks", "num_draws"), [(4, 3), (5, 1)])
def test_pvalue_by_enumeration(num_ranks, num_draws):
    """Of all outcomes of a few ranks: the share of those that are as far out."""
    outcomes = torch.tensor(list(itertools.product(range(num_draws + 1), repeat=num_ranks))).T
    worst = torch.stack([_worst_tail(ranks, num_draws) for ranks in outcomes.T])
    expected = torch.stack([(worst <= w * (1 + 1e-6)).double().mean() for w in worst])
    assert torch.allclose(uniformity_pvalue(outcomes, num_draws), expected)


def _worst_tail(ranks, num_draws):
    """The smallest two-sided binomial tail probability, by adding up probabilities."""
    size, tails = len(ranks), []
    for r in range(num_draws):
        distribution = torch.distributions.Binomial(size, torch.tensor((r + 1) / (num_draws + 1)))
        mass = distribution.log_prob(torch.arange(size + 1.0)).exp()
        count = int((ranks <= r).sum())
        tails.append(min(1.0, 2 * min(mass[: count + 1].sum(), mass[count:].sum())))
    return torch.tensor(tails).min()


def test_pvalues_are_exact_far_out():
    """No simulation is behind them, so that many coordinates can be tested together."""
    assert uniformity_pvalue(torch.zeros(50, 1, dtype=torch.long), 99).item() < 1e-12
