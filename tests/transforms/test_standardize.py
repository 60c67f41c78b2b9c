# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import FlowDistribution, conditional_maf, maf
from pyro_artransform.testing import check_transform, redraw
from pyro_artransform.transforms import (
    Standardize,
    StandardizedContext,
    chain,
    standardize,
    standardize_context,
)

TRIL = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-3.0, 0.2, 10.0]])


def correlated(n=500):
    noise = torch.randn(n, 3) @ TRIL.to(torch.float64).T
    return torch.tensor([1e4, -2.0, 0.0]) + noise * torch.tensor([1.0, 1e-3, 1.0])


@pytest.mark.parametrize("scale", [TRIL, TRIL.diagonal()], ids=["triangular", "diagonal"])
def test_contract(scale):
    make = lambda: Standardize(torch.tensor([1.0, 2.0, 3.0]), scale)  # noqa: E731
    check_transform(make, 3)
    check_transform(lambda: make().inv, 3)


def test_data_are_standardized():
    data = correlated()
    x = standardize(data).inv(data)
    torch.testing.assert_close(x.mean(0), torch.zeros(3), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(x.T.cov(), torch.eye(3))


def test_data_in_their_own_units():
    data = correlated()
    t = standardize(data, full_rank=False)
    torch.testing.assert_close(t.loc, data.mean(0))
    torch.testing.assert_close(t.scale_tril, data.std(0))
    assert not list(t.parameters())
    assert set(t.state_dict()) == {"loc", "scale_tril"}


@pytest.mark.parametrize(("shape", "dim"), [((29, 3), 1), ((30, 3), 2), ((3000, 201), 1)])
def test_correlations_where_there_are_enough_draws(shape, dim):
    assert standardize(torch.randn(shape)).scale_tril.dim() == dim


def test_the_density_of_a_new_flow_is_that_of_the_moments():
    data = correlated()
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    q = FlowDistribution(base, chain([maf(3), standardize(data)]))
    gaussian = dist.MultivariateNormal(data.mean(0), data.T.cov())
    torch.testing.assert_close(q.log_prob(data), gaussian.log_prob(data))


def test_float32_far_from_the_origin():
    """A covariance of raw numbers would have lost all digits: the mean is 1e4 sds away."""
    data = (1e4 + torch.randn(200, 2).cumsum(-1)).float()
    t = standardize(data)
    assert t.scale_tril.dtype == torch.float32
    cov = t.inv(data).double().T.cov()
    torch.testing.assert_close(cov, torch.eye(2), atol=1e-2, rtol=0.0)


def test_contexts_are_standardized():
    contexts = torch.tensor([1e3, -5.0]) + torch.randn(100, 2) * torch.tensor([50.0, 1e-3])
    inner = redraw(conditional_maf(3, context_dim=2, num_transforms=2, hidden_dims=8))
    t, x = standardize_context(inner, contexts), torch.randn(100, 3)
    z = (contexts - contexts.mean(0)) / contexts.std(0)
    torch.testing.assert_close(t.condition(contexts)(x), inner.condition(z)(x))
    assert set(t.parameters()) == set(inner.parameters())
    q = chain([t, standardize(x)]).condition(contexts)
    torch.testing.assert_close(q.inv(q(x)), x)


def test_constant_context():
    contexts = torch.full((10, 1), 3.0)
    t = standardize_context(conditional_maf(2, context_dim=1, num_transforms=1), contexts)
    assert (t.loc.item(), t.scale.item()) == (3.0, 1.0)


def test_data_in_a_list():
    assert standardize([[1.0], [2.0], [3.0]], full_rank=False).loc.item() == 2.0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.zeros(3), r"data: expected shape \(n, D\) with two rows or more, got \(3,\)"),
        (torch.zeros(1, 3), r"got \(1, 3\)"),
        (torch.full((5, 2), torch.nan), "data: expected finite numbers"),
        (torch.ones(5, 2), r"expected coordinates that vary, got constant ones: \[0, 1\]"),
        ("abc", "data: expected an array of numbers"),
    ],
)
def test_bad_data(data, words):
    with pytest.raises(ValueError, match=words):
        standardize(data)


def test_coordinates_that_are_functions_of_others():
    data = torch.randn(100, 2)
    with pytest.raises(ValueError, match="none of which is a linear function of others"):
        standardize(torch.cat([data, data[:, :1]], -1))


@pytest.mark.parametrize(
    ("loc", "scale", "words"),
    [
        (torch.zeros(2), torch.ones(3), r"expected shapes \(D,\) and \(D,\) or \(D, D\)"),
        (torch.zeros(()), torch.ones(()), "expected shapes"),
        (torch.zeros(2), torch.ones(2, 2), "lower triangular"),
        (torch.zeros(2), torch.tensor([1.0, 0.0]), "scale: expected a positive diagonal"),
        (torch.tensor([torch.inf]), torch.ones(1), "expected finite numbers"),
    ],
)
def test_bad_scales(loc, scale, words):
    with pytest.raises(ValueError, match=words):
        Standardize(loc, scale)


def test_context_of_what_is_not_conditional():
    with pytest.raises(TypeError, match="transform: expected a conditional transform, got Inverse"):
        StandardizedContext(maf(2), torch.zeros(1), torch.ones(1))
