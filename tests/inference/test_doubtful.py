# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that must not be believed are not: superchains that disagree, or modes, say so."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex

from pyro_artransform import fit
from pyro_artransform.sampling import mcmc
from tests.inference.models import tilted


@config_enumerate
def labels():
    """Two locations of data around -5 and 4, with other weights: their exchange gives another mode.

    Since there are as many data around each, it has the same mass.
    """
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    data = torch.cat([torch.linspace(-6, -4, 20), torch.linspace(3, 5, 20)])
    with pyro.plate("data", len(data)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("y", dist.Normal(Vindex(locs)[..., kind], 1.0), obs=data)


def improper():
    a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
    b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))


def cauchy(dim=10):
    """Of independent latents, in whose tails trajectories hardly get anywhere."""
    prior = dist.Normal(torch.zeros(dim), 5.0).to_event(1)
    tilted("z", prior, dist.Cauchy(torch.zeros(dim), 1.0).to_event(1))


def angle():
    """An angle that any whole turn leaves as it is."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.factor("around", dist.VonMises(0.0, 0.5).log_prob(z))


def direction(y):
    phi = pyro.sample("phi", dist.VonMises(0.0, 1.0))
    with pyro.plate("directions", len(y)):
        pyro.sample("y", dist.VonMises(phi, 4.0), obs=y)


def wall():
    """Two islands of equal mass, between which there is no density."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    inside = z[..., 0].abs() > 6
    pyro.factor("wall", torch.where(inside, 0.0, -torch.inf))


def two_scales():
    """A scale that is near 0.01 or near 1, each with half of the mass, of five effects."""
    prior = dist.Normal(-2.0, 3.0)
    log_scale = pyro.sample("log_scale", prior)
    places = torch.tensor([math.log(0.01), 0.0])
    parts = dist.Normal(places, 0.3).log_prob(log_scale.unsqueeze(-1))
    pyro.factor("both", parts.logsumexp(-1) - prior.log_prob(log_scale))
    scale = log_scale[..., None].exp()
    pyro.sample("effects", dist.Normal(torch.zeros(5), scale).to_event(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (improper, ("have not mixed",)),
        (cauchy, ("have not mixed", "effective draws in the tails")),
        (angle, ("have not mixed",)),
        (wall, ("chains found 2 modes", "have not mixed")),
    ],
)
def test_draws_of_chains(model, words):
    chains = mcmc(model, draws=400, seed=0, progress=False, max_seconds=20)
    assert not chains.trusted, chains
    assert any(each in chains.verdict for each in words)


def test_modes_between_which_chains_move():
    result, site, share = fit(labels, seed=0, progress=False), "locs", 0.5
    assert result.ok
    assert result.trusted
    below = (result.chains.by_chain[site][..., 0] < 0).double().mean()
    assert float(below) == pytest.approx(share, abs=4 * (share * (1 - share) / 400) ** 0.5)
    # of the chains where there are symmetries, of the flows otherwise
    least = int(result.modes.share.argmin())
    found, se = (float(each[least]) for each in (result.modes.share, result.modes.se))
    assert found == pytest.approx(share, abs=4 * se)
    assert "Chains move between 2 modes with" in result.verdict
    draws = result.guide.sample_posterior(4000)[site][:, 0]
    assert float((draws < 0).double().mean()) == pytest.approx(share, abs=0.04)


@pytest.mark.slow
def test_scales_of_two_sizes():
    """Chains at the small one need a hundredth of the step size of the others.

    If no chain starts near the large one, all end at the small one: 2 of 8 runs, whose draws are trusted.
    """
    shares = list[float]()
    for seed in range(6):
        chains = mcmc(two_scales, draws=400, seed=seed, progress=False)
        assert chains.trusted
        shares.append(float((chains.by_chain["log_scale"] < -2.3).double().mean()))
    of_both = [share for share in shares if 0 < share < 1]
    assert len(of_both) >= 2  # with 3 of 4 runs, fewer have a probability of 0.005
    assert of_both == pytest.approx([0.5] * len(of_both), abs=4 * (0.25 / 400) ** 0.5)


@pytest.mark.slow
def test_a_fit_to_a_density_with_a_wall_says_so():
    """No Gaussian avoids the wall, so that the guide cannot start."""
    found = fit(wall, draws=400, seed=0, progress=False, max_seconds=60)
    assert not found.chains.trusted
    assert not found.trusted
    assert found.draws["z"].shape[1:] == (2,)
    assert "wall is not finite there" in found.verdict


def exact_moments(y):
    """The mean cosine and sine of ``direction``, and its log evidence."""
    phi = torch.linspace(-math.pi, math.pi, 4001)[1:]
    log_joint = dist.VonMises(0.0, 1.0).log_prob(phi)
    log_joint = log_joint + dist.VonMises(phi[:, None], 4.0).log_prob(y).sum(-1)
    weights = log_joint.softmax(0)
    evidence = log_joint.logsumexp(0) + math.log(2 * math.pi / len(phi))
    return weights @ phi.cos(), weights @ phi.sin(), evidence


def are_right(phi, cos, sin):
    """Within five standard errors of 400 effective draws."""
    assert abs(phi.cos().mean() - cos) < 5 * phi.cos().std() / 20
    assert abs(phi.sin().mean() - sin) < 5 * phi.sin().std() / 20


@pytest.mark.parametrize("count", [1, 30])
def test_a_direction(count):
    """Vague or concentrated: its posterior on the real line repeats after each turn."""
    y = dist.VonMises(1.0, 4.0).sample((count,))
    cos, sin, evidence = exact_moments(y)
    found = fit(direction, AutoNormal(direction), y, progress=False, seed=0)
    assert abs(found.log_evidence - evidence) < 0.02
    for chains in (found.chains, mcmc(direction, y, seed=0, progress=False)):
        assert chains.trusted
        are_right(chains.draws["phi"], cos, sin)


@pytest.mark.slow
def test_a_direction_opposite_to_zero_has_two_modes():
    """It is cut in two, at both ends of the turn: draws of both are right, or not trusted (3 of 8 runs)."""
    num_found = 0
    for seed in range(8):
        y = math.pi + 0.2 * torch.randn(30)
        cos, sin, _ = exact_moments(y)
        chains = mcmc(direction, y, seed=seed, progress=False, max_seconds=20)
        num_found += chains.trusted and "2 modes with" in chains.verdict
        if chains.trusted:
            are_right(chains.by_chain["phi"], cos, sin)
        else:
            assert "have not mixed" in chains.verdict
    assert num_found >= 2  # with 5 of 8 runs, fewer have a probability of 0.006


def test_a_posterior_that_reaches_below_the_smallest_number_is_not_trusted():
    """Of a gamma with shape 0.01, 42 % are below the smallest float32."""

    def model():
        rate = pyro.sample("rate", dist.Gamma(0.01, 0.01))
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor(0.0, dtype=torch.float32))

    torch.set_default_dtype(torch.float32)
    chains = mcmc(model, draws=50, seed=0, progress=False, max_seconds=20)
    assert not chains.trusted
    assert "draws of site rate reach the smallest numbers" in chains.verdict


@pytest.mark.slow
def test_a_scale_without_a_positive_prior_is_said():
    """A part of its prior has no density: draws are right, and trajectories end there."""

    def model():
        tau = pyro.sample("tau", dist.Normal(1.0, 2.0))
        with pyro.plate("groups", 6):
            z = pyro.sample("z", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.linspace(-1.0, 1.0, 6))

    found = mcmc(model, draws=20, seed=0, progress=False)
    assert "use a prior on positive numbers" in found.verdict
