# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from scipy import stats

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
from pyro_artransform.diagnostics.marginal_errors import (
    Expectation,
    PairedMoments,
    critical_value,
    errors_by_weights,
    marginal_errors,
    moments_of_transform,
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


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_chains_reach_the_posterior_and_their_companions_stay(scale):
    """Of 128 chains of 12 steps: means within five standard errors, variances within 15 %."""
    chains = chains_of(normal(20, scale, 0.5), 20)
    chains.run(12, 12)
    for values, loc, sd in ((chains.values, 0.5, scale), (chains.companion_values, 0.0, 1.0)):
        first = values.first
        assert ((first.mean(0) - loc).abs() < 5 * first.std(0) / 128**0.5).all()
        assert abs(values.about(torch.full((20,), loc)).mean() / sd**2 - 1) < 0.15


# Stretched directions


def gaussian(precision):
    """A Gaussian posterior of this precision."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(len(precision)), 1.0).to_event(1).mask(False))
        pyro.factor("density", -((z @ precision) * z).sum(-1) / 2)

    return pulled_back(model)


def directions(dim, count):
    return torch.linalg.qr(torch.randn(dim, count)).Q


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
    assert torch.allclose(found.inverse(image), torch.eye(300))


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
    assert guide_transform(AutoNormal(_model), (), {}) is None
    assert guide_transform(_model, (), {}) is None


# Moments and errors from chains and weights

CHAINS, STEPS, DIM = 128, 12, 400


# Moments


AXIS = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
WIDENED = (
    1 + 8 * AXIS[:, 0] ** 2
)  # the variances of a standard normal stretched by 3 along the axis


def test_moments_of_a_transform():
    """Of an affine map means have no noise, by opposite pairs; mean squares are known to 3 %."""
    loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    stretched = Stretched(AXIS, torch.tensor([3.0]))
    mean, square = moments_of_transform(
        lambda x: (loc + scale * x, x.sum(-1)), stretched, loc, scale
    )
    assert mean.guide.abs().max() < 1e-12
    assert mean.known.abs().max() < 1e-12
    assert (square.guide - 1).abs().max() < 5 * square.guide_variance.sqrt().max()
    assert ((square.known - WIDENED).abs() < 5 * square.known_variance.sqrt()).all()
    assert square.guide_variance.sqrt().max() < 0.03


# Errors


def averages(values):
    """The averages of given steps, each of shape ``(C, D)``."""
    found = Averages(values[0])
    always = torch.ones(len(values[0]))
    for value in values:
        found.move(value, always, always > 0, counts=True)
    return found


def errors(chains, companions, start=None):
    """Those of a guide and companions that are both standard normal, known without error."""
    zeros = torch.zeros(DIM)
    first, second = (Expectation(*[zeros + value] * 2, *[zeros] * 3) for value in (0.0, 1.0))
    start = torch.randn(CHAINS, DIM) if start is None else start
    return marginal_errors(chains, companions, PairedMoments(first, second), start)


def pair(coupling, loc=0.0, scale=1.0):
    """Independent steps of chains and companions of a given correlation."""
    noise = torch.randn(STEPS, CHAINS, DIM)
    other = coupling * noise + (1 - coupling**2) ** 0.5 * torch.randn_like(noise)
    return averages(loc + scale * noise), averages(other)


@pytest.mark.parametrize("coupling", [0.0, 0.9, 0.999])
def test_intervals_cover(coupling):
    """Of 400 latents: z scores have a sd of one, within five standard errors of a sd."""
    found = errors(*pair(coupling, loc=0.3, scale=1.25))
    left = found.sure_memory.clamp(0, 0.5)
    z = (found.mean_shift * (1 - left) + 0.3 / 1.25) / found.mean_shift_se
    assert abs(z.mean()) < 5 / DIM**0.5
    assert abs(z.std() - 1) < 5 / (2 * DIM) ** 0.5
    z = (found.sd_ratio - 0.8) / found.sd_ratio_se
    assert abs(z.mean()) < 7 / DIM**0.5
    assert abs(z.std() - 1) < 5 / (2 * DIM) ** 0.5


def test_memory_is_extrapolated():
    """Chains that keep 0.4 of a distance of 1, and so 0.16 of a difference of variances."""
    start, companions = torch.randn(CHAINS, DIM), averages(torch.randn(STEPS, CHAINS, DIM))
    noise = (4 - 0.16 * 3 - 0.16) ** 0.5 * torch.randn(STEPS, CHAINS, DIM)
    found = errors(averages(0.4 * start + 0.6 + noise), companions, start)
    assert abs(found.memory.mean() - 0.4) < 0.01
    # a mean of 1 and a sd of 2, less what the noise of the memory hides
    assert abs(found.mean_shift.mean() + 0.5) < 0.08
    assert abs(found.sd_ratio.mean() - 0.5) < 0.02
    # chains that stay where they are
    found = errors(averages(start.expand(STEPS, -1, -1)), companions, start)
    assert torch.allclose(found.memory, torch.ones(DIM))
    assert (found.sure_memory > 0.99).all()


def test_critical_values_are_students():
    for count, chains in ((1, 128), (2000, 128), (2000, 34), (60, 18)):
        expected = stats.t.ppf(1 - 0.025 / (2 * count), chains - 2)
        assert critical_value(count, chains, 0.975) == pytest.approx(expected, rel=0.02)


def test_errors_by_weights_are_those_of_two_gaussians():
    """The posterior of two coordinates is N(0.2, 1) and N(0, 0.9^2), that of a third the guide's."""
    draws = torch.randn(20_000, 3)
    loc, scale = torch.tensor([0.2, 0.0, 0.0]), torch.tensor([1.0, 0.9, 1.0])
    posterior, guide = (torch.distributions.Normal(*of) for of in ((loc, scale), (0.0, 1.0)))
    log_weights = (posterior.log_prob(draws) - guide.log_prob(draws)).sum(-1)
    found = errors_by_weights(draws, log_weights)
    # within 4 standard errors, which are those that are given
    shift_off = found.mean_shift - torch.tensor([-0.2, 0.0, 0.0])
    ratio_off = found.sd_ratio - torch.tensor([1.0, 1 / 0.9, 1.0])
    assert bool((shift_off.abs() < 4 * found.mean_shift_se).all())
    assert bool((ratio_off.abs() < 4 * found.sd_ratio_se).all())
    # weights have a variance of 0.05: standard errors are far below those of 20,000 draws, 0.007
    assert float(found.mean_shift_se.max()) < 0.005
    assert float(found.sure_memory.max()) == 0.0


def test_standard_errors_by_weights_are_those_of_repetitions():
    found = []
    for _ in range(200):
        draws = torch.randn(500, 1)
        found.append(errors_by_weights(draws, 0.3 * draws[:, 0] - 0.045))
    shift, shift_se, ratio, ratio_se, *_ = (torch.stack(parts) for parts in zip(*found))
    # an sd from 200 values is known to 5 %
    assert abs(shift.std() / shift_se.mean() - 1) < 0.2
    assert abs(ratio.std() / ratio_se.mean() - 1) < 0.2
