# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.diagnostics.chains import (
    Averages,
    PairedChains,
    PulledBack,
    State,
    leapfrog,
)
from pyro_artransform.joint import LogJoint


def identity(x):
    return x, torch.zeros(len(x))


def normal(dim, scale=1.0, loc=0.0):
    """A posterior of independent normals in the base space of the identity."""

    def model():
        pyro.sample("z", dist.Normal(torch.full((dim,), loc), scale).to_event(1))

    return PulledBack(LogJoint(model), identity)


def chains_of(target, dim, num_chains=128):
    base = torch.randn(num_chains, dim)
    return PairedChains(target, base, base, torch.zeros(dim), torch.ones(dim))


def test_density_in_the_base_space():
    """By the change of variables: a guide that is the posterior gives a standard normal."""

    def model():
        pyro.sample("z", dist.LogNormal(1.0, 0.5))

    target = PulledBack(
        LogJoint(model), lambda x: (1 + 0.5 * x, math.log(0.5) * torch.ones(len(x)))
    )
    x = torch.linspace(-2, 2, 5)[:, None]
    state = target(x)
    assert torch.allclose(state.log_density, dist.Normal(0.0, 1.0).log_prob(x)[:, 0])
    assert torch.allclose(state.gradient, -x)
    assert torch.allclose(state.latent, 1 + 0.5 * x)
    assert target.num_gradients == 5
    assert not state.latent.requires_grad


def test_chunks_bound_the_memory_and_change_nothing():
    target, x = normal(3, 2.0), torch.randn(10, 3)
    expected = target(x)
    target._log_joint.chunk_size = 4
    for one, other in zip(target(x), expected):
        assert torch.equal(one, other)


def test_leapfrog_keeps_the_energy_and_turns():
    """After a quarter period positions and momenta of an oscillator have changed places."""
    target, x, p = normal(2), torch.randn(6, 2), torch.randn(6, 2)
    state, gain = leapfrog(target, target(x), p, math.pi / 2 / 1000, 1000)
    assert torch.allclose(state.base, p, atol=1e-5)
    assert gain.abs().max() < 1e-5
    # second order: ten times the step size, a hundred times the error
    _, gain = leapfrog(target, target(x), p, math.pi / 2 / 100, 100)
    _, more = leapfrog(target, target(x), p, math.pi / 2 / 10, 10)
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


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_chains_reach_the_posterior(scale):
    """Of 128 chains of 12 steps: means within five standard errors, variances within 15 %."""
    chains = chains_of(normal(20, scale, 0.5), 20)
    rate = chains.run(12, 12)
    assert 0.6 < rate < 0.97
    first = chains.values.first
    assert ((first.mean(0) - 0.5).abs() < 5 * first.std(0) / 128**0.5).all()
    variance = chains.values.about(torch.full((20,), 0.5)).mean()
    assert abs(variance / scale**2 - 1) < 0.15


def test_companions_are_standard_normal():
    """Whatever the posterior is; over 12 steps of 128 chains of 20 coordinates, five standard errors."""
    chains = chains_of(normal(20, 0.5, 3.0), 20)
    chains.run(4, 12)
    first, about = chains.companion_values.first, chains.companion_values.about(torch.zeros(20))
    assert first.mean().abs() < 5 * first.mean(1).std() / 128**0.5
    assert (about.mean() - 1).abs() < 5 * about.mean(1).std() / 128**0.5


def test_a_perfect_guide_has_chains_like_their_companions():
    chains = chains_of(normal(30), 30)
    chains.run(5, 5)
    assert torch.allclose(chains.values.first, chains.companion_values.first)


def test_acceptance_is_the_one_wanted_in_many_dimensions():
    """At 0.8, from a step size that is four times too large."""
    chains = chains_of(normal(400, 0.25), 400, num_chains=64)
    assert abs(chains.run(12, 12) - 0.8) < 0.08
