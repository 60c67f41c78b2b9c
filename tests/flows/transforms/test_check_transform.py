# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The assertions for third parties name gradients that are missing, whatever the values are."""

import pytest
from torch import nn

from pyro_artransform.flows.conditioners import MaskedMLP
from pyro_artransform.flows.transforms import AutoregressiveTransform, ConditionedUnivariate
from pyro_artransform.flows.univariate import Affine, MonotonicAffineTransform
from pyro_artransform.testing import check_transform


class DetachedLogDet(MonotonicAffineTransform):
    def call_and_ladj(self, x):
        y, ladj = super().call_and_ladj(x)
        return y, ladj.detach()


class Detached(nn.Module):
    """An affine meta with one of its outputs without gradients."""

    def __init__(self, transform):
        super().__init__()
        self.meta = ConditionedUnivariate(MaskedMLP(3, 2, 8), Affine())
        self.transform = transform

    def forward(self, x):
        affine = self.meta(x)
        return self.transform(affine.loc, affine.log_scale)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            DetachedLogDet,
            "gradient of the log-derivative in the parameters: .* expected to be zero",
        ),
        (
            lambda shift, log_scale: MonotonicAffineTransform(shift.detach(), log_scale),
            "gradient of the value in the parameters: Jacobian mismatch",
        ),
    ],
)
def test_a_detached_output_is_named(transform, message):
    with pytest.raises(AssertionError, match=message):
        check_transform(lambda: AutoregressiveTransform(Detached(transform)), 3)


class Twice(nn.Module):
    """A meta that registers its network under a second name."""

    def __init__(self):
        super().__init__()
        self.meta = ConditionedUnivariate(MaskedMLP(3, 2, 8), Affine())
        self.network = self.meta.conditioner

    def forward(self, x):
        return self.meta(x)


def test_a_parameter_that_is_registered_twice_is_named():
    with pytest.raises(AssertionError, match=r"parameters: one of .* is there twice"):
        check_transform(lambda: AutoregressiveTransform(Twice()), 3)
