# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Every family and every conditioner, in both directions."""

import pytest
import torch

from pyro_artransform.flows.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
)
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
