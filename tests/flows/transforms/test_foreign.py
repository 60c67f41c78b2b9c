# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Transforms from elsewhere: their densities, their gradients, and what they cannot do."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import nn
from torch.distributions import AffineTransform, ExpTransform

from pyro_artransform import FlowDistribution, conditional_iaf
from pyro_artransform.flows.transforms import chain
from pyro_artransform.flows.transforms.composition import ForeignTransform, as_flow

DIM = 3
WITHOUT_INVERSE = {
    "block": transforms.block_autoregressive,
    "planar": transforms.planar,
    "iterated": lambda d: transforms.iterated(2, transforms.planar, d),
}
PYRO = {
    "splines": transforms.spline_autoregressive,
    "elementwise": transforms.spline,
    "coupling": transforms.affine_coupling,
    **WITHOUT_INVERSE,
}


def zuko_flow(name, d):
    return getattr(pytest.importorskip("zuko").flows, name)(d, 0)


ZUKO = {
    **{name: partial(zuko_flow, name) for name in ("MAF", "NSF")},
    "transform": lambda d: zuko_flow("MAF", d).transform,
    "inverse of a transform": lambda d: zuko_flow("MAF", d).transform.inv,
    "elementwise": lambda d: zuko_flow("ElementWiseTransform", d),
}
ALL = {**PYRO, **{f"zuko {name}": make for name, make in ZUKO.items()}}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def base(dim=DIM):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def density_by_jacobian(flow, x):
    """The log density at T(x), and its gradient there with parameters fixed, by differentiation at x."""
    log_probs, scores = [], []
    for row in x:
        jacobian = partial(torch.autograd.functional.jacobian, lambda v: flow.call_and_ladj(v)[0])

        def log_prob(v, jacobian=jacobian):
            return base().log_prob(v) - torch.linalg.slogdet(jacobian(v, create_graph=True))[1]

        gradient = torch.autograd.functional.jacobian(log_prob, row)
        log_probs.append(log_prob(row).detach())
        scores.append(torch.linalg.solve(jacobian(row).T, gradient))
    return torch.stack(log_probs), torch.stack(scores)


@every
def test_density_and_score_are_those_of_the_jacobian(make):
    flow = chain([make(DIM).double()])
    x = torch.randn(5, DIM)
    y, ladj, score = flow.call_and_score(x, -x)
    log_prob, expected = density_by_jacobian(flow, x)
    torch.testing.assert_close(y, flow(x))
    torch.testing.assert_close(base().log_prob(x) - ladj, log_prob, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(score, expected, atol=2e-5, rtol=2e-5)


@every
def test_a_distribution_trains_by_its_own_draws(make):
    """No inverse is needed; where there is one, the density is the same through it."""
    source = make(DIM).double()
    q = FlowDistribution(base(), source)
    draw = q.expand((4,)).rsample((5,))
    assert draw.shape == (5, 4, DIM)
    draw = q.rsample((64,))
    log_prob = q.log_prob(draw)
    (log_prob + draw.square().sum(-1)).mean().backward()
    assert all(p.grad.isfinite().all() for p in source.parameters())
    assert any(p.grad.any() for p in source.parameters())
    copied = draw.detach().clone()
    if make in WITHOUT_INVERSE.values():
        with pytest.raises(
            NotImplementedError, match="has no inverse, so only the densities of its own"
        ):
            q.log_prob(copied)
    else:
        torch.testing.assert_close(q.log_prob(copied), log_prob, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["MAF", "NSF"])
def test_draws_and_densities_of_zukos_own_distribution(name):
    source = zuko_flow(name, DIM).double()
    q = FlowDistribution(base(), source)
    torch.manual_seed(1)
    draw = q.rsample((7,))
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(source().rsample((7,)), draw.detach())
        torch.testing.assert_close(source().log_prob(draw), q.log_prob(draw))


def test_transforms_without_parameters():
    q = FlowDistribution(dist.Normal(torch.zeros(3), 1.0), ExpTransform())
    draw = q.rsample((2,))
    assert q.batch_shape == (3,)
    torch.testing.assert_close(q.log_prob(draw), dist.LogNormal(0.0, 1.0).log_prob(draw))
    assert as_flow(AffineTransform(1.0, 2.0)).inv(torch.tensor(3.0)) == 1


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self):
        return self.value


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (nn.Linear(3, 3), "got Linear"),
        (conditional_iaf(3, 2), r"Conditional.* the flow first: flow\.condition\(context\)"),
        (Returns(dist.Normal(0.0, 1.0)), "got Returns"),
        (base(), "got Independent"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_flow(source, message):
    for use in (ForeignTransform, partial(FlowDistribution, base())):
        with pytest.raises(TypeError, match=f"expected a transform, or a module that .* {message}"):
            use(source)
