# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import FlowDistribution, conditional_maf, maf
from pyro_artransform.testing import check_transform, redraw
from pyro_artransform.transforms import (
    CompressedTails,
    FlowModule,
    LocationScale,
    Standardize,
    chain,
    standardize,
    standardize_context,
)
from pyro_artransform.transforms.scales_and_tails import check_rows


class SmallKnot(CompressedTails):
    """Most of the draws of the contract are beyond it."""

    knot, width = 0.3, 0.5


TRIL = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-3.0, 0.2, 10.0]], dtype=torch.float64)
MADE = {
    "learnable, D = 1": (lambda: LocationScale(torch.zeros(1), 0.1, full_rank=True), 1),
    "learnable, diagonal": (lambda: LocationScale(torch.zeros(3), 0.1, full_rank=False), 3),
    "learnable": (lambda: LocationScale(torch.zeros(3), 0.1, full_rank=True), 3),
    "fixed, diagonal": (lambda: Standardize(torch.arange(3.0), TRIL.diagonal()), 3),
    "fixed": (lambda: Standardize(torch.arange(3.0), TRIL), 3),
    "tails beyond a small knot": (SmallKnot, 4),
}


@pytest.mark.parametrize(("make", "dim"), MADE.values(), ids=MADE)
def test_contract_and_score(make, dim):
    check_transform(make, dim)
    check_transform(lambda: make().inv, dim)
    transform, x = redraw(make()), torch.randn(20, dim)
    expected = FlowModule.call_and_score(transform, x, -x)
    torch.testing.assert_close(transform.call_and_score(x, -x), expected)


# Learnable


def test_starts_as_the_normal():
    loc, x = torch.tensor([1.0, -40.0, 0.0]), torch.randn(7, 3)
    y, ladj = LocationScale(loc, 0.1, full_rank=True).call_and_ladj(x)
    assert torch.allclose(y, loc + 0.1 * x)
    assert torch.allclose(ladj, torch.full((7,), 0.1).log() * 3)


def test_the_names_in_files_and_no_parameter_that_cannot_act():
    one, three = (LocationScale(torch.zeros(dim), 1, full_rank=True) for dim in (1, 3))
    assert set(one.state_dict()) == {"loc", "log_scale"}
    assert set(three.state_dict()) == {"loc", "log_scale", "lower"}
    assert set(standardize(torch.randn(50, 3)).state_dict()) == {"loc", "scale_tril"}


def test_set_becomes_that_gaussian():
    loc, x = torch.randn(4), torch.randn(9, 4)
    scale_tril = torch.randn(4, 4).tril(-1) + torch.tensor([1e-4, 1.0, 1e4, 2.0]).diag()
    layer = LocationScale(torch.zeros(4), 0.1, full_rank=True)
    before = [id(p) for p in layer.parameters()]
    layer.set_(loc, scale_tril)
    assert [id(p) for p in layer.parameters()] == before
    assert torch.allclose(layer(x), dist.transforms.LowerCholeskyAffine(loc, scale_tril)(x))
    diagonal = LocationScale(torch.zeros(4), 0.1, full_rank=False)
    diagonal.set_(loc, scale_tril.diagonal().diag())
    assert torch.allclose(diagonal(x), loc + scale_tril.diagonal() * x)


@pytest.mark.parametrize(
    ("loc", "scale_tril", "message"),
    [
        (torch.zeros(2), torch.eye(3), r"scale_tril: expected shape \(2, 2\), got \(3, 3\)"),
        (torch.tensor([0.0, float("nan")]), torch.eye(2), "loc: expected finite"),
        (torch.zeros(2), torch.ones(2, 2), "lower-triangular"),
        (torch.zeros(2), torch.tensor([1.0, 0.0]), "positive diagonal"),
        (torch.zeros(2), torch.ones(2, 2).tril(), "full_rank=True"),
    ],
)
def test_what_is_not_a_location_and_scale(loc, scale_tril, message):
    layer = LocationScale(torch.zeros(2), 0.1, full_rank=False)
    with pytest.raises(ValueError, match=message):
        layer.set_(loc, scale_tril)
    assert torch.equal(layer.loc, torch.zeros(2))
    if message != "full_rank=True":
        with pytest.raises(ValueError, match="expected"):
            Standardize(loc, scale_tril)


@pytest.mark.parametrize("target", [1e-4, 1e4])
def test_crosses_orders_of_magnitude_quickly(target):
    """A floor under the scale hides a tight posterior, and a cap a wide one.

    Gradients are clipped, as by Pyro's ClippedAdam: the first ones are of size 1e8.
    """
    layer = LocationScale(torch.zeros(2), 1.0, full_rank=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 500) ** 2
        y, ladj = layer.call_and_ladj(torch.randn(256, 2))
        optimizer.zero_grad()
        ((y / target).square().sum(-1) / 2 - ladj).mean().backward()
        torch.nn.utils.clip_grad_value_(layer.parameters(), 10.0)
        optimizer.step()
    assert (layer.log_scale.exp() / target - 1).abs().max() < 0.1


