# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Elements of plates given all other latents, against exact conditionals of Gaussian posteriors."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform.inference.all_batches import full_data_density
from pyro_artransform.inference.evaluation.conditionals import conditional_diagnostics
from pyro_artransform.inference.evaluation.verdict import about_plate
from pyro_artransform.inference.loader import BatchStream
from pyro_artransform.model import LogJoint
from tests.inference.test_fit_elements import NOISE, NUM_USERS, crossed, exact, loader_of, ratings


def density_of(model, loader):
    stream = BatchStream(loader)
    return full_data_density(LogJoint(model, *next(stream.one_pass(1))), stream)


@pytest.fixture(scope="module")
def posterior():
    data = ratings()
    user, item, _ = data
    one_hot = torch.nn.functional.one_hot
    design = torch.cat([torch.ones(len(user), 1), one_hot(user), one_hot(item)], 1).double()
    prior = torch.tensor([4.0, *[0.49] * 20, *[0.81] * 40]).double()
    precision = design.T @ design / NOISE**2 + prior.reciprocal().diag()
    torch.manual_seed(0)
    normal = dist.MultivariateNormal(exact(*data)[0].double(), precision_matrix=precision)
    return density_of(crossed, loader_of(*data)), normal.sample((400,)).float(), precision


def found_at(density, draws):
    return conditional_diagnostics(density, draws)


def test_the_posterior_itself(posterior):
    density, draws, _ = posterior
    found = found_at(density, draws)
    assert list(found) == ["users", "items"]
    assert [len(each.gap) for each in found.values()] == [20, 40]
    assert all(each.trusted.all() and each.gap.max() < 0.03 for each in found.values())
    assert not any(about_plate(each, "") for each in found.values())


@pytest.mark.parametrize(
    ("place", "name", "index"), [(8, "users", 7), (1 + NUM_USERS + 31, "items", 31)]
)
def test_one_element_is_named(posterior, place, name, index):
    """A shift of one conditional sd is half a nat, and draws twice as wide are 0.81 nats."""
    density, draws, precision = posterior
    sd = precision[place, place].rsqrt().item()
    shifted, wide = draws.clone(), draws.clone()
    shifted[:, place] += sd
    torch.manual_seed(1)
    wide[:, place] += 3**0.5 * sd * torch.randn(400)
    for moved, gap in ((shifted, 0.5), (wide, 1.5 - math.log(2))):
        found = found_at(density, moved)[name]
        assert (~found.trusted).nonzero().flatten().tolist() == [index]
        assert abs(found.gap[index] - gap) < 4 * found.gap_se[index] + 0.02
        (failed,) = about_plate(found, "a better one")
        assert f"elements of plate '{name}': element {index} (" in failed.sentence
        assert "nats from the posterior given all other latents" in failed.sentence


def test_what_is_not_seen_is_said(posterior):
    """All users against all items, which only the mean of each plate and the priors determine."""
    density, draws, _ = posterior
    moved = draws.clone()
    moved[:, 1 : 1 + NUM_USERS] += 0.3
    moved[:, 1 + NUM_USERS :] -= 0.3
    weights = density(moved) - density(draws)
    assert weights.mean() < -3
    found = found_at(density, moved)
    assert all(each.trusted.all() for each in found.values())
    assert all("does not show here" in repr(each) for each in found.values())


def test_elements_of_several_coordinates_in_nested_plates():
    """Intercepts and slopes of subjects in clinics, correlated given the data of a subject."""
    times = torch.tensor([0.0, 1.0, 2.0, 3.0])
    y = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    index = torch.arange(60).reshape(3, 5, 4)

    def model(row, y):
        with pyro.plate("clinics", 3, dim=-2), pyro.plate("subjects", 5, dim=-1):
            both = pyro.sample("both", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 60, subsample_size=len(y)):
            own = both.flatten(-3, -2)[..., row // 4, :]
            pyro.sample("y", dist.Normal(own[..., 0] + own[..., 1] * times[row % 4], 0.5), obs=y)

    data = TensorDataset(index.flatten(), y.flatten())
    density = density_of(model, DataLoader(data, batch_size=20, shuffle=True))
    design = torch.stack([torch.ones(4), times], -1)
    covariance = (design.T @ design / 0.25 + torch.eye(2)).inverse()
    mean = y @ design / 0.25 @ covariance
    torch.manual_seed(0)
    draws = dist.MultivariateNormal(mean, covariance).sample((400,))
    (found,) = found_at(density, draws.flatten(1)).values()
    assert found.plate == "clinics/subjects"
    assert found.trusted.all()
    independent = draws.clone()
    independent[:, 1, 2] = mean[1, 2] + covariance.diagonal().sqrt() * torch.randn(400, 2)
    (found,) = found_at(density, independent.flatten(1)).values()
    correlation = covariance[0, 1] ** 2 / covariance.diagonal().prod()
    # the covariance has determinant 1 - r^2 of that of independent draws, and the trace is 2 / (1 - r^2)
    gap = 1 / (1 - correlation) - 1 + 0.5 * torch.log(1 - correlation)
    assert found.name_of(int(found.gap.argmax())) == "element (1, 2)"
    assert abs(found.gap.max() - gap) < 4 * found.gap_se.max() + 0.02


def test_elements_that_depend_on_each_other_are_not_judged():
    def paired(home, away, y):
        with pyro.plate("teams", 6):
            skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
        with pyro.plate("games", 12, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(skill[..., home] - skill[..., away], 1.0), obs=y)

    home = torch.arange(12) % 6
    density = density_of(paired, loader_of(home, (home + 1) % 6, torch.zeros(12)))
    assert found_at(density, torch.randn(10, 6)) == {}
