# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Chains of posteriors with several modes."""

import re

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import mcmc
from pyro_artransform.sampling import StopReason, modes
from tests.sampling.densities import two_modes


@pytest.mark.parametrize("share", [0.3, 0.02])
def test_modes_are_named_with_their_mass(share):
    """Chains jump between modes that trajectories cannot leave, by proposals from what chains have seen."""
    chains = mcmc(two_modes(2, 20.0, share), draws=400)
    assert chains.max_rhat <= 1.02
    assert chains.trusted
    left = (chains.by_chain["z"][..., 0] < 0).double()
    found = chains.modes
    assert float(found.share.min()) == pytest.approx(float(left.mean()), abs=1e-6)
    # draws of modes are independent, since each proposal is accepted or not
    assert float(found.se[0]) == pytest.approx(
        (share * (1 - share) / chains.min_ess) ** 0.5, rel=0.5
    )
    # four standard errors
    assert float(found.share.min()) == pytest.approx(share, abs=4 * float(found.se[0]))
    assert found.names == ("z[0]", "z[1]")
    words = r"between 2 modes with (\S+) ± \S+ %, (\S+) ± \S+ % .* differ in z\[0\], z\[1\]; others may exist"
    numbers = re.search(words, chains.verdict).groups()
    assert [*map(float, numbers)] == pytest.approx((100 * found.share).tolist(), abs=0.5)


def of_modes(locs, shares):
    """A model whose posterior has standard normal modes at locs ``(K, D)``."""
    parts = dist.Independent(dist.Normal(locs, 1.0), 1)
    mixture = dist.MixtureSameFamily(dist.Categorical(shares), parts)

    def model():
        prior = dist.Normal(torch.zeros(locs.shape[1]), 30.0).to_event(1)
        z = pyro.sample("z", prior)
        pyro.factor("likelihood", mixture.log_prob(z) - prior.log_prob(z))

    return model


def grid_of_modes():
    return torch.cartesian_prod(*[30.0 * torch.arange(-1.0, 2.0)] * 2)


def test_modes_reached_from_one_start_each_may_not_be_all():
    """Nine modes, no images of each other, of which eight starts reach several only once."""
    locs = grid_of_modes() + torch.tensor([3.0, 5.0])
    chains = mcmc(of_modes(locs, torch.arange(4.0, 13.0)), draws=100)
    assert not chains.trusted
    assert "of them were reached from one start only" in chains.verdict


@pytest.mark.parametrize("seed", [0, 1])
def test_a_narrow_mode_keeps_its_chains(seed):
    """The common step size is too long for the steepest of three modes, which has 4.5 % of the posterior."""

    def model():
        z = pyro.sample("z", dist.Normal(0.5, 2.0))
        pyro.sample("y", dist.Normal(z * (z - 2) * (z + 3), 0.5), obs=torch.tensor(-1.0))

    chains = mcmc(model, draws=400, seed=seed)
    assert len(chains.modes.share) == 3
    share = float((chains.by_chain["z"] < -1.7).double().mean())
    # by quadrature, within four standard errors
    assert share == pytest.approx(0.0448, abs=4 * (0.0448 * 0.955 / 400) ** 0.5)


def test_modes_with_different_numbers_of_images_have_their_mass():
    """Three equal modes, of which the outer ones are images of each other: two, with 2 / 3 and 1 / 3."""
    locs = torch.tensor([[-30.0], [0.0], [30.0]])
    chains = mcmc(of_modes(locs, torch.ones(3)), draws=400)
    share = float((chains.by_chain["z"].abs() > 15).double().mean())
    # four standard errors of so many effective draws
    assert share == pytest.approx(2 / 3, abs=4 * (2 / 9 / 400) ** 0.5)
    assert chains.modes.share == pytest.approx(torch.tensor([share, 1 - share]), abs=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.03])
def test_chains_that_stay_in_modes_are_not_trusted_however_small_one_is(monkeypatch, share):
    """Proposals that are never accepted do not lead from one to the other."""
    monkeypatch.setattr(modes.IndependentProposals, "step", lambda self, target, state, *_: state)
    chains = mcmc(two_modes(2, 20.0, share), draws=20)
    assert chains.stopped_because == StopReason.APART.value
    assert not chains.trusted
    assert "chains found 2 modes" in chains.verdict
    assert chains.modes.share.tolist() == pytest.approx([1 - share, share], abs=0.15)
    assert chains.modes.names == ("z[0]", "z[1]")
