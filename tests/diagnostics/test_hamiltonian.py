# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.diagnostics.hamiltonian import (
    LEAPFROG,
    THREE_STAGES,
    HamiltonianChains,
    PulledBack,
    State,
    _adapted,
    integrate,
)
from pyro_artransform.diagnostics.preconditioning import Preconditioner
from pyro_artransform.joint import LogJoint


def pulled_back(model):
    """A posterior in the base space of the identity."""
    return PulledBack(LogJoint(model), lambda x: (x, torch.zeros(len(x))))


def oscillator(base):
    return State(base, base, -base.square().sum(-1) / 2, -base)


def identity(dim):
    return Preconditioner.identity(torch.zeros(dim))


def test_density_in_the_base_space():
    """By the change of variables: a guide that is the posterior gives a standard normal."""
    log_joint = LogJoint(lambda: pyro.sample("z", dist.LogNormal(1.0, 0.5)))
    target = PulledBack(log_joint, lambda x: (1 + 0.5 * x, math.log(0.5) * torch.ones(len(x))))
    x = torch.linspace(-2, 2, 5)[:, None]
    state = target(x)
    assert torch.allclose(state.log_density, dist.Normal(0.0, 1.0).log_prob(x)[:, 0])
    assert torch.allclose(state.gradient, -x)
    assert torch.allclose(state.latent, 1 + 0.5 * x)
    assert not state.latent.requires_grad
    target(x[:2])
    assert target.num_gradients == 7


@pytest.mark.parametrize("stages", [LEAPFROG, THREE_STAGES])
def test_integrators_keep_the_energy_and_turn(stages):
    """After a quarter period positions and momenta of an oscillator have changed places."""
    x, p = torch.randn(6, 2), torch.randn(6, 2)
    start = oscillator(x)
    state, gain = integrate(oscillator, start, p, math.pi / 2 / 1000, 1000, identity(2), stages)
    assert torch.allclose(state.base, p, atol=1e-5)
    # second order: ten times the step size, a hundred times the error
    _, more = integrate(oscillator, start, p, math.pi / 2 / 100, 100, identity(2), stages)
    assert torch.allclose(more / gain, torch.tensor(100.0), rtol=0.05)


def test_three_stages_keep_the_energy_of_many_oscillators():
    """A quarter of an oscillation of a thousand takes three gradients; twice as many of the leapfrog's."""
    x, p = torch.randn(500, 1000), torch.randn(500, 1000)

    def acceptance(num_steps, stages):
        given = math.pi / 2 / num_steps, num_steps, identity(1000), stages
        _, gain = integrate(oscillator, oscillator(x), p, *given)
        return gain.clamp(max=0).exp().mean()

    # 0.88, 0.29 and 0.79, with standard errors of 0.01
    assert acceptance(1, THREE_STAGES) > 0.84
    assert acceptance(3, LEAPFROG) < 0.34
    assert 0.74 < acceptance(6, LEAPFROG) < 0.84


def test_preconditioned_trajectory_is_that_of_other_coordinates():
    """With base = A y the oscillator of covariance A A^T is one of unit frequency."""
    scale, axis = torch.tensor([3.0, 0.1]), torch.tensor([[0.6], [0.8]])
    a = Preconditioner(scale, axis, torch.tensor([5.0]))
    matrix = a(torch.eye(2)).T
    inverse = torch.linalg.inv(matrix)

    def stretched(base):
        y = base @ inverse.T
        return State(base, base, -y.square().sum(-1) / 2, -y @ inverse)

    y, p = torch.randn(6, 2), torch.randn(6, 2)
    found, gain = integrate(stretched, stretched(y @ matrix.T), p, 0.3, 5, a, LEAPFROG)
    given = oscillator(y), p, 0.3, 5, identity(2), LEAPFROG
    expected, expected_gain = integrate(oscillator, *given)
    assert torch.allclose(found.base @ inverse.T, expected.base)
    assert torch.allclose(gain, expected_gain)


def fails_beyond_two(base):
    density = -base.square().sum(-1) / 2
    return State(base, base, torch.where(base[:, 0] > 2, torch.nan, density), -base)


def test_trajectories_without_a_density_end_where_they_began():
    start = fails_beyond_two(torch.tensor([[0.0], [0.0]]))
    momentum = torch.tensor([[1.0], [3.0]])
    given = start, momentum, 0.5, 3, identity(1), LEAPFROG
    state, gain = integrate(fails_beyond_two, *given)
    assert gain[0].isfinite()
    assert gain[1] == -math.inf
    assert state.base[1] == 0
    assert state.is_finite.all()


def walk(chains, count):
    """Draws of the steps of chains, shape ``(C, count, D)``."""
    found = []
    for _ in range(count):
        chains.step()
        found.append(chains.state.base)
    return torch.stack(found, 1)


def moments_are(draws, expected):
    """Means of functions, within five standard errors by independent chains."""
    for function, value in expected:
        by_chain = function(draws).mean((1, 2))
        error = by_chain.std() / len(by_chain) ** 0.5
        assert abs(by_chain.mean() - value) < 5 * error
        assert error < 0.03


