# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The examples of the original description, by changing one import, do what their text says."""

import pytest
import torch
import torch.nn as nn

import pyro_artransform as zuko
from pyro_artransform.flows.conditioners import MaskedInput


class AutoregressiveNet(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, features * 2))

    def forward(self, x):
        params = self.net(x)
        shift, scale = params.chunk(2, dim=-1)
        return zuko.transforms.MonotonicAffineTransform(shift, scale)


class AutoregressiveFlow(nn.Module):
    def __init__(self, features, layers=3):
        super().__init__()
        self.transforms = []
        for _ in range(layers):
            net = MaskedInput(AutoregressiveNet(features))
            self.transforms.append(
                zuko.transforms.AutoregressiveTransform(meta=net, passes=features)
            )
            perm = torch.randperm(features)
            self.transforms.append(zuko.transforms.PermutationTransform(perm))
        self.flow = zuko.transforms.ComposedTransform(*self.transforms)

    def forward(self, x):
        return self.flow(x)


def log_det(transform, x):
    jacobian = torch.autograd.functional.jacobian
    return torch.stack([torch.linalg.slogdet(jacobian(transform._call, row))[1] for row in x])


def test_basic_example_runs_and_says_what_is_wrong():
    transform = zuko.transforms.AutoregressiveTransform(meta=AutoregressiveNet(5), passes=3)
    x = torch.randn(32, 5)
    with pytest.warns(UserWarning, match=r"not autoregressive.*\[0, 1, 2, 3, 4\].*MaskedInput"):
        y = transform(x)
    with pytest.warns(RuntimeWarning, match="not converged after 3 passes: the largest residual"):
        transform.inv(y.clone())
    assert transform.log_abs_det_jacobian(x, y).shape == (32,)


def test_basic_example_is_exact_with_a_masked_input():
    transform = zuko.transforms.AutoregressiveTransform(meta=MaskedInput(AutoregressiveNet(5)))
    x = torch.randn(32, 5)
    y, ladj = transform.call_and_ladj(x)
    assert ladj.shape == (32,)
    assert torch.allclose(ladj, log_det(transform, x))
    assert torch.allclose(transform.inv(y.detach()), x, atol=1e-12)


def test_multi_layer_flow():
    flow = AutoregressiveFlow(features=10, layers=3)
    x = torch.randn(64, 10)
    y = flow(x)
    assert y.shape == (64, 10)
    assert len(list(flow.parameters())) == 3 * 4
    assert len([name for name in flow.state_dict() if name.endswith("order")]) == 3
    assert torch.allclose(flow.flow.log_abs_det_jacobian(x, y)[:4], log_det(flow.flow, x[:4]))
    assert torch.allclose(flow.flow.inv(y.detach()), x, atol=1e-10)
