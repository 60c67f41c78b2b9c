# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_artransform.flows import (
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_iaf,
    conditional_maf,
    conditional_spline_autoregressive,
    hinged_marginals,
    iaf,
    maf,
    spline_autoregressive,
    spline_marginals,
)
from pyro_artransform.flows.univariate import MonotoneNeural, RationalQuadraticSpline

BUILDERS = [
    affine_autoregressive,
    hinged_marginals,
    iaf,
    maf,
    spline_autoregressive,
    spline_marginals,
    lambda dim: iaf(dim, 1, [16], univariate=lambda: MonotoneNeural(count_units=3)),
    lambda dim: maf(dim, 2, [16], univariate=RationalQuadraticSpline),
]
CONDITIONAL = [
    conditional_affine_autoregressive,
    conditional_iaf,
    conditional_maf,
    conditional_spline_autoregressive,
]


@pytest.fixture(autouse=True)
def _fresh_start():
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)


def redrawn(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_().div_(2 * parameter.shape[-1] ** 0.5)
    return module.double()


def check(t, dim):
    """Values and log-determinants of a transform and of its inverse."""
    x = torch.randn(4, dim, dtype=torch.float64)
    y, ladj = t.call_and_ladj(x)
    back, back_ladj = t.inv.call_and_ladj(y.detach())
    assert torch.allclose(back, x, atol=1e-7)
    assert torch.allclose(back_ladj, -ladj, atol=1e-7)
    for row, expected in zip(x, ladj):
        # the transform of a single row, whatever the rows of a context
        jacobian = torch.autograd.functional.jacobian(lambda v: t(v), row)
        if jacobian.dim() == 2:
            determinant = torch.linalg.slogdet(jacobian)[1]
            assert torch.allclose(determinant, expected, atol=1e-7)


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("build", BUILDERS)
def test_builders(build, dim):
    t = build(dim)
    x = torch.randn(3, dim)
    assert torch.allclose(t(x), x, atol=1e-6)
    check(redrawn(t), dim)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (4, 2)])
@pytest.mark.parametrize("build", CONDITIONAL)
def test_conditional_builders(build, shape):
    t = redrawn(build(3, 2))
    check(t.condition(torch.randn(shape)), 3)
    base = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    flow = dist.ConditionalTransformedDistribution(base, [t])
    given = flow.condition(torch.randn(4, 2))
    draw = given.rsample()
    assert draw.shape == (4, 3)
    given.log_prob(draw.detach().clone()).sum().backward()
    assert all(p.grad is not None for p in t.parameters())


def test_a_spline_fits_two_modes():
    data = torch.cat([torch.randn(500, 1) * 0.3 - 1.5, torch.randn(500, 1) * 0.3 + 1.5])
    t = spline_marginals(1, count_bins=16)
    base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [t])
    optim = torch.optim.Adam(t.parameters(), lr=0.05)
    for _ in range(150):
        optim.zero_grad()
        loss = -density.log_prob(data).mean()
        loss.backward()
        optim.step()
    normal = dist.Normal(data.mean(), data.std())
    assert loss < -normal.log_prob(data).mean() - 0.3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: iaf(0), "input_dim: expected a positive integer"),
        (lambda: conditional_maf(3, 0), "context_dim: expected a positive integer"),
        (lambda: maf(3, num_transforms=0), "num_transforms: expected a positive"),
        (lambda: spline_autoregressive(3, count_bins=1), "count_bins: expected"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
