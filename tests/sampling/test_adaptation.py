# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.sampling.adaptation import StepSize, TrajectoryLength
from pyro_artransform.sampling.preconditioning import Preconditioner
from pyro_artransform.sampling.trajectories import LEAPFROG, integrator_of, trajectory
from tests.sampling.densities import gaussian


@pytest.mark.parametrize("dim", [10, 100])
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_step_sizes_go_to_an_acceptance_of_four_fifths(dim, factor):
    """From a step ten times too small or too large. Near the limit of stability rates change fast."""
    scale = torch.full((dim,), 1 / factor)
    target, identity = gaussian(scale), Preconditioner.identity(scale)
    state, rates, step_size = target(scale * torch.randn(32, dim)), [], StepSize(dim)
    stages = integrator_of(dim).num_stages
    for index in range(80):
        size = stages * step_size.value * (0.35 + 0.65 * torch.rand(32, 1))
        state, info = trajectory(target, state, size, 3, identity, integrator_of(dim))
        if index < 40:
            step_size.update(info)
        elif index == 40:
            step_size.settle()
        else:
            rates.append(info.acceptance.mean())
    assert float(torch.stack(rates).mean()) == pytest.approx(0.8, abs=0.16)


def info_of(acceptance, is_divergent):
    """That of chains whose trajectories were accepted at such rates."""
    target = gaussian(torch.ones(1))
    state, ones = target(torch.randn(len(acceptance), 1)), torch.ones(len(acceptance), 1)
    identity = Preconditioner.identity(ones)
    _, info = trajectory(target, state, ones, 1, identity, LEAPFROG)
    return info._replace(acceptance=acceptance, is_divergent=is_divergent)


@pytest.mark.parametrize(
    ("rates", "is_divergent", "factor"),
    [
        ([0.8] * 4, [False] * 4, 1.0),
        ([0.0] * 4, [False] * 4, 1 / 3),
        ([1.0] * 4, [False] * 4, 1.5),
        # those that end at a wall do not count, but where nearly all do, which too large steps do, too
        ([0.8] * 4 + [0.0] * 4, [False] * 4 + [True] * 4, 1.0),
        ([0.8] * 4 + [0.0] * 4, [True] * 8, 0.55),
    ],
)
def test_a_single_update(rates, is_divergent, factor):
    step_size = StepSize(16)
    before = step_size.value
    step_size.update(info_of(torch.tensor(rates), torch.tensor(is_divergent)))
    assert step_size.value / before == pytest.approx(factor, rel=0.01, abs=0.02)


@pytest.mark.parametrize(
    ("widest", "least", "most"),
    [
        # a quarter of an oscillation; of lengths between 0 and twice their mean a little less is best
        (1.0, 1.0, 2.0),
        # that of the widest coordinate takes ten times as long
        (10.0, 6.0, 20.0),
    ],
)
def test_trajectories_are_as_long_as_the_widest_coordinate_needs(widest, least, most):
    scale = torch.linspace(1.0, widest, 10)
    target, identity, length = gaussian(scale), Preconditioner.identity(scale), TrajectoryLength()
    state, size = target(scale * torch.randn(32, 10)), torch.full((32, 1), 0.5)
    seen = []
    for index in range(200):
        start, number = state.base, max(math.ceil(2 * length.next(index)), 1)
        state, info = trajectory(target, state, size, number, identity, LEAPFROG)
        length.update(start, info, identity)
        seen.append(length.value)
    assert least < sum(seen[100:]) / 100 < most


def test_lengths_vary_around_their_mean():
    length = TrajectoryLength()
    values = torch.tensor([length.next(i) for i in range(1000)])
    assert float(values.mean()) == pytest.approx(math.pi / 2, rel=0.01)
    assert values.min() < 0.2 * values.mean()
    assert values.max() > 1.8 * values.mean()
