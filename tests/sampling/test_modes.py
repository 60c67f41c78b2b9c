# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
import re

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import mcmc
from pyro_artransform.sampling import StopReason
from pyro_artransform.sampling.modes import IndependentProposals, Modes
from tests.sampling.densities import two_modes


def draws_of(places, sds, log_masses, dim=3, chains_each=4, count=100):
    """Exact draws of normal modes at ``place`` in the first coordinate, ``(C, n, D)``, and densities."""
    noise = torch.randn(len(places), chains_each, count, dim)
    sds = torch.tensor(sds)[:, None, None]
    log_density = -noise.square().sum(-1) / 2 - dim * (sds.log() + math.log(2 * math.pi) / 2)
    draws = sds[..., None] * noise
    draws[..., 0] += torch.tensor(places)[:, None, None]
    log_density = log_density + torch.tensor(log_masses)[:, None, None]
    return draws.flatten(0, 1), log_density.flatten(0, 1)


@pytest.mark.parametrize("dim", [1, 3, 300])
@pytest.mark.parametrize(
    ("places", "sds", "shares"),
    [
        ([-8.0, 8.0], [1.0, 1.0], [0.5, 0.5]),
        ([-8.0, 8.0], [1.0, 0.01], [0.2, 0.8]),
        ([0.0, 20.0, -30.0], [0.3, 1.0, 2.0], [0.01, 0.3, 0.69]),
    ],
)
def test_modes_have_their_shares(places, sds, shares, dim):
    """Of Gaussians: one that is narrow and high has what its volume gives it; 300 sds have errors."""
    masses = [math.log(share) for share in shares]
    found = Modes.of(*draws_of(places, sds, masses, dim))
    by_mode = found.share[found.group.reshape(len(places), 4)]
    assert (by_mode == by_mode[:, :1]).all()  # chains of one mode are a group
    assert torch.equal(found.share, found.share.sort(descending=True).values)
    assert float(found.share.sum()) == pytest.approx(1.0)
    odds = by_mode[:, 0].log() - torch.tensor(masses)
    # an sd of 400 draws has an error of 3.5 %, and the mean energy of D / 2 nats one of (D / 800)^(1/2)
    assert float(odds.max() - odds.min()) < 5 * 0.05 * (2 * dim) ** 0.5
    assert found.differs[0] > 4
    assert (found.differs[1:] < 4).all()


def test_correlations_count_where_there_are_enough_draws():
    """Two modes of one height, of which one is a ridge of a tenth of the volume."""
    noise = torch.randn(2, 4, 200, 2)
    ridge = torch.tensor([[1.0, 0.0], [0.995, 0.1]])
    draws = torch.stack([noise[0] - 10, noise[1] @ ridge.T + 10]).flatten(0, 1)
    found = Modes.of(draws, -noise.square().sum(-1).flatten(0, 1) / 2)
    assert float(found.share[1]) == pytest.approx(1 / 11, rel=0.3)
    assert found.group.tolist() == [0] * 4 + [1] * 4


def test_chains_that_overlap_are_one_group():
    """In a row, each near the next one, though the first and the last are apart."""
    draws, log_density = draws_of([2.5 * i for i in range(6)], [1.0] * 6, [0.0] * 6)
    found = Modes.of(draws, log_density)
    assert found.group.tolist() == [0] * 24
    assert found.share.tolist() == [1.0]
    assert found.differs[0] > 4


def test_chains_that_stand_still():
    still = torch.zeros(4, 50, 2)
    assert len(Modes.of(still, torch.zeros(4, 50)).share) == 1
    still[:2] = 1.0
    assert len(Modes.of(still, torch.zeros(4, 50)).share) == 2


def test_points_are_next_to_the_group_in_whose_sds_they_are_nearest():
    """A tenth of the way from a narrow mode, of 0.1 sds, to a wide one is in the wide one."""
    draws, log_density = draws_of([0.0, 20.0], [0.1, 2.0], [math.log(0.2), math.log(0.8)], dim=1)
    found = Modes.of(draws, log_density)
    assert found.loc[:, 0].tolist() == pytest.approx([20.0, 0.0], abs=0.5)
    points = torch.tensor([[0.2], [2.0], [19.0], [-0.3]])
    assert found.shares_of(points).tolist() == [0.5, 0.5]
    assert found.shares_of(points[:1]).tolist() == [0.0, 1.0]


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
    monkeypatch.setattr(IndependentProposals, "step", lambda self, target, state, *_: state)
    chains = mcmc(two_modes(2, 20.0, share), draws=20)
    assert chains.stopped_because == StopReason.APART.value
    assert not chains.trusted
    assert "chains found 2 modes" in chains.verdict
    assert chains.modes.share.tolist() == pytest.approx([1 - share, share], abs=0.15)
    assert chains.modes.names == ("z[0]", "z[1]")
