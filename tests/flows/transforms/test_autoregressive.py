# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TransformModule, constraints
from torch import nn
from torch.distributions import AffineTransform

from pyro_artransform import affine_autoregressive, conditional_affine_autoregressive
from pyro_artransform.flows.conditioners import MaskedMLP
from pyro_artransform.flows.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
)
from pyro_artransform.flows.univariate.affine import GivenLocationScale
from pyro_artransform.testing import check_transform, redraw
from tests.flows.transforms.metas import CONDITIONERS, FAMILIES, make_meta

# Each family and each conditioner at D = 5, and some of both at other D. Monotone networks have a bisection
# for an inverse, which takes long.
PAIRS = [(family, "mlp", 5) for family in FAMILIES]
PAIRS += [("affine", conditioner, 5) for conditioner in CONDITIONERS if conditioner != "mlp"]
PAIRS += [("spline", "reverse", 2), ("hinged", "graph", 5), ("monotone", "masked input", 2)]
PAIRS += [("spline", "mlp", 1), ("affine", "mlp", 64)]


@pytest.mark.parametrize(("family", "conditioner", "dim"), PAIRS)
def test_both_directions(family, conditioner, dim):
    # larger weights in 64 dimensions amplify the round-off of float64 beyond 1e-9
    gain = 2.0 if dim < 64 else 1.0
    make = lambda: AutoregressiveTransform(make_meta(family, conditioner, dim))  # noqa: E731
    check_transform(make, dim, gain=gain)
    if (family, conditioner, dim) == ("affine", "mlp", 5):  # the check above has both directions
        check_transform(lambda: make().inv, dim, gain=gain)


@pytest.mark.parametrize(
    ("conditioner", "context_shape"),
    [("mlp", (1, 2)), ("mlp", (1, 1, 2)), ("masked input", (1, 3, 2)), ("foreign", (5, 1, 2))],
)
def test_shapes_with_a_context(conditioner, context_shape):
    """A context of size 1 in a dimension that x lacks is for any x, as Pyro's suite asks."""
    conditional = redraw(ConditionalAutoregressiveTransform(make_meta("affine", conditioner, 4, 2)))
    t = conditional.condition(torch.randn(context_shape))
    for shape in ((4,), (3, 4), (1, 4), (5, 3, 4)):
        y, ladj = t.call_and_ladj(torch.randn(shape))
        assert t.forward_shape(torch.Size(shape)) == y.shape
        assert ladj.shape == y.shape[:-1]
        assert t.inv(torch.randn(shape)).shape == t.inverse_shape(torch.Size(shape)) == y.shape
        assert t.call_and_score(torch.randn(shape), torch.randn(shape))[2].shape == y.shape
    if context_shape[:-1].count(1) == len(context_shape) - 1:
        assert t.forward_shape(torch.Size([4])) == (4,)


def test_is_a_pyro_transform_module():
    meta = affine_autoregressive(3).meta
    t = AutoregressiveTransform(meta, passes=2)
    assert isinstance(t, TransformModule)
    assert t.domain is t.codomain is constraints.real_vector
    assert (t.bijective, t.sign, t.event_dim) == (True, 1, 1)
    assert t.meta is meta
    assert t.passes == 2
    assert set(meta.parameters()) == set(t.parameters())
    assert "passes=2" in repr(t)


def test_vector_and_elementwise_metas_give_the_same_shape():
    elementwise = AutoregressiveTransform(lambda x: AffineTransform(1.0, 2.0))
    vector = AutoregressiveTransform(lambda x: AffineTransform(1.0, 2.0, event_dim=1))
    for shape in ((3,), (4, 3), (2, 4, 3)):
        x = torch.randn(shape)
        for t in (elementwise, vector):
            y, ladj = t.call_and_ladj(x)
            assert torch.allclose(y, 1 + 2 * x)
            assert torch.allclose(ladj, 3 * torch.log(torch.tensor(2.0)).expand(shape[:-1]))
            assert torch.allclose(t.inv(y.clone()), x)


@pytest.mark.parametrize("cls", [AutoregressiveTransform, ConditionalAutoregressiveTransform])
def test_bad_arguments(cls):
    with pytest.raises(TypeError, match="meta: expected a callable"):
        cls("mlp")
    with pytest.raises(ValueError, match="passes: expected a positive integer, got"):
        cls(lambda x: x, passes=0)


def test_bad_input():
    t = affine_autoregressive(3)
    for use in (t, t.inv):
        for shape in ((), (3, 2)):
            with pytest.raises(ValueError, match="expected"):
                use(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"expected torch\.float64.*got torch\.int64"):
            use(torch.zeros(5, 3, dtype=torch.long))
        with pytest.raises(ValueError, match=r"expected torch\.float64.*got torch\.float32"):
            use(torch.zeros(5, 3).float())


def test_condition():
    t = redraw(conditional_affine_autoregressive(3, 2))
    t.passes = 3
    conditioned = t.condition(torch.randn(5, 2))
    assert isinstance(conditioned, AutoregressiveTransform)
    assert conditioned.passes == 3
    assert set(conditioned.parameters()) == set(t.parameters())
    assert conditioned.forward_shape(torch.Size([3])) == (5, 3)
    assert conditioned.inverse_shape(torch.Size([7, 1, 3])) == (7, 5, 3)
    assert set(t.inv.condition(torch.zeros(5, 2)).parameters()) == set(t.parameters())
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    q = dist.TransformedDistribution(base, [conditioned])
    assert q.batch_shape == (5,)
    assert q.log_prob(q.rsample((7,))).shape == (7, 5)


def test_bad_contexts():
    t = conditional_affine_autoregressive(3, 2)
    with pytest.raises(ValueError, match=r"context: expected shape \(\*, 2\), got \(5, 1\)"):
        t.condition(torch.zeros(5, 1))(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*, C\), got None"):
        t.condition(None)
    conditioned = t.condition(torch.zeros(4, 2))
    for use in (conditioned, conditioned.inv):
        with pytest.raises(ValueError, match=r"that broadcast .*, got \(4,\), \(5,\)"):
            use(torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"call \.condition\(context\)"):
        t(torch.zeros(5, 3))


@pytest.mark.parametrize("part", ["conditioner", "conditioner.layers.2", "univariate"])
def test_hooks_act_in_both_directions(part):
    t = redraw(affine_autoregressive(3))

    def changes(module, given, out):
        if isinstance(out, torch.Tensor):
            return out + 1
        return GivenLocationScale(out.loc + 1, out.log_scale)

    t.meta.get_submodule(part).register_forward_hook(changes)
    x = torch.randn(5, 3)
    y = t(x).detach()
    assert torch.allclose(t.inv(y), x)


def test_what_a_meta_must_return():
    x = torch.randn(5, 3)
    for meta in (nn.Linear(3, 3), MaskedMLP(3, 2)):
        for use in (lambda t: t(x), lambda t: t.inv(x)):
            with pytest.raises(TypeError, match=r"returns a Tensor.*ConditionedUnivariate"):
                use(AutoregressiveTransform(meta))
    with pytest.raises(ValueError, match="expected a transform of real numbers or vectors"):
        AutoregressiveTransform(lambda x: torch.distributions.SigmoidTransform())(x)


def test_half_precision():
    t, x = redraw(affine_autoregressive(3)).bfloat16(), torch.randn(5, 3).bfloat16()
    y, ladj = t.call_and_ladj(x)
    assert y.dtype == ladj.dtype == torch.bfloat16
    assert (t.inv(y.detach()) - x).abs().max() < 0.1
