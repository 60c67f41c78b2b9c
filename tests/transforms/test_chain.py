# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import copy

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransform
from torch.distributions import AffineTransform, ExpTransform, SoftplusTransform

from pyro_artransform import (
    affine_autoregressive,
    conditional_affine_autoregressive,
    iaf,
    spline_autoregressive,
)
from pyro_artransform.testing import check_transform, redraw
from pyro_artransform.transforms import (
    AutoregressiveTransform,
    ComposedTransform,
    ConditionalComposedTransform,
    PermutationTransform,
    chain,
    inverse,
)
from tests.transforms.metas import Shift

PARTS = {
    "two layers": lambda: [affine_autoregressive(3), affine_autoregressive(3, order=[2, 1, 0])],
    "an inverse": lambda: [affine_autoregressive(3), affine_autoregressive(3).inv],
    "a permutation": lambda: [affine_autoregressive(3), PermutationTransform([2, 0, 1])],
    "an elementwise transform": lambda: [
        affine_autoregressive(3),
        AffineTransform(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])),
    ],
    "a nested chain": lambda: [chain([affine_autoregressive(3)]), affine_autoregressive(3).inv],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("inverted", [False, True])
def test_contract(parts, inverted):
    def make():
        t = chain(parts())
        return (inverse(t) if inverted else t).double()

    check_fixed_dtype = "elementwise" not in str(parts)
    if any(isinstance(p, AffineTransform) for p in parts()):
        check_fixed_dtype = False
    if check_fixed_dtype:
        check_transform(make, 3)
    else:
        t, x = redraw(make()), torch.randn(4, 3)
        y, ladj = t.call_and_ladj(x)
        jacobian = torch.autograd.functional.jacobian(lambda v: t.call_and_ladj(v)[0], x[1])
        assert torch.allclose(ladj[1], torch.linalg.slogdet(jacobian)[1])
        assert torch.allclose(t.inv(y.clone()), x)


def test_parts_of_pyro_keep_their_parameters_and_cannot_be_stale():
    part = dist.transforms.affine_autoregressive(3, [8])
    t = chain([part, affine_autoregressive(3)])
    assert {id(p) for p in part.parameters()} < {id(p) for p in t.inv.parameters()}
    x = torch.randn(3)
    before = t(x).detach().clone()
    with torch.no_grad():
        for p in part.parameters():
            p.data.add_(0.5)
    assert not torch.allclose(t(x), before)
    y, ladj = t.call_and_ladj(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: t.call_and_ladj(v)[0], x)
    assert torch.allclose(ladj, torch.linalg.slogdet(jacobian)[1])
    assert torch.allclose(t.inv.call_and_ladj(y.detach())[0], x, atol=1e-8)


def test_other_domains():
    t = chain([affine_autoregressive(3), ExpTransform()])
    assert t.codomain.event_dim == 1
    assert t.codomain.base_constraint is constraints.positive
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [t])
    assert torch.allclose(
        q.log_prob(torch.ones(3)), dist.Normal(0.0, 1.0).log_prob(torch.zeros(3)).sum()
    )
    assert t.bijective
    assert t.sign == 1
    first = chain([SoftplusTransform(), AffineTransform(torch.zeros(2), torch.ones(2))])
    assert first.domain.event_dim == 1


def test_transform_that_changes_the_size():
    stick = dist.transforms.StickBreakingTransform()
    t = chain([affine_autoregressive(3), stick])
    assert t.forward_shape(torch.Size([5, 3])) == (5, 4)
    assert t.inverse_shape(torch.Size([5, 4])) == (5, 3)
    x = torch.randn(5, 3)
    y, ladj = t.call_and_ladj(x)
    back, inverse_ladj = t.inv.call_and_ladj(y)
    assert torch.allclose(ladj, stick.log_abs_det_jacobian(x, y))
    assert torch.allclose(back, x)
    assert torch.allclose(inverse_ladj, -ladj)


def test_conditional_parts():
    t = chain([conditional_affine_autoregressive(3, 2), affine_autoregressive(3), ExpTransform()])
    assert isinstance(t, ConditionalComposedTransform)
    redraw(t)
    context = torch.randn(5, 2)
    conditioned = t.condition(context)
    assert {id(p) for p in conditioned.parameters()} == {id(p) for p in t.parameters()}
    x = torch.randn(5, 3)
    y = conditioned(x)
    assert torch.allclose(t.condition(context).inv(y), x)
    assert torch.allclose(t.inv.condition(context)(y), x)
    t.clear_cache()


def test_nested_order_of_application():
    double, shift = AffineTransform(torch.zeros(2), 2.0), AffineTransform(torch.ones(2), 1.0)
    assert torch.equal(chain([double, shift])(torch.ones(2)), torch.full((2,), 3.0))
    assert chain([double, shift]).parts == [double, shift]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t.inv,
        lambda t: torch.distributions.ComposeTransform([t]),
        lambda t: torch.distributions.ComposeTransform([t.inv, ExpTransform()]).inv,
    ],
    ids=["inverse", "compose", "inverse of compose"],
)
def test_torch_wrappers_keep_their_parameters_and_copies(wrap):
    part = dist.transforms.affine_autoregressive(3, [8])
    t = chain([wrap(part), affine_autoregressive(3)])
    assert {id(p) for p in part.parameters()} < {id(p) for p in t.parameters()}
    x = torch.rand(4, 3) + 0.5
    with torch.no_grad():
        y, ladj = t.call_and_ladj(x)
        assert torch.allclose(t.inv.call_and_ladj(y)[0], x, atol=1e-8)
        twin = copy.deepcopy(t)
        assert torch.allclose(twin(x), y)
    jacobian = torch.autograd.functional.jacobian(lambda v: t.call_and_ladj(v)[0], x[1])
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], ladj[1])


