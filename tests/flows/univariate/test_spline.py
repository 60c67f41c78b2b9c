# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.flows.univariate import MonotonicRQSTransform, RationalQuadraticSpline

K = 8


def _spline(*shape, gain=1.0, dtype=torch.float64, bound=5.0):
    params = [gain * torch.randn(*shape, size, dtype=dtype) for size in (K, K, K - 1)]
    return MonotonicRQSTransform(*params, bound=bound)


def _knots(transform):
    """The knots of a spline of tables of shape (K, D), from the lengths of its bins."""
    ends = torch.nn.functional.pad(transform.widths.cumsum(-2), (0, 0, 1, 0))
    return transform.bound * (2 * ends - 1)


def test_spline_of_the_paper():
    """Against the formula, bin by bin, written out with the corners of the bins."""
    transform = _spline(1)
    x_knots = _knots(transform)[:, 0]
    y_knots = transform.bound * (
        2 * torch.nn.functional.pad(transform.heights[:, 0].cumsum(0), (1, 0)) - 1
    )
    at_knots = transform.call_and_ladj(x_knots[1:-1, None])[1].exp()[:, 0]
    slopes = torch.nn.functional.pad(at_knots, (1, 1), value=1.0)
    for k in range(K):
        z = torch.linspace(0.01, 0.99, 50)
        width, height = x_knots[k + 1] - x_knots[k], y_knots[k + 1] - y_knots[k]
        s, d0, d1 = height / width, slopes[k], slopes[k + 1]
        y = y_knots[k] + height * (s * z**2 + d0 * z * (1 - z)) / (
            s + (d0 + d1 - 2 * s) * z * (1 - z)
        )
        assert torch.allclose(transform((x_knots[k] + z * width)[:, None])[:, 0], y)


def test_slopes_are_continuous_at_knots_and_ends():
    transform = _spline(64, gain=2.0)
    knots = _knots(transform)
    step = 1e-9
    left = transform.call_and_ladj(knots - step)[1]
    right = transform.call_and_ladj(knots + step)[1]
    assert torch.allclose(left, right, atol=1e-5)
    assert left[[0, -1]].abs().max() < 1e-6


@pytest.mark.parametrize("direction", ["call_and_ladj", "inverse_and_ladj"])
def test_points_in_the_tails_have_finite_gradients(direction):
    params = (100 * torch.randn(6, 3 * K - 1)).requires_grad_()
    x = torch.tensor([-1e30, -5.0, 5.0, 1e4, torch.inf, torch.nan], requires_grad=True)
    y, ladj = getattr(RationalQuadraticSpline()(params), direction)(x)
    (y[:4].sum() + ladj[:4].sum()).backward()
    assert torch.equal(x.grad[:4], torch.ones(4))
    assert torch.equal(params.grad[:4], torch.zeros(4, 3 * K - 1))


def test_arguments_and_broadcasting_as_in_zuko():
    transform = MonotonicRQSTransform(torch.randn(5, K), torch.randn(5, K), torch.randn(5, K - 1))
    for function in (transform, transform.inv):
        for shape in ((5,), (2, 7, 5)):
            x = 3 * torch.randn(shape)
            y, ladj = function.call_and_ladj(x)
            assert y.shape == ladj.shape == shape
            one_by_one = torch.stack([function(row) for row in x.reshape(-1, 5)])
            assert torch.allclose(one_by_one.reshape(shape), y)
        assert function(torch.randn(())).shape == (5,)
    mixed = MonotonicRQSTransform(torch.randn(7, 5, K), torch.randn(5, K), torch.randn(K - 1))
    assert mixed(torch.randn(5)).shape == (7, 5)
    one_for_all = _spline()
    for shape in ((), (4,), (4, 3)):
        x = torch.randn(shape)
        y, ladj = one_for_all.call_and_ladj(x)
        assert y.shape == ladj.shape == one_for_all.inv(x).shape == shape
        assert torch.allclose(one_for_all.inv(y), x)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 8), (5, 8), (5, 8)), r"K - 1\).*got \(5, 8\), \(5, 8\), \(5, 8\)"),
        (((5, 8), (5, 7), (5, 7)), r"K - 1\).*got \(5, 8\), \(5, 7\), \(5, 7\)"),
        (((5, 1), (5, 1), (5, 0)), r"K >= 2, got \(5, 1\)"),
        (((), (8,), (7,)), r"K >= 2, got \(\)"),
        (((5, 8), (4, 8), (5, 7)), r"broadcast.*got \(5,\), \(4,\), \(5,\)"),
    ],
)
def test_shapes_that_do_not_go_together(shapes, message):
    with pytest.raises(ValueError, match=message):
        MonotonicRQSTransform(*(torch.zeros(shape) for shape in shapes))


def test_sizes_are_checked_and_shown():
    with pytest.raises(ValueError, match="count_bins: expected an integer of at least 2, got"):
        RationalQuadraticSpline(count_bins=1)
    with pytest.raises(ValueError, match="bound: expected a positive finite number, got"):
        RationalQuadraticSpline(bound=0)
    assert repr(RationalQuadraticSpline()) == "RationalQuadraticSpline(count_bins=8, bound=5.0)"
