# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn

from pyro_artransform import conditional_affine_autoregressive
from pyro_artransform.flows.conditioners import MaskedInput, MaskedMLP, TiltedSiLU, Unconditional
from pyro_artransform.flows.transforms import (
    AutoregressiveMeta,
    AutoregressiveTransform,
    ComposedTransform,
    ConditionedUnivariate,
)
from pyro_artransform.flows.transforms.inversion import _derivatives
from pyro_artransform.flows.univariate import Affine, Hinged, RationalQuadraticSpline
from pyro_artransform.testing import redraw
from tests.flows.conditioners.test_masks import random_dag
from tests.flows.transforms.metas import Shift

FAMILIES = {
    "shift": Shift(),
    "affine": Affine(),
    "hinged": Hinged(),
    "spline": RationalQuadraticSpline(),
}


def layer(dim, hidden_dims, family="affine", gain=0.5, **options):
    """A layer whose every weight is drawn anew, so that nothing is zero that need not be."""
    univariate = FAMILIES[family]
    conditioner = MaskedMLP(dim, univariate.num_params, hidden_dims, **options)
    for parameter in conditioner.parameters():
        nn.init.normal_(parameter, std=gain / max(parameter.shape[-1], 1) ** 0.5)
    return AutoregressiveTransform(ConditionedUnivariate(conditioner, univariate))


def score_by_jacobian(t, x, score):
    rows = []
    for row, at_x in zip(x, score):
        jacobian = torch.autograd.functional.jacobian(t, row)
        point = row.clone().requires_grad_()
        volume = t.call_and_ladj(point)[1] + 0.0 * point.sum()  # that of a shift is a constant
        rows.append(torch.linalg.solve(jacobian.T, at_x - torch.autograd.grad(volume, point)[0]))
    return torch.stack(rows)


LAYERS = {
    "one coordinate": lambda: layer(1, 16),
    "narrow, two layers": lambda: layer(40, [64, 20]),
    "with the slope of SiLU": lambda: layer(20, 64, nonlinearity=nn.SiLU()),
    "with the slope of TiltedSiLU": lambda: layer(20, 64, nonlinearity=TiltedSiLU(0.2)),
    "with skip connections": lambda: layer(40, 130, skip_connections=True),
    "many blocks, three layers": lambda: layer(40, [130, 100, 90]),
    "reversed": lambda: layer(20, [64], order=range(19, -1, -1)),
    "sparse graph": lambda: layer(50, [300, 300], adjacency=random_dag(50, 0.3)),
    "spline": lambda: layer(6, [64, 64], "spline"),
    "hinged": lambda: layer(6, 64, "hinged"),
    "shift": lambda: layer(20, 64, "shift"),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_the_score_by_substitution_is_that_of_the_jacobian(make):
    t = make()
    x, score = torch.randn(3, t.meta.conditioner.input_dim), torch.randn(1)
    score = score * torch.randn_like(x)
    y, ladj, found = t.call_and_score(x, score)
    expected = score_by_jacobian(t, x, score)
    # round-off of float64 through products of some hundred terms
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    torch.testing.assert_close((y, ladj), t.call_and_ladj(x))


class OfEach(AutoregressiveMeta):
    """The same vector transform at every x, which says that it acts on each coordinate alone."""

    depth = 1

    def __init__(self, family):
        super().__init__()
        self.transform = ComposedTransform(family(torch.randn(4, family.num_params)))

    def forward(self, x):
        return self.transform


METAS = {
    "of each coordinate, of vectors": lambda _: OfEach(Hinged()),
    "of each coordinate": lambda _: ConditionedUnivariate(Unconditional(4, 6), Hinged()),
    "without a linearization": lambda net: ConditionedUnivariate(MaskedInput(net), Hinged()),
    "a function": lambda net: lambda x: Hinged()(MaskedInput(net)(x)),
    "of vectors": lambda net: lambda x: ComposedTransform(Hinged()(MaskedInput(net)(x))),
}


@pytest.mark.parametrize("make", METAS.values(), ids=METAS.keys())
def test_the_score_by_iteration_is_that_of_the_jacobian(make):
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 24), nn.Unflatten(-1, (4, 6)))
    t = redraw(AutoregressiveTransform(make(net)))
    x, score = torch.randn(2, 3, 4)
    found = t.call_and_score(x, score)[2]
    torch.testing.assert_close(found, score_by_jacobian(t, x, score), rtol=1e-9, atol=1e-10)


def test_the_score_where_a_context_has_more_rows_than_x():
    t = redraw(conditional_affine_autoregressive(3, 2)).condition(torch.randn(5, 2))
    x, score = torch.randn(2, 3)
    found = t.call_and_score(x, score)
    expected = t.call_and_score(x.expand(5, 3), score.expand(5, 3))
    torch.testing.assert_close(found, expected)


def test_gradients_of_value_and_log_determinant_are_those_without_a_score():
    t, x = layer(5, [64]), torch.randn(4, 5, requires_grad=True)
    wanted = [x, *t.parameters()]
    grads = []
    for y, ladj, *_ in (t.call_and_score(x, -x), t.call_and_ladj(x)):
        grads.append(torch.autograd.grad((y * y.detach()).sum() + ladj.sum(), wanted))
    torch.testing.assert_close(*grads)


def test_second_derivatives_of_a_layer_are_those_of_torch_func():
    """Its parameters depend on its input, and part of its first derivative is written by hand."""
    t = layer(3, 8)

    def density(x):
        y, ladj = t.call_and_ladj(x)
        return ladj + y.cos().sum()

    x = torch.randn(3)
    found = torch.autograd.functional.hessian(density, x)
    assert torch.allclose(found, torch.func.hessian(density)(x), rtol=1e-10, atol=1e-12)


def test_derivatives_of_the_affine_family_are_those_by_differentiation():
    family = Affine(multiplier=0.3)
    params, x = 9 * torch.randn(4, 3, 2), torch.randn(4, 3)
    found, wanted = family.derivatives(params, x), _derivatives(family, params, x)
    assert torch.allclose(wanted.ladj_by_x, torch.zeros(4, 3))
    for name in ("y", "ladj", "inverse_by_params", "ladj_by_params"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-12), name

    class Doubled(Affine):
        def forward(self, params):
            return super().forward(2 * params)

    assert Doubled().derivatives(params, x) is None