def test_a_wrapper_that_would_lose_parameters_is_refused():
    wrapper = torch.distributions.IndependentTransform(affine_autoregressive(3), 0)
    with pytest.raises(TypeError, match="IndependentTransform holds the module Autoregressive"):
        chain([wrapper])


def test_bad_parts():
    with pytest.raises(ValueError, match="at least one transform, got none"):
        chain([])
    with pytest.raises(TypeError, match="expected transforms, got int"):
        ComposedTransform(3)
    with pytest.raises(TypeError, match="expected transforms, got Linear"):
        chain([conditional_affine_autoregressive(3, 2), torch.nn.Linear(3, 3)])
    with pytest.raises(TypeError, match="expected a transform of this package, got ExpTransform"):
        inverse(ExpTransform())
    with pytest.raises(TypeError, match="condition it first"):
        inverse(conditional_affine_autoregressive(3, 2))
    with pytest.raises(TypeError, match="expected a sequence of transforms, got one"):
        chain(affine_autoregressive(3))
    with pytest.raises(TypeError, match=r"call \.condition\(context\)"):
        chain([conditional_affine_autoregressive(3, 2)])(torch.zeros(3))


def test_a_generator_of_parts():
    assert len(chain(affine_autoregressive(3) for _ in range(2)).parts) == 2


def test_inverse_of_a_chain_is_a_module_that_owns_the_parameters():
    flow = iaf(3)
    assert len(list(inverse(flow).parameters())) == len(list(flow.parameters())) > 0
    assert inverse(inverse(flow)) is flow


def test_context_broadcasts_through_a_chain():
    t = redraw(chain([affine_autoregressive(3), conditional_affine_autoregressive(3, 2)]))
    conditioned = t.condition(torch.randn(5, 2))
    x = torch.randn(3)
    y, ladj = conditioned.call_and_ladj(x)
    assert y.shape == (5, 3)
    assert ladj.shape == (5,)
    back, inverse_ladj = conditioned.inv.call_and_ladj(y)
    assert torch.allclose(back, x.expand(5, 3))
    assert torch.allclose(inverse_ladj, -ladj)


def before(x):
    """A location and a scale that depend on the coordinate before."""
    previous = torch.nn.functional.pad(x[..., :-1], (1, 0))
    return previous, 1 + previous.square()


SCORED = {
    "layers": lambda: iaf(3),
    "shifts": lambda: iaf(3, univariate=Shift),
    "splines": lambda: chain([spline_autoregressive(3), PermutationTransform([2, 0, 1])]),
    "inverse": lambda: chain([affine_autoregressive(3).inv, affine_autoregressive(3)]),
    "parts of Pyro": lambda: chain([dist.transforms.affine_autoregressive(3, [8]), iaf(3)]),
    "other support": lambda: chain([iaf(3), ExpTransform()]),
    "foreign meta": lambda: AutoregressiveTransform(lambda x: AffineTransform(*before(x))),
    "foreign vector meta": lambda: AutoregressiveTransform(
        lambda x: AffineTransform(*before(x), event_dim=1)
    ),
}


@pytest.mark.parametrize("make", SCORED.values(), ids=SCORED.keys())
def test_score_is_the_gradient_of_the_log_density(make):
    flow = redraw(make())
    x = torch.randn(5, 3)
    y, ladj, score = flow.call_and_score(x, -x)
    expected_y, expected_ladj = flow.call_and_ladj(x)
    assert torch.allclose(y, expected_y)
    assert torch.allclose(ladj, expected_ladj)
    point = y.detach().requires_grad_()
    back, back_ladj = flow.inverse_and_ladj(point)
    log_prob = dist.Normal(0.0, 1.0).log_prob(back).sum() + back_ladj.sum()
    assert torch.allclose(score, torch.autograd.grad(log_prob, point)[0], atol=1e-7)


def test_inverse_at_a_known_pair_with_parts_from_elsewhere():
    flow = redraw(chain([dist.transforms.affine_autoregressive(3, [8]), iaf(3), ExpTransform()]))
    x = torch.randn(5, 3)
    y, ladj = flow.call_and_ladj(x)
    back, back_ladj = flow.inverse_at(x, y.detach())
    assert torch.allclose(back, x, atol=1e-8)
    assert torch.allclose(back_ladj, -ladj, atol=1e-8)


class HalfContext(ConditionalTransform):
    """A conditional transform that is no module."""

    def condition(self, context):
        return AffineTransform(context.sum(-1, keepdim=True), 1.0)


def test_a_conditional_part_that_is_no_module():
    t = chain([HalfContext(), affine_autoregressive(3)])
    x = torch.randn(5, 3)
    assert torch.allclose(t.condition(torch.ones(2))(x), x + 2)


def test_shapes_of_parts_from_elsewhere():
    t = chain([dist.transforms.StickBreakingTransform()])
    assert t.forward_shape(torch.Size([5, 3])) == (5, 4)
    assert t.inverse_shape(torch.Size([5, 4])) == (5, 3)
