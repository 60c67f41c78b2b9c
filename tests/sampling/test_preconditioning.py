# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.sampling.preconditioning import Preconditioner


def draws_of(factor, count):
    """Draws of the Gaussian of covariance factor @ factor.T, and its gradients there."""
    noise = torch.randn(count, len(factor))
    return noise @ factor.T, -noise @ torch.linalg.inv(factor)


def left_of(factor, found):
    """The variances of the Gaussian in the coordinates that were found, in ascending order."""
    matrix = found(torch.eye(len(factor))).T
    return torch.linalg.svdvals(torch.linalg.solve(matrix, factor)).square().flip(0)


def correlated(dim):
    """Sds over two orders of magnitude, along axes of no coordinate, in units over six more."""
    turn = torch.linalg.qr(torch.randn(dim, dim)).Q
    return torch.logspace(-3, 3, dim)[:, None] * turn * torch.logspace(-1, 1, dim) @ turn.T


# Without the ridge of 1e-3 all would be exact from dim + 1 draws on, but for variances within 1.2 of one,
# which are left as they are. The bounds are 1.2 times what is the largest of eight seeds.
def rotated(dim):
    """Sds over two orders of magnitude, which single precision can tell."""
    torch.set_default_dtype(torch.float32)
    return torch.logspace(-1, 1, dim) * torch.linalg.qr(torch.randn(dim, dim)).Q


@pytest.mark.parametrize(
    ("make", "dim", "count", "factor"),
    [
        *((correlated, 1, 3, 1.2), (correlated, 20, 22, 3.7), (correlated, 200, 202, 2.6)),
        *((correlated, 20, 60, 1.3), (correlated, 200, 400, 1.45), (rotated, 20, 40, 1.3)),
    ],
)
def test_a_gaussian_is_known_from_about_as_many_draws_as_dimensions(make, dim, count, factor):
    """Of condition numbers of 1e16: what is left is a condition of ten, and of two by twice the draws."""
    lower = make(dim)
    found = Preconditioner.of(*draws_of(lower, count))
    assert found.scale.dtype == lower.dtype
    variances = left_of(lower, found)
    assert variances[0] > 1 / factor
    assert variances[-1] < factor


def test_few_directions_of_many_dimensions():
    """Of 700 dimensions five are wide and five narrow, by a condition of 160,000: 200 draws leave 80.

    The leading directions of so few draws are off by a share of 700 / 200 / 400 of their squares.
    """
    dim, axes = 700, torch.linalg.qr(torch.randn(700, 10)).Q
    sds = torch.cat([torch.full((5,), 20.0), torch.full((5,), 0.05)])
    lower = torch.eye(dim) + axes * (sds - 1) @ axes.T
    lower = torch.logspace(-2, 2, dim)[:, None] * lower
    found = Preconditioner.of(*draws_of(lower, 200))
    variances = left_of(lower, found)
    assert variances[0] > 1 / 12
    assert variances[-1] < 12
    assert ((variances < 0.3) | (variances > 3)).sum() <= 10
    assert len(found.factors) < 64


def test_more_dimensions_than_draws():
    """Coordinates each in units of its own, and no direction that the draws do not have."""
    factor = torch.logspace(-4, 4, 100).diag()
    found = Preconditioner.of(*draws_of(factor, 30))
    variances = left_of(factor, found)
    assert variances[0] > 0.1
    assert variances[-1] < 10
    # two draws say nothing of directions
    assert len(Preconditioner.of(*draws_of(factor, 3)).factors) == 0


def test_one_is_the_transpose_of_the_other():
    found = Preconditioner.of(*draws_of(correlated(20), 30))
    assert len(found.factors) > 10
    x, y = torch.randn(1, 20), torch.randn(1, 20)
    assert torch.allclose((found(x) * y).sum(), (x * found.transposed(y)).sum())
    assert torch.allclose(found.directions.T @ found.directions, torch.eye(len(found.factors)))


def is_usable(found, dim):
    """Whether a preconditioner is finite and has positive scales and factors."""
    return (
        all(part.isfinite().all() for part in found)
        and (found.scale > 0).all()
        and (found.factors > 0).all()
        and found(torch.eye(dim).to(found.scale)).isfinite().all()
    )


def test_points_with_huge_gradients_are_left_out():
    draws, gradients = draws_of(torch.diag(torch.tensor([0.1, 1.0, 10.0])), 60)
    expected = Preconditioner.of(draws, gradients)
    wild, huge = torch.randn(10, 3), torch.full((10, 3), 1e200)
    huge[5:] *= -1
    found = Preconditioner.of(torch.cat([draws, wild]), torch.cat([gradients, huge]))
    assert is_usable(found, 3)
    assert torch.allclose(found.scale, expected.scale)


@pytest.mark.parametrize("dim", [1, 3, 700])
@pytest.mark.parametrize(
    ("dtype", "of_draws", "of_gradients"),
    [(torch.float64, 1.0, x) for x in (0.0, 1e-300, 1e-200, 1e15, 1e150, 1e200, 1e300)]
    + [(torch.float64, x, 1.0) for x in (1e-200, 1e-100, 1e100)]
    + [(torch.float32, 1.0, x) for x in (0.0, 1e-38, 1e-30, 1e15, 1e30, 1e38)],
)
def test_draws_and_gradients_of_any_size(dim, dtype, of_draws, of_gradients):
    """Squares of some overflow, and those of others underflow."""
    draws, gradients = torch.randn(2, 50, dim, dtype=dtype)
    assert is_usable(Preconditioner.of(of_draws * draws, of_gradients * gradients), dim)


@pytest.mark.parametrize("dim", [1, 3, 700])
@pytest.mark.parametrize("count", [1, 2, 3, 50])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e200])
def test_points_that_are_repeated(dim, count, size):
    """Chains that have not moved: one point, with one gradient or with others."""
    draws = torch.randn(1, dim).expand(count, dim)
    for gradients in (torch.ones(count, dim), torch.randn(count, dim)):
        assert is_usable(Preconditioner.of(draws, size * gradients), dim)