@pytest.mark.parametrize(
    ("step_size", "stages"), [(0.4, LEAPFROG), (1.4, LEAPFROG), (0.9, THREE_STAGES)]
)
def test_detailed_balance(step_size, stages):
    """Moments of a skewed density, that of a Gumbel, at any rate of acceptance, from its own draws."""
    gumbel = torch.distributions.Gumbel(0.0, 1.0)

    def model():
        pyro.sample("z", dist.Gumbel(torch.zeros(1), 1.0).to_event(1))

    chains = HamiltonianChains(pulled_back(model), gumbel.sample((3000, 1)))
    chains.step_size, chains._stages = step_size, stages
    chains.preconditioner = Preconditioner(torch.full((1,), 1.3), torch.zeros(1, 0), torch.ones(0))
    draws = walk(chains, 20)
    mean, zeta_3 = 0.5772156649015329, 1.2020569031595942
    away = draws - mean
    expected = [
        (lambda z: z - mean, 0.0),
        (lambda z: (z - mean) ** 2, math.pi**2 / 6),
        # the tail that a step that is not reversible would lose
        (lambda z: (z > 3).to(z), 1 - math.exp(-math.exp(-3.0))),
        (lambda z: (z < -1).to(z), math.exp(-math.exp(1.0))),
    ]
    moments_are(draws, expected)
    third = (away**3).mean((1, 2))
    assert abs(third.mean() - 2 * zeta_3) < 5 * third.std() / len(third) ** 0.5


def test_draws_without_a_density_are_never_accepted():
    """A wall, where the density has no gradient: chains have the moments of the half normal."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.factor("wall", torch.where(z[..., 0] < 0, -torch.inf, 0.0))

    chains = HamiltonianChains(pulled_back(model), torch.randn(2000, 1).abs())
    chains.step_size = 0.6
    draws = walk(chains, 20)
    assert (draws >= 0).all()
    moments_are(draws, [(lambda z: z, (2 / math.pi) ** 0.5), (lambda z: z**2, 1.0)])


def test_step_size_goes_to_an_acceptance_of_four_fifths():
    """Of a hundred dimensions, ten of them twice as narrow, from ten times too large a step."""
    scale = torch.where(torch.arange(100) < 10, 0.5, 1.0)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(100), scale).to_event(1))

    chains = HamiltonianChains(pulled_back(model), scale * torch.randn(32, 100))
    chains.step_size, chains._stages = 1.4, LEAPFROG
    for _ in range(30):
        chains.step(adapts=True)
    rates = [chains.step() for _ in range(20)]
    # the steps of a trajectory are a whole number, so that they are a little shorter
    assert 0.7 < sum(rates) / len(rates) < 0.95


def test_adapted_step_sizes():
    assert _adapted(0.3, 0.8) == pytest.approx(0.3)
    assert _adapted(0.3, 0.0) == pytest.approx(0.1)
    assert _adapted(0.3, 1.0) == pytest.approx(0.45)
    assert _adapted(0.8, 1.0) == 0.91


# A guide's draws as proposals


def wider(factor):
    """Standard normal draws, seen from a guide whose sds are off by a factor."""
    log_joint = LogJoint(lambda: pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    ladj = 3 * math.log(factor)
    return PulledBack(log_joint, lambda x: (factor * x, torch.full((len(x),), ladj)))


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_detailed_balance_with_proposals_of_the_mixture(factor):
    """Of a guide that is too narrow, whose own draws would stick, and of one that is too wide."""
    chains = HamiltonianChains(wider(factor), torch.randn(3000, 3))
    draws = []
    for _ in range(60):
        chains.draw_from_mixture()
        draws.append(chains.state.latent)
    # two thirds of the proposals are refused at most: the start is forgotten after thirty
    draws = torch.stack(draws[30:], 1)
    moments_are(
        draws, [(lambda z: z, 0.0), (lambda z: z**2, 1.0), (lambda z: (z > 2).to(z), 0.02275)]
    )


@pytest.mark.parametrize(("factor", "is_any"), [(1.0, True), (30.0, False)])
def test_as_many_proposals_as_renew_nine_of_ten_chains(factor, is_any):
    """None of a guide that is thirty times too wide in each of three latents."""
    chains = HamiltonianChains(wider(factor), torch.randn(500, 3) / factor)
    for _ in range(8):
        chains.draw_from_mixture()
    rate = chains.learn_proposals()
    assert (chains.num_proposals > 0) == is_any
    if is_any:
        before = chains.state.base
        chains.draw_from_mixture()
        share = float((chains.state.base == before).all(1).double().mean())
        assert share < 0.13
        assert share == pytest.approx((1 - rate) ** chains.num_proposals, abs=0.06)


def test_the_end_of_a_trajectory_has_the_gradient_there():
    """Which masses are learned from: proposals that are accepted after it have none yet."""
    target = wider(1.3)
    chains = HamiltonianChains(target, torch.randn(200, 3))
    for _ in range(3):
        chains.step()
        assert torch.allclose(chains.end.gradient, target(chains.end.base).gradient)
    assert (chains.state.base != chains.end.base).any(1).double().mean() > 0.9


def test_proposals_without_a_density_are_refused():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.factor("wall", torch.where(z[..., 0] < 0, torch.nan, 0.0))

    with pyro.validation_enabled(False):
        chains = HamiltonianChains(pulled_back(model), torch.randn(500, 1).abs())
        assert chains.draw_from_mixture() == pytest.approx(0.4, abs=0.1)
    assert (chains.state.base >= 0).all()
