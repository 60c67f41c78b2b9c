# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which elements of plates terms read, and expectations of second derivatives from them."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.model import FullDataDensity, LogJoint
from pyro_artransform.model.elements import ElementGroups, ElementTerms, elements_read
from pyro_artransform.model.expectations import expectation
from pyro_artransform.model.full_data_density import Anchor
from pyro_artransform.model.graphs.element_precision import ElementGaussian

USER, ITEM = torch.tensor([0, 1, 2, 2, 0, 1, 2, 0]), torch.tensor([0, 4, 1, 2, 2, 3, 4, 1])
Y = torch.linspace(-1.0, 2.0, 8, dtype=torch.float64)


def from_right(values, index):
    return values[..., index]


def ratings(user, item, y, *, take=from_right):
    """Users have two latents each, a level and a slope; nobody rated item 5."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("users", 3):
        level = pyro.sample("level", dist.Normal(0.0, scale))
        slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
    with pyro.plate("items", 6):
        effect = pyro.sample("effect", dist.Normal(0.0, 0.7))
    with pyro.plate("rows", 8, subsample_size=len(y)):
        own = take(level, user) + take(slope, user) * y.abs()
        pyro.sample("y", dist.Normal(mean + own + take(effect, item), 0.8), obs=y)


def without_ellipsis(user, item, y):
    ratings(user, item, y, take=torch.Tensor.__getitem__)


@pytest.mark.parametrize("model", [ratings, without_ellipsis])
def test_elements_that_terms_read(model):
    """Priors by element, then rows; in a plate, and with `vmap`, as the model permits."""
    log_joint = LogJoint(model, (USER, ITEM, Y))
    assert log_joint.strategy == ("plate" if model is ratings else "vmap")
    groups = ElementGroups.of(log_joint.latents)
    assert groups.shared.tolist() == [0, 1]
    assert [own.tolist() for own in groups.members] == [
        [[2, 5], [3, 6], [4, 7]],
        [[8], [9], [10], [11], [12], [13]],
    ]
    user, item = elements_read(log_joint, groups, log_joint.start)
    none = [-1] * 2
    assert user.tolist() == [*none, 0, 1, 2, 0, 1, 2, *[-1] * 6, *USER.tolist()]
    assert item.tolist() == [*none, *[-1] * 6, *range(6), *ITEM.tolist()]


def test_terms_that_read_several_elements():
    def paired(home, away, y):
        with pyro.plate("teams", 4):
            skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
        with pyro.plate("games", len(y)):
            pyro.sample("y", dist.Normal(skill[..., home] - skill[..., away], 1.0), obs=y)

    home = torch.tensor([0, 1])
    log_joint = LogJoint(paired, (home, home + 1, torch.zeros(2)))
    assert elements_read(log_joint, ElementGroups.of(log_joint.latents), log_joint.start) == [None]
    terms = ElementTerms.of(log_joint, lambda: [(1.0, log_joint)])
    assert terms.groups.shared.tolist() == [0, 1, 2, 3]
    assert not terms.groups.members
    assert not terms.links


def of_batches(count=4):
    rows = zip(*(values.split(count) for values in (USER, ITEM, Y)))
    batches = [(batch, {}) for batch in rows]
    density = FullDataDensity(LogJoint(ratings, batches[0][0]), batches)
    terms = ElementTerms.of(density, density.parts)
    return density, terms


def dense(precision):
    """The precision as a dense matrix."""
    return precision.times(torch.eye(precision.dim, dtype=precision.shared.dtype))


def test_expectations_are_those_of_autograd():
    density, terms = of_batches()
    generator = torch.Generator().manual_seed(0)
    draws = 0.3 * torch.randn(3, 14, generator=generator)
    whole = LogJoint(ratings, (USER, ITEM, Y))
    hessians = [
        torch.autograd.functional.hessian(lambda z: whole(z[None])[0], draw) for draw in draws
    ]
    found = expectation(density, terms, draws, torch.full((14,), 1e-4))
    assert abs(found.value - whole(draws).mean()) < 1e-8
    # differences on one side have errors proportional to the step
    assert torch.allclose(dense(found.precision), -torch.stack(hessians).mean(0), atol=2e-3)


def gaussian():
    density, terms = of_batches()
    point = density.start[None]
    found = expectation(density, terms, point, torch.full((14,), 1e-3))
    return ElementGaussian(density.start, found.precision), dense(found.precision)


def test_the_gaussian_of_a_precision():
    """Shared latents are exact, as are elements of the last group given the others."""
    found, matrix = gaussian()
    covariance = matrix.inverse()
    shared = found.precision.groups.shared
    assert torch.allclose(found.root_covariance, covariance[shared][:, shared], rtol=1e-6)
    vector = torch.arange(14.0)
    assert torch.allclose(found.solve(vector), covariance @ vector, rtol=1e-6)
    items = found.precision.groups.members[1][:, 0]
    expected = matrix[items, items].rsqrt()
    assert torch.allclose(found.scale[items], expected)
    # with 6 coordinates of users, all eigenvectors of their links are almost exact
    entropy = 0.5 * (covariance.logdet() + 14 * (1 + torch.tensor(2 * torch.pi).log()))
    assert -0.01 < found.entropy - entropy < 0.01


def test_draws_of_the_gaussian():
    found, matrix = gaussian()
    identity = torch.eye(14)
    root = found.sample(identity) - found.sample(torch.zeros(1, 14))
    covariance = root.T @ root
    assert torch.allclose(covariance, matrix.inverse(), atol=0.01)


def test_second_order_terms_of_a_batch_are_exchanged():
    """A quadratic density of a batch becomes that of all data, as does its gradient."""

    def quadratic(user, item, y):
        with pyro.plate("users", 3):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 6):
            effect = pyro.sample("effect", dist.Normal(0.0, 0.7))
        with pyro.plate("rows", 8, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(level[..., user] + effect[..., item], 0.8), obs=y)

    batches = [(batch, {}) for batch in zip(*(values.split(4) for values in (USER, ITEM, Y)))]
    density = FullDataDensity(LogJoint(quadratic, batches[0][0]), batches)
    terms = ElementTerms.of(density, density.parts)
    point = torch.linspace(-1.0, 1.0, 9)
    found = expectation(density, terms, point[None], torch.full((9,), 0.1))
    anchor = Anchor.of(density, point, torch.full((9,), 1e3))._replace(precision=found.precision)
    z = torch.randn(5, 9, requires_grad=True)
    (expected,) = torch.autograd.grad(density(z).sum(), z)
    for batch in batches:
        corrected = density.estimate(*batch, anchor, 100)
        (gradient,) = torch.autograd.grad(corrected(z).sum(), z)
        assert torch.allclose(gradient, expected)
        assert torch.allclose(corrected(z), density(z))
        first_order = density.estimate(*batch, anchor._replace(precision=None), 100)
        assert not torch.allclose(first_order(z), density(z), atol=0.1)
