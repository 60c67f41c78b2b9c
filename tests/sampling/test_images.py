# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Chains of posteriors with symmetries."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_artransform import fit, mcmc
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import Chains
from pyro_artransform.sampling.run_mcmc import from_nothing


def mixture(distance):
    y = torch.cat([torch.randn(30) - distance, torch.randn(15) + distance])

    def model():
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("k", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        components = dist.Normal(mu, 1.0)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), components), obs=y)

    return model


def exchangeable():
    """Two latents of which only the sum has data: symmetric, but with one mode."""
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(a.sum(-1), 1.0), obs=torch.tensor(1.5))


def square():
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(a**2, 0.3), obs=torch.tensor(2.0))


def test_components_of_a_mixture_have_names():
    chains = mcmc(mixture(4.0), draws=400)
    assert chains.trusted
    assert "the 2 permutations of dimension -1 of w and dimension -1 of mu" in chains.verdict
    mu = chains.by_chain["mu"].flatten(0, 1)
    order = mu.mean(0).argsort()
    low, high = mu[:, order].T
    # four sds of a mean of 15 rows, at a distance of eight
    assert float(low.max()) < -2 < 2 < float(high.min())
    w = chains.by_chain["w"].flatten(0, 1)[:, order].mean(0)
    # Dirichlet(31, 16) given the labels, which the data leave no doubt about
    assert w.tolist() == pytest.approx([31 / 47, 16 / 47], abs=0.02)


def test_draws_of_an_exchangeable_posterior_are_of_all_images():
    chains = mcmc(exchangeable, draws=2000)
    assert chains.trusted
    assert "chains move between all images" in chains.verdict
    means = chains.by_chain["a"].flatten(0, 1).mean(0)
    # the posterior mean is 1 / 2 for both; four standard errors of 2,000 draws with sd 0.82
    assert means.tolist() == pytest.approx([0.5, 0.5], abs=4 * 0.82 / 2000**0.5)


def test_one_image_of_components_that_overlap_is_named():
    """Chains move slowly between the images: what they end with depends on the seed."""
    verdict = mcmc(mixture(0.5), draws=400, max_seconds=30).verdict
    assert "Components overlap" in verdict or "chains move between all images" in verdict


def test_a_symmetry_that_is_no_longer_confirmed_maps_no_draws():
    ensemble = from_nothing(LogJoint(square), 100)
    ensemble.run(100)
    assert ensemble.to_image is not None
    ensemble.symmetries = ()  # as after a second warm-up, at other draws
    assert ensemble.to_image is None
    assert ensemble.draws.shape[-1] == 1


def test_random_numbers_of_the_user_stay_as_they_are():
    ensemble = from_nothing(LogJoint(square), 100)
    ensemble.run(100)
    before = torch.get_rng_state()
    ensemble.symmetries[0].spread(8, ensemble.draws)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_evidence_is_of_one_image(tmp_path):
    result = fit(square, draws=400, num_steps=300, seed=0)
    assert result.num_images == 2
    grid = torch.linspace(-6, 6, 100_001)
    log_joint = dist.Normal(0.0, 2.0).log_prob(grid)
    log_joint = log_joint + dist.Normal(grid**2, 0.3).log_prob(torch.tensor(2.0))
    exact = float(log_joint.logsumexp(0)) + math.log(12 / 100_000)
    found = result.log_evidence + math.log(result.num_images)
    assert found == pytest.approx(exact, abs=0.02)
    assert "of one of 2 images: add 0.693 for all" in repr(result)
    result.chains.save(tmp_path / "chains.pt")
    assert Chains.load(tmp_path / "chains.pt").symmetries == result.symmetries


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_symmetry_of_one_mode_is_none_of_the_posterior(seed):
    """A rotation leaves the larger of two modes as it is; chains must not be rotated out of the other one."""
    locs, shares = torch.tensor([[0.0, 0.0], [14.0, 14.0]]), torch.tensor([0.7, 0.3])
    parts = dist.MixtureSameFamily(
        dist.Categorical(shares), dist.Normal(locs, 1.0).to_event(1), validate_args=False
    )

    def model():
        prior = dist.Normal(torch.zeros(2), 10.0).to_event(1)
        z = pyro.sample("z", prior)
        pyro.factor("likelihood", parts.log_prob(z) - prior.log_prob(z))

    chains = mcmc(model, draws=400, seed=seed)
    assert [s.kind for s in chains.symmetries] == ["permutation"]
    share = float((chains.by_chain["z"][..., 0] > 7).double().mean())
    assert share == pytest.approx(0.3, abs=4 * (0.21 / 400) ** 0.5)


@pytest.mark.parametrize("by", [mcmc, fit])
def test_draws_of_the_whole_posterior(by):
    """Each is in a random image, so that components have the same marginals."""
    options = {"num_steps": 1, "progress": False} if by is fit else {}
    model = mixture(4.0)
    found = [by(model, draws=400, seed=0, relabel=each, **options) for each in (True, False)]
    named, whole = (each.chains if by is fit else each for each in found)
    assert "draws are shown in random images" in whole.verdict
    assert (named.max_rhat, named.min_ess) == (whole.max_rhat, whole.min_ess)
    mu = whole.by_chain["mu"].flatten(0, 1)
    w = whole.by_chain["w"].flatten(0, 1)
    is_first = mu[:, 0] < 0
    # five standard errors of independent labels
    assert float(is_first.double().mean()) == pytest.approx(0.5, abs=2.5 / len(mu) ** 0.5)
    # the component of two thirds of the rows is below zero, with a weight above a half in 98 % of the draws
    is_heavier = w[:, 0] > w[:, 1]
    assert float((is_heavier == is_first).double().mean()) > 0.95
    assert torch.allclose(mu.sort(-1).values, named.by_chain["mu"].flatten(0, 1).sort(-1).values)
