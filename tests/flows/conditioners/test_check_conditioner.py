# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The assertions for third parties: they pass a right conditioner and name what is wrong in others."""

import pytest
import torch
from torch import nn

from pyro_artransform.flows.conditioners import Conditioner
from pyro_artransform.testing import check_conditioner


class RunningSum(Conditioner):
    def __init__(self, read=lambda x, before: before, depth=4):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1))
        self.read, self.depth = read, depth

    def forward(self, x, context=None):
        before = nn.functional.pad(x.cumsum(-1), (1, 0))[..., :-1]
        return self.read(x, before)[..., None] * self.weight


def test_a_right_conditioner_passes_and_a_depth_that_is_too_small_does_not():
    for depth in (None, 5):
        check_conditioner(lambda depth=depth: RunningSum(depth=depth), 4)
    with pytest.raises(AssertionError, match="depth: it states 2, but 4 coordinates are on the"):
        check_conditioner(lambda: RunningSum(depth=2), 4)


FAULTS = {
    r"autoregressive: .* \[\[0, 3\], \[1, 2\]\]": lambda x, before: before + x.detach().flip(-1),
    r"autoregressive: .* \[\[0, 0\], \[1, 1\], \[2, 2\], \[3, 3\]\]": (
        lambda x, before: before + (x > 0).to(x)
    ),
    r"autoregressive: .* for \(i, j\) in \[\[0, 0\], \[1, 1\], \[2, 2\], \[3, 3\]\]": (
        lambda x, before: before + torch.where(x < -6, x, 0.0)
    ),
    r"graph: .* do not depend on x_j": lambda x, before: 0 * before,
    r"random: the same x gives different values": lambda _, before: nn.functional.dropout(
        before, 0.5
    ),
    r"batch: a row alone gives a different value": (
        lambda x, before: before - x.reshape(-1, 4).mean(0).detach()
    ),
}


@pytest.mark.parametrize(("message", "read"), FAULTS.items())
def test_a_fault_is_named(message, read):
    with pytest.raises(AssertionError, match=message):
        check_conditioner(lambda: RunningSum(read), 4)
