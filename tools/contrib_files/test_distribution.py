# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import transforms as T

from pyro_artransform.flows import (
    FlowDistribution,
    affine_autoregressive,
    hinged_marginals,
)
from pyro_artransform.flows.transforms import (
    ComposedTransform,
    CompressedTails,
    LocationScale,
)


@pytest.fixture(autouse=True)
def _fresh_start():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)


def redrawn(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_().div_(2 * parameter.shape[-1] ** 0.5)
    return module.double()


def affine(dim):
    return redrawn(affine_autoregressive(dim, [16, 16]))


def hinges(dim, scale=5.0):
    t = redrawn(hinged_marginals(dim))
    with torch.no_grad():
        t.meta.conditioner.params.mul_(scale)
    return t


def flow(dim):
    scale = redrawn(LocationScale(torch.zeros(dim), 1.0, full_rank=True))
    return ComposedTransform(hinges(dim), affine(dim), CompressedTails(), scale)


def standard_normal(*shape):
    return dist.Normal(torch.zeros(shape, dtype=torch.float64), 1.0).to_event(1)


@pytest.mark.parametrize("make", [hinges, lambda dim: CompressedTails(), flow])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_inverse_and_log_determinant(make, dim):
    t = make(dim)
    x = 20 * torch.randn(50, dim, dtype=torch.float64)
    y, ladj = t.call_and_ladj(x)
    back, back_ladj = t.inverse_and_ladj(y)
    assert torch.allclose(back, x)
    assert torch.allclose(back_ladj, -ladj)
    jacobian = torch.autograd.functional.jacobian(t, x[0])
    assert torch.allclose(ladj[0], torch.linalg.slogdet(jacobian)[1])


def test_hinges_have_gradients_of_two_orders():
    t = hinges(2)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(t.call_and_ladj, x)
    assert torch.autograd.gradgradcheck(t.call_and_ladj, x)
    assert torch.autograd.gradcheck(t.inverse_and_ladj, x)


def test_hinges_are_the_identity_at_zero_and_linear_far_out():
    x = torch.linspace(-50, 50, 101, dtype=torch.float64)[:, None]
    assert torch.allclose(hinges(1, scale=0.0)(x), x)
    slopes = hinges(1, scale=50.0)(x).diff(dim=0)[:, 0]
    assert (slopes > 0).all()
    assert torch.allclose(slopes[:30], slopes[0], rtol=1e-2)
    assert torch.allclose(slopes[-30:], slopes[-1], rtol=1e-2)


def test_compressed_tails():
    t = CompressedTails()
    x = torch.tensor([-1e30, -100.0, -40.0, 0.0, 3.0, 40.0, 100.0, 1e30])
    y, ladj = t.call_and_ladj(x[:, None])
    assert torch.equal(y[2:6, 0], x[2:6])
    assert not ladj[2:6].any()
    assert 48 < y[6] < 49
    assert y.abs().max() < 200
    assert y.isfinite().all()
    assert ladj.isfinite().all()


@pytest.mark.parametrize("full_rank", [False, True])
def test_location_and_scale(full_rank):
    t = redrawn(LocationScale(torch.zeros(4), 1.0, full_rank=full_rank))
    tril = torch.autograd.functional.jacobian(t, torch.zeros(4, dtype=torch.float64))
    assert (torch.count_nonzero(tril) > 4) == full_rank
    expected = dist.MultivariateNormal(t.loc, scale_tril=tril)
    x = torch.randn(6, 4, dtype=torch.float64)
    q = FlowDistribution(standard_normal(4), t)
    assert torch.allclose(q.log_prob(x), expected.log_prob(x))


def test_a_draw_is_scored_without_an_inverse():
    t = flow(4)
    calls = []
    t.inverse_and_ladj = lambda y: calls.append(y) or type(t).inverse_and_ladj(t, y)
    q = FlowDistribution(standard_normal(4), t)
    value = q.rsample((6,))
    log_prob = q.log_prob(value)
    assert not calls
    assert torch.allclose(q.log_prob(value.clone()), log_prob)
    assert len(calls) == 1
    expected = dist.TransformedDistribution(standard_normal(4), t)
    assert torch.allclose(expected.log_prob(value), log_prob)


def test_a_draw_that_was_edited_is_scored_anew():
    q = FlowDistribution(standard_normal(3), affine(3))
    with torch.no_grad():
        value = q.rsample((2,))
        before = q.log_prob(value)
        value += 1.0
    assert torch.allclose(q.log_prob(value), q.log_prob(value.clone()))
    assert not torch.allclose(q.log_prob(value), before)


def test_gradients_reach_the_parameters():
    t = flow(3)
    q = FlowDistribution(standard_normal(3), t)
    value = q.rsample((10,))
    (q.log_prob(value) - value.square().sum(-1)).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in t.parameters())


def test_batches_and_expansion():
    t = affine(3)
    q = FlowDistribution(standard_normal(5, 3), t)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    assert q.log_prob(q.sample((2,))).shape == (2, 5)
    q = FlowDistribution(standard_normal(3), t).expand([4])
    assert q.log_prob(q.sample()).shape == (4,)
    q = FlowDistribution(standard_normal(5, 3).to_event(1), t)
    value = q.sample()
    assert q.log_prob(value).shape == ()
    assert torch.allclose(q.log_prob(value.clone()), q.log_prob(value))


def test_one_transform():
    for transforms in ([], [affine(2), affine(2)]):
        with pytest.raises(TypeError, match=r"ComposedTransform\(...\) makes one"):
            FlowDistribution(standard_normal(2), transforms)


def test_a_transform_without_an_inverse():
    t = dist.transforms.block_autoregressive(2).double()
    q = FlowDistribution(standard_normal(2), t)
    (q.log_prob(value := q.rsample((3,))) + value.sum(-1)).sum().backward()
    assert all(p.grad is not None for p in t.parameters())
    with pytest.raises(NotImplementedError, match="has no inverse"):
        q.log_prob(q.rsample((3,)).clone())


def test_composition():
    affine_part, foreign = affine(3), T.AffineTransform(1.0, 2.0)
    inner = T.ComposeTransform([affine_part.inv, foreign])
    t = ComposedTransform(inner, T.ExpTransform())
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = (affine_part.inv(x) * 2 + 1).exp()
    assert torch.allclose(t(x), expected)
    assert torch.allclose(t.inv(expected), x)
    assert len(list(t.parameters())) == len(list(affine_part.parameters()))
    twin = copy.deepcopy(t)
    assert torch.equal(twin(x), t(x))
    assert not {*map(id, twin.parameters())} & {*map(id, t.parameters())}
    with pytest.raises(TypeError, match="expected a transform, or a module"):
        ComposedTransform(torch.nn.Linear(2, 2))
