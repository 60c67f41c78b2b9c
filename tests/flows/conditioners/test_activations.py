# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from pyro_artransform.flows.conditioners import TiltedSiLU
from pyro_artransform.flows.conditioners.masked_mlp import is_elementwise


@pytest.mark.parametrize("slope", [0.0, np.float64(0.6), 1])
def test_tilted_silu(slope):
    x, activation = torch.linspace(-30, 30, 101), TiltedSiLU(slope)
    assert torch.allclose(activation(x), x * (slope + torch.tanh(x / 2)), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(activation, torch.randn(5, requires_grad=True))
    assert repr(activation) == f"TiltedSiLU(slope={float(slope)})"


def test_a_slope_outside_of_its_range():
    with pytest.raises(ValueError, match="slope: expected a number from 0 to 1, got"):
        TiltedSiLU(1.5)


@pytest.mark.parametrize("cls", [TiltedSiLU, torch.nn.ELU])
def test_a_subclass_may_not_be_elementwise(cls):
    assert is_elementwise(cls())
    assert not is_elementwise(type("Other", (cls,), {})())
    assert not is_elementwise(torch.nn.Softmax(-1))
