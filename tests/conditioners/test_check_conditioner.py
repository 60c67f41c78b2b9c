# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The assertions for third parties: they pass a right conditioner and name what is wrong in others."""

import pytest
import torch
from torch import nn

from pyro_artransform.conditioners import Conditioner
from pyro_artransform.testing import check_conditioner


class RunningSum(Conditioner):
    depth = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1))

    def read(self, x):
        return nn.functional.pad(x.cumsum(-1), (1, 0))[..., :-1]

    def forward(self, x, context=None):
        return self.read(x)[..., None] * self.weight


@pytest.mark.parametrize("depth", [None, 4, 5])
def test_a_right_conditioner_passes(depth):
    class Stated(RunningSum):
        pass

    Stated.depth = depth
    check_conditioner(Stated, 4)


class TooShallow(RunningSum):
    depth = 2


class Detached(RunningSum):
    def read(self, x):
        return super().read(x) + x.detach().flip(-1)


class Steps(RunningSum):
    def read(self, x):
        return super().read(x) + (x > 0).to(x)


class FarOnly(RunningSum):
    def read(self, x):
        return super().read(x) + torch.where(x < -6, x, 0.0)


class Dropout(RunningSum):
    def read(self, x):
        return nn.functional.dropout(super().read(x), 0.5)


class MixesRows(RunningSum):
    def read(self, x):
        return super().read(x - x.reshape(-1, 4).mean(0).detach())


@pytest.mark.parametrize(
    ("conditioner", "message"),
    [
        (TooShallow, "depth: it states 2, but 4 coordinates are on the longest path"),
        (Detached, r"autoregressive: .* \[\[0, 3\], \[1, 2\]\]"),
        (Steps, r"autoregressive: .* \[\[0, 0\], \[1, 1\], \[2, 2\], \[3, 3\]\]"),
        (FarOnly, r"autoregressive: .* \[\[0, 0\], \[1, 1\], \[2, 2\], \[3, 3\]\]"),
        (Dropout, "random: the same x gives other values"),
        (MixesRows, "batch: a row alone gives another value"),
    ],
)
def test_a_fault_is_named(conditioner, message):
    with pytest.raises(AssertionError, match=message):
        check_conditioner(conditioner, 4)
