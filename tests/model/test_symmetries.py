# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Symmetries found by the density, and images of draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_artransform.model import LogJoint
from pyro_artransform.model.relabelling import Relabelling
from pyro_artransform.model.symmetries import (
    PERMUTATION,
    ROTATION,
    SIGN,
    SIGNED,
    Symmetry,
    confirmed,
    find_symmetries,
)


def mixture(shift=0.0):
    y = torch.linspace(-3.0, 4.0, 20)
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("k", 3):
        mu = pyro.sample("mu", dist.Normal(shift * torch.arange(3.0), 5.0))
    components = dist.Normal(mu, 1.0)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), components), obs=y)


def factors(scale=1.0):
    y = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
    u = pyro.sample("u", dist.Normal(torch.zeros(4, 2), scale).to_event(2))
    v = pyro.sample("v", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    pyro.sample("y", dist.Normal(u @ v.mT, 1.0).to_event(2), obs=y)


def units():
    x, y = torch.linspace(-1.0, 1.0, 9)[:, None], torch.linspace(0.0, 1.0, 9)
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    v = pyro.sample("v", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    mean = (torch.tanh(x * w[..., None, :]) * v[..., None, :]).sum(-1)
    pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)


def states():
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("f", ((rows @ mu[..., None])[..., 0] * mu - mu).sum(-1))


def signs():
    a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.factor("f", -((a[..., 0] ** 2 - 1) ** 2) - (a[..., 1] - 1) ** 2 - a[..., 3] ** 4)


def cells():
    pyro.sample("cells", dist.Gamma(torch.full((3, 3), 2.0), 1.0).to_event(2))


def slot(name, *dims):
    return name, dims


CASES = {
    "rows and columns": (
        cells,
        {Symmetry(PERMUTATION, (slot("cells", dim),), 3) for dim in (-2, -1)},
    ),
    "mixture": (mixture, {Symmetry(PERMUTATION, (slot("w", -1), slot("mu", -1)), 3)}),
    "rotation": (factors, {Symmetry(ROTATION, (slot("u", -1), slot("v", -1)), 2)}),
    "scales": (
        lambda: factors(torch.tensor([1.0, 2.0])),
        {Symmetry(SIGN, (slot("u", -1), slot("v", -1)), 2)},
    ),
    "units": (units, {Symmetry(SIGNED, (slot("w", -1), slot("v", -1)), 4)}),
    "both dimensions": (states, {Symmetry(PERMUTATION, (slot("rows", -2, -1), slot("mu", -1)), 3)}),
    "weak label": (lambda: mixture(0.01), set()),
    "one sign of several": (signs, set()),
}


def density_and_draws(model, num_draws=8):
    log_joint = LogJoint(model, (), {}).with_coordinates(None)
    return log_joint, log_joint.latents, torch.randn(num_draws, log_joint.latents.latent_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_symmetries_are_those_of_the_density(name, dtype):
    torch.set_default_dtype(dtype)
    model, expected = CASES[name]
    known = density_and_draws(model)
    found = find_symmetries(*known)
    assert {*found} == expected
    assert confirmed(found, *known) == found


def test_a_symmetry_up_to_the_round_off_of_a_large_density_is_not_confirmed():
    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", 1e6 - mu.square().sum(-1) - 3 * mu[..., 0])

    torch.set_default_dtype(torch.float32)
    known = density_and_draws(model)
    assert find_symmetries(*known)
    assert confirmed(find_symmetries(*known), *known) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_next_to_the_edge_of_a_simplex_do_not_hide_a_symmetry(dtype):
    """Rounding leaves nothing of entries of 1e-15, of which others become sums when they are permuted."""
    torch.set_default_dtype(dtype)
    log_joint, latents, u = density_and_draws(mixture)
    u = torch.cat([20 * u, u])
    found = find_symmetries(log_joint, latents, u)
    assert {*found} == CASES["mixture"][1]
    assert confirmed(found, log_joint, latents, u) == found


def test_many_components_are_compared_in_the_memory_of_one_matrix():
    locs = torch.arange(500.0)  # the sign of the first one may change
    known = density_and_draws(lambda: pyro.sample("z", dist.Normal(locs, 1.0).to_event(1)))
    assert find_symmetries(*known) == ()


def test_permutations_with_signs_are_confirmed_by_both():
    """The density changes with an exchange, not with a sign."""

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1))
        pyro.factor("f", -a.square().sum(-1))

    symmetry = Symmetry(SIGNED, (slot("a", -1),), 3)
    assert confirmed([symmetry], *density_and_draws(model)) == ()


@pytest.mark.parametrize("kind", [PERMUTATION, SIGN, SIGNED, ROTATION])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_images_are_undone(kind, size):
    symmetry = Symmetry(kind, (slot("a", -1), slot("b", -2)), size)
    centers = {"a": 10 * torch.randn(size), "b": 10 * torch.randn(size, 3)}
    draws = {k: v + 0.01 * torch.randn(50, *v.shape) for k, v in centers.items()}
    images = symmetry.applied(draws, symmetry.spread(50, draws["a"]))
    torch.testing.assert_close(symmetry.invariants(images), symmetry.invariants(draws))
    found = Relabelling.of((symmetry,), images)(images)
    # all images of one draw are near to each other, so that the sds are those of the noise
    assert max(float(value.std(0).max()) for value in found.values()) < 0.05
    again = Relabelling.of((symmetry,), found)(found)
    torch.testing.assert_close(symmetry.invariants(again), symmetry.invariants(draws))


def test_uncertain_labels_are_of_components_that_overlap():
    symmetry = Symmetry(PERMUTATION, (slot("a", -1),), 2)
    for distance, low, high in ((0.5, 0.1, 0.5), (10.0, 0.0, 1e-6)):
        draws = {"a": torch.tensor([0.0, distance]) + torch.randn(2000, 2)}
        to_image = Relabelling.of((symmetry,), draws)
        (found,) = to_image.uncertainties(to_image(draws))
        assert low <= found <= high


def test_a_symmetry_says_what_it_is():
    symmetry = Symmetry(SIGNED, (slot("w", -1), slot("rows", -2, -1)), 3)
    assert symmetry.num_images == math.factorial(3) * 8
    many = Symmetry(PERMUTATION, (slot("z", -1),), 30)
    assert str(many).startswith("the 2.7e+32 permutations")
    assert str(symmetry) == (
        "the 48 permutations and changes of sign of dimension -1 of w and dimensions -2 and -1 of rows"
    )


@pytest.mark.parametrize("kind", ["permutation", "sign", "signed permutation", "rotation"])
def test_random_elements_are_uniform(kind):
    symmetry, like = Symmetry(kind, (("z", (-1,)),), 3), torch.zeros(1)
    found = symmetry.random(6000, like)
    identity = torch.eye(3)
    assert torch.allclose(found @ found.mT, identity.expand(6000, 3, 3), atol=1e-5)
    # uniform elements times another one are uniform: each entry of a product has the same mean square
    square = 1 / 3 * torch.ones(3, 3) if kind != "sign" else identity
    assert torch.allclose(found.square().mean(0), square, atol=0.03)
    mean = square if kind == "permutation" else torch.zeros(3, 3)
    assert torch.allclose(found.mean(0), mean, atol=0.06)
    if kind == "permutation":
        orders = (found @ torch.tensor([1.0, 10.0, 100.0])).unique(dim=0, return_counts=True)[1]
        # five standard errors of a sixth of so many
        assert orders.tolist() == pytest.approx([1000] * 6, abs=5 * (6000 * 5 / 36) ** 0.5)
