# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.sampling.modes import Modes


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
    """At one place they are one group; at two they are two."""
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
