# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics.chains import (
    Averages,
    PairedChains,
    PulledBack,
    State,
    Stretched,
    _standard_normal,
    guide_transform,
    leapfrog,
    misjudged_directions,
)
from pyro_artransform.joint import LogJoint


def pulled_back(model):
    """A posterior in the base space of the identity."""
    return PulledBack(LogJoint(model), lambda x: (x, torch.zeros(len(x))))


def normal(dim, scale=1.0, loc=0.0):
    return pulled_back(
        lambda: pyro.sample("z", dist.Normal(torch.full((dim,), loc), scale).to_event(1))
    )


def chains_of(target, dim, num_chains=128):
    base = torch.randn(num_chains, dim)
    return PairedChains(target, base, base, torch.zeros(dim), torch.ones(dim))


def test_density_in_the_base_space():
    """By the change of variables: a guide that is the posterior gives a standard normal."""
    log_joint = LogJoint(lambda: pyro.sample("z", dist.LogNormal(1.0, 0.5)))
    target = PulledBack(log_joint, lambda x: (1 + 0.5 * x, math.log(0.5) * torch.ones(len(x))))
    x = torch.linspace(-2, 2, 5)[:, None]
    state = target(x)
    assert torch.allclose(state.log_density, dist.Normal(0.0, 1.0).log_prob(x)[:, 0])
    assert torch.allclose(state.gradient, -x)
    assert torch.allclose(state.latent, 1 + 0.5 * x)
    assert target.num_gradients == 5
    assert not state.latent.requires_grad


def test_leapfrog_keeps_the_energy_and_turns():
    """After a quarter period positions and momenta of an oscillator have changed places."""
    target, x, p = _standard_normal, torch.randn(6, 2), torch.randn(6, 2)
    state, gain = leapfrog(target, target(x), p, math.pi / 2 / 1000, 1000)
    assert torch.allclose(state.base, p, atol=1e-5)
    # second order: ten times the step size, a hundred times the error
    _, more = leapfrog(target, target(x), p, math.pi / 2 / 100, 100)
    assert torch.allclose(more / gain, torch.tensor(100.0), rtol=0.05)


def test_trajectories_without_a_density_end_where_they_began():
    def fails_beyond_two(base):
        density = -base.square().sum(-1) / 2
        density = torch.where(base[:, 0] > 2, torch.nan, density)
        return State(base, base, density, -base)

    start = fails_beyond_two(torch.tensor([[0.0], [0.0]]))
    state, gain = leapfrog(fails_beyond_two, start, torch.tensor([[1.0], [3.0]]), 0.5, 3)
    assert gain[0].isfinite()
    assert gain[1] == -math.inf
    assert state.base[1] == 0
    assert state.is_finite.all()


def test_averages_weigh_proposals_by_their_probability():
    averages = Averages(torch.tensor([[1.0], [1.0]]))
    proposed, chance = torch.tensor([[3.0], [5.0]]), torch.tensor([1.0, 0.25])
    averages.move(proposed, chance, torch.tensor([True, False]), counts=True)
    assert averages.first.tolist() == [[3.0], [2.0]]
    assert averages.about(torch.tensor([1.0])).tolist() == [[4.0], [4.0]]
    averages.move(torch.tensor([[9.0], [9.0]]), chance, torch.tensor([True, True]), counts=False)
    assert averages.first.tolist() == [[3.0], [2.0]]
    assert averages.values.tolist() == [[9.0], [9.0]]


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_chains_reach_the_posterior_and_their_companions_stay(scale):
    """Of 128 chains of 12 steps: means within five standard errors, variances within 15 %."""
    chains = chains_of(normal(20, scale, 0.5), 20)
    assert 0.6 < chains.run(12, 12) < 0.97
    for values, loc, sd in ((chains.values, 0.5, scale), (chains.companion_values, 0.0, 1.0)):
        first = values.first
        assert ((first.mean(0) - loc).abs() < 5 * first.std(0) / 128**0.5).all()
        assert abs(values.about(torch.full((20,), loc)).mean() / sd**2 - 1) < 0.15


def test_acceptance_is_the_one_wanted_in_many_dimensions():
    """At 0.8, from a step size that is four times too large."""
    chains = chains_of(normal(400, 0.25), 400, num_chains=64)
    assert abs(chains.run(12, 12) - 0.8) < 0.08


# Stretched directions


def gaussian(precision):
    """A Gaussian posterior of this precision."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(len(precision)), 1.0).to_event(1).mask(False))
        pyro.factor("density", -((z @ precision) * z).sum(-1) / 2)

    return pulled_back(model)


def directions(dim, count):
    return torch.linalg.qr(torch.randn(dim, count)).Q


def test_stretched_and_back():
    axes, factors, x = directions(6, 2), torch.tensor([10.0, 0.1]), torch.randn(5, 6)
    stretched = Stretched(axes, factors)
    assert torch.allclose(stretched(x) @ axes, (x @ axes) * factors)
    rest = torch.eye(6) - axes @ axes.T
    assert torch.allclose(stretched(x) @ rest, x @ rest)
    assert torch.allclose(stretched.inverse(stretched(x)), x)


def test_wide_and_narrow_directions_are_found():
    """Two among 300, one a hundred times too wide and one ten times too narrow."""
    axes = directions(300, 2)
    change = torch.tensor([1e-4, 100.0]) - 1
    precision = torch.eye(300) + axes @ change.diag() @ axes.T
    found = misjudged_directions(gaussian(precision), torch.randn(32, 300))
    assert torch.allclose(found.factors.sort().values, torch.tensor([0.1, 100.0]), rtol=1e-3)
    # what is left is a standard normal
    image = found(torch.eye(300))
    assert torch.allclose(image @ precision @ image.T, torch.eye(300), atol=1e-3)


def test_points_without_a_density_are_left_out():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        pyro.factor("edge", torch.where(z[..., 0] > 3, torch.nan, 0.0))

    points = torch.randn(32, 4)
    points[0, 0] = 3.5
    found = misjudged_directions(pulled_back(model), points)
    assert torch.allclose(found.factors, torch.tensor(2.0))


def _model():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize("make", [AutoIAF, AutoDiagonalNormal, AutoMultivariateNormal])
def test_transforms_of_guides(make):
    """The density that a transform gives is the guide's."""
    guide = make(_model, init_scale=0.5)
    guide()
    transform, x = guide_transform(guide, (), {}), torch.randn(7, 3)
    latent, ladj = transform(x)
    assert latent.shape == (7, 3)
    expected = guide.get_posterior().log_prob(latent)
    assert torch.allclose(dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - ladj, expected)


def test_guides_without_a_transform():
    for make in (AutoNormal, AutoLowRankMultivariateNormal):
        guide = make(_model)
        guide()
        assert guide_transform(guide, (), {}) is None
    assert guide_transform(_model, (), {}) is None
