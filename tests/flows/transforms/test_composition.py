# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import copy
import gc

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
    maf,
    spline_autoregressive,
)
from pyro_artransform.flows.transforms import (
    ComposedTransform,
    ConditionalComposedTransform,
    PartitionTransform,
    PermutationTransform,
    chain,
)
from pyro_artransform.testing import check_transform, redraw


def partition():
    return PartitionTransform(
        [([3, 0], maf(2, 2, 8)), ([1], spline_autoregressive(1, 8)), ([4, 2], maf(2, 1, 8).inv)]
    )


def nested():
    permuted = chain([affine_autoregressive(3, 8).inv, PermutationTransform([2, 0, 1])])
    return chain([permuted, spline_autoregressive(3, 8).inv])


@pytest.mark.parametrize(
    ("make", "dim"), [(nested, 3), (partition, 5), (lambda: PermutationTransform([2, 0, 3, 1]), 4)]
)
def test_contract(make, dim):
    check_transform(make, dim)
    check_transform(lambda: make().inv, dim)


def log_det(t, x):
    jacobian = torch.autograd.functional.jacobian(lambda v: t.call_and_ladj(v)[0], x)
    return torch.linalg.slogdet(jacobian)[1]


def test_other_domains():
    t = chain([affine_autoregressive(3), ExpTransform()])
    assert t.codomain.event_dim == 1
    assert t.codomain.base_constraint is constraints.positive
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [t])
    assert torch.allclose(
        q.log_prob(torch.ones(3)), dist.Normal(0.0, 1.0).log_prob(torch.zeros(3)).sum()
    )
    assert t.bijective
    first = chain([SoftplusTransform(), AffineTransform(torch.zeros(2), torch.ones(2))])
    assert first.domain.event_dim == 1


def test_elementwise_parts_and_their_order():
    scales, shifts = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    double, shift = AffineTransform(0.0, scales), AffineTransform(shifts, 1.0)
    t, x = chain([double, shift]), torch.randn(4, 3)
    y, ladj = t.call_and_ladj(x)
    assert torch.equal(y, scales * x + 1)
    assert torch.allclose(ladj, scales.log().sum().expand(4))
    assert torch.allclose(t.inv(y), x)
    assert t.parts == [double, shift]


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
    context, x = torch.randn(5, 2), torch.randn(3)
    conditioned = t.condition(context)
    assert {id(p) for p in conditioned.parameters()} == {id(p) for p in t.parameters()}
    y, ladj = conditioned.call_and_ladj(x)
    assert y.shape == (5, 3)
    back, inverse_ladj = t.inv.condition(context).call_and_ladj(y)
    assert torch.allclose(back, x.expand(5, 3))
    assert torch.allclose(inverse_ladj, -ladj)


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
        for p in t.parameters():
            p.add_(1.0)
        assert torch.allclose(twin(x), y)
    assert torch.allclose(log_det(twin, x[1]), ladj[1])


class HalfContext(ConditionalTransform):
    """A conditional transform that is not a module."""

    def condition(self, context):
        return AffineTransform(context, 1.0)


def test_bad_parts():
    hides = torch.distributions.IndependentTransform(affine_autoregressive(3), 0)
    for part, message in (
        (torch.nn.Linear(3, 3), "called without arguments, .* got Linear"),
        (HalfContext(), "expected a conditional transform that is a module, got HalfContext"),
        (hides, "IndependentTransform holds the module Autoregressive"),
    ):
        with pytest.raises(TypeError, match=message):
            chain([part])
    with pytest.raises(ValueError, match="at least one transform, got none"):
        ComposedTransform()
    with pytest.raises(TypeError, match="expected a sequence of transforms, got one"):
        chain(affine_autoregressive(3))
    with pytest.raises(TypeError, match=r"call \.condition\(context\)"):
        chain([conditional_affine_autoregressive(3, 2)])(torch.zeros(3))
    assert len(chain(affine_autoregressive(3) for _ in range(2)).parts) == 2


SCORED = {
    "splines": lambda: chain([spline_autoregressive(5), PermutationTransform([2, 0, 1, 4, 3])]),
    "inverse": lambda: chain([affine_autoregressive(5).inv, affine_autoregressive(5)]),
    "parts of Pyro": lambda: chain([dist.transforms.affine_autoregressive(5, [8]), iaf(5)]),
    "other support": lambda: chain([iaf(5), ExpTransform()]),
    "partition": partition,
}


@pytest.mark.parametrize("make", SCORED.values(), ids=SCORED.keys())
def test_score_is_the_gradient_of_the_log_density(make):
    flow = redraw(make())
    x = torch.randn(6, 5)
    y, ladj, score = flow.call_and_score(x, -x)
    torch.testing.assert_close((y, ladj), flow.call_and_ladj(x))
    point = y.detach().requires_grad_()
    for back, back_ladj in (flow.inverse_and_ladj(point), flow.inverse_at(x, point)):
        assert torch.allclose(back, x, atol=1e-7)
        assert torch.allclose(back_ladj, -ladj, atol=1e-7)
        log_prob = dist.Normal(0.0, 1.0).log_prob(back).sum() + back_ladj.sum()
        assert torch.allclose(score, torch.autograd.grad(log_prob, point)[0], atol=1e-7)


# Permutation and partition


def test_order_is_restored_by_the_state_dict():
    t, other = PermutationTransform([2, 0, 1]), PermutationTransform([0, 1, 2])
    other.load_state_dict(t.state_dict())
    assert torch.equal(other(torch.arange(3.0)), torch.tensor([2.0, 0.0, 1.0]))


def test_what_is_not_a_permutation_or_partition_is_refused():
    for order in ([1, 2], [0, 0], [[0, 1]], 3):
        with pytest.raises(ValueError, match="permutation"):
            PermutationTransform(order)
    with pytest.raises(ValueError, match=r"expected shape \(\*, 2\), got \(5, 3\)"):
        PermutationTransform([1, 0])(torch.zeros(5, 3))
    for sets in ([[0, 0]], [[0], [2]], [[]], []):
        with pytest.raises(ValueError, match="partition"):
            PartitionTransform([(part, affine_autoregressive(2)) for part in sets])
    with pytest.raises(TypeError, match="ExpTransform"):
        PartitionTransform([([0], ExpTransform())])


def test_inverses_leave_nothing_behind():
    flow = affine_autoregressive(3, 8)
    _ = flow.inv
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(1000):
            _ = flow.inv
        assert len(gc.get_objects()) - before < 500
    finally:
        gc.enable()
