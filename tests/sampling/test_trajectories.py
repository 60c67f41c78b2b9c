# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.sampling import State, energy_bfmi
from pyro_artransform.sampling.preconditioning import Preconditioner
from pyro_artransform.sampling.trajectories import LEAPFROG, THREE_STAGES, integrate, trajectory
from tests.sampling.densities import gaussian


def oscillator(base):
    return gaussian(1.0)(base)


def identity(dim):
    return Preconditioner.identity(torch.zeros(dim))


def end_and_gain(target, start, momentum, *options):
    """The ends of trajectories, their momenta, and the energy that they have lost."""
    end, after = integrate(target, start, momentum, *options)
    kinetic = (momentum.square() - after.square()).sum(-1) / 2
    return end, after, kinetic + end.log_density - start.log_density


@pytest.mark.parametrize("stages", [LEAPFROG, THREE_STAGES])
def test_integrators_keep_the_energy_and_turn(stages):
    """After a quarter period positions and momenta of an oscillator have changed places."""
    x, p = torch.randn(6, 2), torch.randn(6, 2)
    start = oscillator(x)
    given = oscillator, start, p
    state, after, gain = end_and_gain(*given, math.pi / 2 / 1000, 1000, identity(2), stages)
    assert torch.allclose(state.base, p, atol=1e-5)
    assert torch.allclose(after, -x, atol=1e-5)
    # second order: ten times the step size, a hundred times the error
    *_, more = end_and_gain(*given, math.pi / 2 / 100, 100, identity(2), stages)
    assert torch.allclose(more / gain, torch.tensor(100.0), rtol=0.05)


def test_three_stages_keep_the_energy_of_many_oscillators():
    """A quarter of an oscillation of a thousand takes three gradients; twice as many of the leapfrog's."""
    x, p = torch.randn(500, 1000), torch.randn(500, 1000)

    def acceptance(num_steps, stages):
        given = math.pi / 2 / num_steps, num_steps, identity(1000), stages
        *_, gain = end_and_gain(oscillator, oscillator(x), p, *given)
        return gain.clamp(max=0).exp().mean()

    # 0.88, 0.29 and 0.79, with standard errors of 0.01
    assert acceptance(1, THREE_STAGES) > 0.84
    assert acceptance(3, LEAPFROG) < 0.34
    assert 0.74 < acceptance(6, LEAPFROG) < 0.84


def test_preconditioned_trajectory_is_that_of_other_coordinates():
    """With base = A y the oscillator of covariance A A^T is one of unit frequency; steps by chain."""
    scale, axis = torch.tensor([3.0, 0.1]), torch.tensor([[0.6], [0.8]])
    a = Preconditioner(scale, axis, torch.tensor([5.0]))
    matrix = a(torch.eye(2)).T
    inverse = torch.linalg.inv(matrix)

    def stretched(base):
        y = base @ inverse.T
        return State(base, base, -y.square().sum(-1) / 2, -y @ inverse)

    y, p, size = torch.randn(6, 2), torch.randn(6, 2), 0.1 + 0.4 * torch.rand(6, 1)
    found, *rest = end_and_gain(stretched, stretched(y @ matrix.T), p, size, 5, a, LEAPFROG)
    expected = end_and_gain(oscillator, oscillator(y), p, size, 5, identity(2), LEAPFROG)
    for actual, other in zip((found.base @ inverse.T, *rest), (expected[0].base, *expected[1:])):
        assert torch.allclose(actual, other)


def test_trajectories_without_a_density_end_where_they_began():
    def fails_beyond_two(base):
        density = -base.square().sum(-1) / 2
        return State(base, base, torch.where(base[:, 0] > 2, torch.nan, density), -base)

    start, momentum = fails_beyond_two(torch.zeros(2, 1)), torch.tensor([[1.0], [3.0]])
    state, _ = integrate(fails_beyond_two, start, momentum, 0.5, 3, identity(1), LEAPFROG)
    assert state.log_density[0].isfinite()
    assert state.log_density[1] == -math.inf
    assert state.base[1] == 0
    assert state.gradient.isfinite().all()


def walk(target, start, count, step_size, integrator, preconditioner):
    """Draws of trajectories of three steps, each chain's with a size of its own, ``(C, count, D)``."""
    state, found = target(start), []
    for _ in range(count):
        sizes = step_size * (0.35 + 0.65 * torch.rand(len(start), 1))
        state, _ = trajectory(target, state, sizes, 3, preconditioner, integrator)
        found.append(state.base)
    return torch.stack(found, 1)


