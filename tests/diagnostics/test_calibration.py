# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics import SBC, sbc

NUM_DATA = 3


def normal(data=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", NUM_DATA):
        return pyro.sample("y", dist.Normal(mean, 1.0), obs=data)


def posterior(data, shift=0.0, width=1.0):
    variance = 1 / (1 + NUM_DATA)
    return dist.Normal(data["y"].sum() * variance + shift, width * variance**0.5)


def run(fit_one, num_simulations=300, **options):
    options = {"observed": ["y"], "progress": False, **options}
    return sbc(normal, fit_one, num_simulations=num_simulations, **options)


def test_right_posteriors_pass():
    result = run(lambda data: {"mean": posterior(data).sample((99,))})
    assert result.passed()
    assert result.ranks["mean"].shape == (300,)
    assert result.ranks["mean"].min() >= 0
    assert result.ranks["mean"].max() <= 99
    # two and a half standard errors of 300 draws of a coin
    coverage = result.coverage((0.5, 0.9))["mean"]
    assert torch.allclose(coverage, torch.tensor([0.5, 0.9]), atol=0.07)
    assert "passed" in repr(result)


@pytest.mark.parametrize(
    "wrong", [{"width": 0.7}, {"width": 1.4}, {"shift": 0.2}, {"shift": -0.2}], ids=str
)
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
        square = pyro.deterministic("square", z**2)
        return pyro.sample("y", dist.Normal(square, 1.0), obs=data)


def test_shapes_and_bonferroni():
    """One coordinate that is wrong fails the whole."""

    def draws(data, wrong):
        # the truth is a draw of the prior: so are these, but for one
        scale = dist.LogNormal(0.0, 0.5).sample((50,))
        z = dist.Normal(0.0, scale[:, None].expand(50, 3)).sample()
        z[:, 1] += wrong
        return {"scale": scale, "z": z}

    def calibrate(wrong):
        return sbc(
            two_sites,
            lambda data: draws(data, wrong),
            observed=["y"],
            num_draws=50,
            progress=False,
        )

    right, wrong = calibrate(0.0), calibrate(1.0)
    assert {name: tuple(r.shape) for name, r in right.ranks.items()} == {
        "scale": (100,),
        "z": (100, 3),
    }
    assert {name: tuple(p.shape) for name, p in wrong.pvalues().items()} == {"scale": (), "z": (3,)}
    assert right.coverage((0.1, 0.5, 0.9))["z"].shape == (3, 3)
    assert right.passed()
    assert not wrong.passed()
    assert wrong.pvalues()["z"].argmin() == 1


def test_data_sites_are_those_that_have_data():
    seen = []

    def fit_one(data):
        seen.append(data["y"])
        return {"mean": posterior(data).sample((99,))}

    real = torch.full((NUM_DATA,), 50.0)
    result = sbc(normal, fit_one, real, num_simulations=20, progress=False)
    assert result.passed()
    assert list(result.ranks) == ["mean"]
    assert all(data.shape == (NUM_DATA,) and (data < 20).all() for data in seen)
    assert not torch.equal(seen[0], seen[1])


def test_deterministic_sites_are_no_data():
    """What a reparametrizer computes is ranked, as what is deterministic by name."""
    seen = []

    @pyro.poutine.reparam(config={"mean": LocScaleReparam(0.0)})
    def reparametrized(data=None):
        square = pyro.deterministic("square", normal(data) ** 2)
        pyro.deterministic("total", square.sum())

    def fit_one(data):
        seen.append(list(data))
        return {"mean": posterior(data).sample((99,)), "square": data["y"].expand(99, 3) ** 2}

    result = sbc(reparametrized, fit_one, observed=["y"], progress=False)
    assert seen[0] == ["y"]
    assert list(result.ranks) == ["mean", "square"]
    assert result.passed()
    with pytest.raises(ValueError, match=r"expected sites of \['mean_decentered', 'y'\], got"):
        sbc(reparametrized, fit_one, observed=["mean"], progress=False)


def test_ties_are_broken_by_chance():
    """Ranks of a discrete latent are uniform too."""

    def coin(data=None):
        pyro.sample("kind", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=data)

    result = sbc(
        coin,
        lambda data: {"kind": dist.Bernoulli(0.3).sample((99,))},
        observed=["y"],
        num_simulations=300,
        progress=False,
    )
    assert result.passed()
    assert result.ranks["kind"].unique().numel() > 50


@pytest.mark.parametrize("guide", [AutoIAF, AutoNormal])
def test_fit_one_returns_a_guide(guide):
    """Each fit starts in a param store of its own: the second guide is as new as the first."""
    firsts = []

    def fit_one(data):
        made = guide(normal, init_loc_fn=pyro.infer.autoguide.init_to_sample, init_scale=0.5)
        made(data["y"])
        firsts.append(made.median()["mean"].item())
        svi = pyro.infer.SVI(normal, made, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        svi.step(data["y"])
        return made

    before = pyro.param("kept", torch.tensor(1.0))
    result = run(fit_one, num_simulations=5, num_draws=20)
    assert result.ranks["mean"].shape == (5,)
    assert len(set(firsts)) == 5
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert pyro.param("kept") is before or torch.equal(pyro.param("kept"), before)


def test_fit_one_returns_a_function():
    result = run(
        lambda data: lambda n: {"mean": posterior(data).sample((n,))},
        num_simulations=10,
        num_draws=30,
    )
    assert result.num_draws == 30
    assert result.num_simulations == 10


def test_seed():
    def fit_one(data):
        return {"mean": posterior(data).sample((99,))}

    first, second = (run(fit_one, num_simulations=5, seed=3).ranks["mean"] for _ in range(2))
    assert torch.equal(first, second)


def test_progress_bar(capsys):
    run(lambda data: {"mean": posterior(data).sample((99,))}, num_simulations=3, progress=True)
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    assert not captured.out


def test_bad_input():
    def nothing(data):
        return {"mean": torch.zeros(99)}

    def with_factor(data=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("extra", -(z**2))
        pyro.sample("y", dist.Normal(z, 1.0), obs=data)

    quiet = {"progress": False, "num_simulations": 2}
    with pytest.raises(ValueError, match="expected the names of the data sites"):
        sbc(normal, nothing, **quiet)
    with pytest.raises(
        ValueError, match=r"observed: expected sites of \['mean', 'y'\], got \['x'\]"
    ):
        sbc(normal, nothing, observed=["x"], **quiet)
    with pytest.raises(ValueError, match=r"factors \['extra'\]"):
        sbc(with_factor, nothing, observed=["y"], **quiet)
    with pytest.raises(ValueError, match=r"draws of 'mean' of shape \(99,\), got \(98,\)"):
        run(lambda data: {"mean": torch.zeros(98)}, **quiet)
    with pytest.raises(ValueError, match=r"expected draws of \['mean'\], got \['mu'\]"):
        run(lambda data: {"mu": torch.zeros(99)}, **quiet)
    with pytest.raises(TypeError, match="expected a guide, a dict of draws, or a function"):
        run(lambda data: None, **quiet)
    for name in ("num_simulations", "num_draws"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive integer, got 0"):
            run(nothing, **{name: 0})


def test_repr_has_a_line_for_each_site():
    lines = repr(SBC({"a": torch.arange(100), "bb": torch.zeros(100, 2).long()}, 99)).splitlines()
    assert lines[0] == "SBC of 100 simulations, 99 draws each: failed"
    assert lines[2].startswith("a ")
    assert lines[3].startswith("bb")