# From data


def correlated(n=500):
    noise = torch.randn(n, 3) @ TRIL.T
    return torch.tensor([1e4, -2.0, 0.0]) + noise * torch.tensor([1.0, 1e-3, 1.0])


def test_the_density_of_a_new_flow_is_that_of_the_moments():
    data = correlated()
    layer = standardize(data)
    torch.testing.assert_close(layer.loc, data.mean(0))
    torch.testing.assert_close(layer.scale_tril @ layer.scale_tril.T, data.T.cov())
    torch.testing.assert_close(layer.inv(data).T.cov(), torch.eye(3))
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    q = FlowDistribution(base, chain([maf(3), layer]))
    gaussian = dist.MultivariateNormal(data.mean(0), data.T.cov())
    torch.testing.assert_close(q.log_prob(data), gaussian.log_prob(data))


def test_data_in_their_own_units():
    data = correlated()
    layer = standardize(data, full_rank=False)
    torch.testing.assert_close(layer.scale_tril, data.std(0))
    assert not list(layer.parameters())
    assert not check_rows("rows", torch.randn(5, 2, requires_grad=True)).requires_grad
    assert standardize([[1.0], [2.0], [3.0]], full_rank=False).loc.item() == 2.0


@pytest.mark.parametrize(("shape", "dim"), [((29, 3), 1), ((30, 3), 2), ((2010, 201), 1)])
def test_correlations_where_there_are_enough_rows(shape, dim):
    assert standardize(torch.randn(shape)).scale_tril.dim() == dim


def test_float32_far_from_the_origin():
    """A covariance of raw numbers would have lost all digits: the mean is 1e4 sds away."""
    data = (1e4 + torch.randn(200, 2).cumsum(-1)).float()
    layer = standardize(data)
    assert layer.scale_tril.dtype == torch.float32
    cov = layer.inv(data).double().T.cov()
    torch.testing.assert_close(cov, torch.eye(2), atol=1e-2, rtol=0.0)


ROWS = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ROWS[:, 0], r"data: expected shape \(n, D\) with two rows or more, got \(100,\)"),
        (ROWS[:1], r"got \(1, 2\)"),
        (ROWS.index_fill(0, torch.tensor([3]), torch.inf), "got others in 1 of 100"),
        (ROWS * torch.tensor([1.0, 0.0]), r"coordinates that vary, got constant ones: \[1\]"),
        (torch.cat([ROWS, ROWS[:, :1]], -1), "none of which is a linear function of others"),
        ("abc", "data: expected an array of numbers"),
    ],
)
def test_bad_data(data, words):
    with pytest.raises(ValueError, match=words):
        standardize(data)


def test_contexts_are_standardized():
    contexts = torch.tensor([1e3, -5.0]) + torch.randn(100, 2) * torch.tensor([50.0, 1e-3])
    inner = redraw(conditional_maf(3, context_dim=2, num_transforms=2, hidden_dims=8))
    t, x = standardize_context(inner, contexts), torch.randn(100, 3)
    z = (contexts - contexts.mean(0)) / contexts.std(0)
    torch.testing.assert_close(t.condition(contexts)(x), inner.condition(z)(x))
    assert set(t.parameters()) == set(inner.parameters())
    q = chain([t, standardize(x)]).condition(contexts)
    torch.testing.assert_close(q.inv(q(x)), x)
    constant = standardize_context(inner, torch.full((10, 2), 3.0))
    assert (constant.loc.tolist(), constant.scale.tolist()) == ([3.0, 3.0], [1.0, 1.0])


# Tails


def test_tails_are_exactly_the_identity_up_to_the_knot_and_compressed_beyond():
    x = torch.linspace(-40.0, 40.0, 101)[:, None]
    y, ladj = CompressedTails().call_and_ladj(x)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros(101))
    y = CompressedTails()(torch.tensor([42.0, -1000.0]))
    expected = torch.tensor([40 + 2 * math.asinh(1.0), -40 - 2 * math.asinh(480.0)])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_overflows(dtype):
    t = CompressedTails()
    far = torch.tensor([[torch.finfo(dtype).max], [-1e30]], dtype=dtype, requires_grad=True)
    for direction in (t, t.inv):
        y, ladj = direction.call_and_ladj(far)
        (gradient,) = torch.autograd.grad((y.sum() + ladj.sum()), far)
        assert all(value.isfinite().all() for value in (y, ladj, gradient))
    assert all(value.isfinite().all() for value in t.call_and_score(far, torch.ones_like(far)))
    assert t(torch.full((1,), math.nan, dtype=dtype)).isnan()