def moments_are(draws, expected):
    """Means of functions, within five standard errors by independent chains."""
    for function, value in expected:
        by_chain = function(draws).flatten(1).mean(1)
        error = by_chain.std() / len(by_chain) ** 0.5
        assert abs(by_chain.mean() - value) < 5 * error
        assert error < 0.05


@pytest.mark.parametrize(
    ("step_size", "integrator"), [(0.4, LEAPFROG), (1.4, LEAPFROG), (2.7, THREE_STAGES)]
)
def test_detailed_balance(step_size, integrator):
    """Moments of a skewed density, that of a Gumbel, at any rate of acceptance, from its own draws."""
    gumbel = torch.distributions.Gumbel(0.0, 1.0)

    def target(z):
        return State(z, z, -(z + (-z).exp())[:, 0], (-z).exp() - 1)

    stretched = Preconditioner(torch.full((1,), 1.3), torch.zeros(1, 0), torch.ones(0))
    draws = walk(target, gumbel.sample((3000, 1)), 20, step_size, integrator, stretched)
    mean, zeta_3 = 0.5772156649015329, 1.2020569031595942
    expected = [
        (lambda z: z - mean, 0.0),
        (lambda z: (z - mean) ** 2, math.pi**2 / 6),
        # the tail that a step that is not reversible would lose
        (lambda z: (z > 3).to(z), 1 - math.exp(-math.exp(-3.0))),
        (lambda z: (z < -1).to(z), math.exp(-math.exp(1.0))),
    ]
    moments_are(draws, expected)
    third = ((draws - mean) ** 3).mean((1, 2))
    assert abs(third.mean() - 2 * zeta_3) < 5 * third.std() / len(third) ** 0.5


@pytest.mark.parametrize("outside", [-math.inf, math.nan])
def test_draws_without_a_density_are_never_accepted(outside):
    """A wall, where the density has no gradient: chains have the moments of the half normal."""

    def target(z):
        state = oscillator(z)
        density = torch.where(z[:, 0] < 0, outside, state.log_density)
        return state._replace(log_density=density)

    draws = walk(target, torch.randn(2000, 1).abs(), 20, 0.6, LEAPFROG, identity(1))
    assert (draws >= 0).all()
    moments_are(draws, [(lambda z: z, (2 / math.pi) ** 0.5), (lambda z: z**2, 1.0)])


def test_what_is_known_of_trajectories():
    """In a cup whose steps of 0.1 are right, of 1.6 are refused now and then, and of 3 diverge."""
    state = oscillator(torch.randn(3000, 4))
    sizes = torch.tensor([0.1, 1.6, 3.0]).repeat(1000)[:, None]
    after, info = trajectory(oscillator, state, sizes, 12, identity(4), LEAPFROG)
    small, large, beyond = (slice(i, None, 3) for i in range(3))
    assert ((info.acceptance >= 0) & (info.acceptance <= 1)).all()
    assert float(info.acceptance[small].mean()) > 0.99
    assert 0.3 < float(info.acceptance[large].mean()) < 0.9
    assert info.is_divergent[beyond].all()
    assert not info.is_divergent[small].any()
    assert (info.acceptance[beyond] == 0).all()
    # those that are accepted are at their ends, the others where they were
    share = float(info.is_accepted[large].double().mean())
    assert share == pytest.approx(float(info.acceptance[large].mean()), abs=0.06)
    assert torch.equal(after.base, info.proposal.where(info.is_accepted, state).base)
    assert torch.allclose(info.duration, 12 * sizes[:, 0])
    # potential and kinetic energy of four dimensions: twice 4 / 2, by chains within five errors
    assert float(info.energy.mean()) == pytest.approx(4.0, abs=5 * 2 / 3000**0.5)
    assert (info.energy >= -state.log_density).all()


def test_the_bound_of_divergence_is_a_thousand_nats():
    """Of a step in a slope that falls by so much, or where the density is not a number."""
    for fall, is_divergent in ((990.0, False), (1010.0, True), (math.nan, True)):

        def target(x, fall=fall):
            return State(x, x, torch.where(x[:, 0] == 0, 0.0, -fall), torch.zeros_like(x))

        sizes = torch.full((50, 1), 1e-3)
        start = target(torch.zeros(50, 1))
        state, info = trajectory(target, start, sizes, 1, identity(1), LEAPFROG)
        assert bool((info.is_divergent == is_divergent).all())
        assert torch.equal(state.base, start.base)


def test_bfmi_of_energies():
    """Those that are white have a fraction of two; those of a walk hardly any."""
    white = torch.randn(20, 1000)
    assert torch.allclose(energy_bfmi(white), torch.tensor(2.0), rtol=0.25)
    assert (energy_bfmi(white.cumsum(1)) < 0.1).all()
