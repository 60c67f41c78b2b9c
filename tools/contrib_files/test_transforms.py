# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_artransform.flows.conditioners import MaskedInput, MaskedMLP
from pyro_artransform.flows.transforms import (
    AutoregressiveTransform,
    ConditionedUnivariate,
)
from pyro_artransform.flows.univariate import Affine


@pytest.fixture(autouse=True)
def _fresh_start():
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)


def layer(dim, **options):
    conditioner = MaskedMLP(dim, 2, [16, 16], **options)
    return redrawn(AutoregressiveTransform(ConditionedUnivariate(conditioner, Affine())))


def redrawn(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_().div_(2 * parameter.shape[-1] ** 0.5)
    return module.double()


@pytest.mark.parametrize("dim", [1, 2, 7, 60])
@pytest.mark.parametrize("skip_connections", [False, True])
def test_inverse(dim, skip_connections):
    t = layer(dim, skip_connections=skip_connections)
    x = torch.randn(5, 3, dim, dtype=torch.float64)
    y, ladj = t.call_and_ladj(x)
    back, back_ladj = t.inverse_and_ladj(y)
    assert ladj.shape == (5, 3)
    assert torch.allclose(back, x, atol=1e-6)
    assert torch.allclose(back_ladj, -ladj, atol=1e-6)
    assert torch.allclose(t.inv(y), back)
    assert torch.allclose(t.inv.log_abs_det_jacobian(y, x), -ladj)
    assert len(list(t.inv.parameters())) == len(list(t.parameters())) > 0


def test_jacobian_is_triangular_and_its_determinant_right():
    t = layer(6, order=[3, 1, 5, 0, 2, 4])
    x = torch.randn(6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(t, x)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert not jacobian[order][:, order].triu(1).any()
    ladj = t.log_abs_det_jacobian(x, t(x))
    assert torch.allclose(ladj, torch.linalg.slogdet(jacobian)[1])


def test_adjacency():
    adjacency = torch.zeros(5, 5, dtype=torch.bool)
    adjacency[2, 0] = adjacency[4, 0] = adjacency[4, 2] = True
    t = layer(5, adjacency=adjacency)
    jacobian = torch.autograd.functional.jacobian(t, torch.randn(5, dtype=torch.float64))
    assert not jacobian[~(adjacency | torch.eye(5, dtype=torch.bool))].any()
    y = torch.randn(8, 5, dtype=torch.float64)
    assert torch.allclose(t(t.inv(y)), y)


def test_gradients_of_the_inverse():
    t = layer(4)
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(t.inverse_and_ladj, y)
    weight = next(t.parameters())

    x, ladj = t.inverse_and_ladj(y)
    (found,) = torch.autograd.grad(x.sum() + ladj.sum(), weight)
    h = 1e-6
    with torch.no_grad():
        weight[1, 0] += h
        x2, ladj2 = t.inverse_and_ladj(y)
        weight[1, 0] -= 2 * h
        x1, ladj1 = t.inverse_and_ladj(y)
    expected = (x2.sum() - x1.sum() + ladj2.sum() - ladj1.sum()) / (2 * h)
    assert torch.allclose(found[1, 0], expected, rtol=1e-4, atol=1e-6)


def masked_input(dim, **options):
    net = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Unflatten(-1, (dim, 2)))
    meta = ConditionedUnivariate(MaskedInput(net, **options), Affine())
    return redrawn(AutoregressiveTransform(meta))


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # of torch.func
@pytest.mark.parametrize("make", [layer, masked_input])
def test_the_inverse_in_torch_func(make):
    t = make(4)
    y = torch.randn(4, dtype=torch.float64)
    jacobian = torch.func.jacrev(t.inv)(y)
    forward = torch.autograd.functional.jacobian(t, t.inv(y))
    assert torch.allclose(jacobian, torch.linalg.inv(forward))
    assert torch.func.hessian(lambda y: t.inv(y).sum())(y).isfinite().all()


def test_a_second_derivative_of_the_inverse_is_refused():
    y = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = layer(4).inv(y)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(x.sum(), y, create_graph=True)


def test_what_is_not_a_number_stays_where_it_is():
    t = layer(4)
    y = torch.randn(2, 4, dtype=torch.float64)
    expected = t.inv(y)
    y[0, 2] = float("nan")
    x = t.inv(y)
    assert torch.allclose(x[1], expected[1])
    assert torch.allclose(x[0, :2], expected[0, :2])
    assert x[0, 2:].isnan().all()


def test_masked_input_of_a_graph_and_of_transforms():
    adjacency = torch.zeros(3, 3, dtype=torch.bool)
    adjacency[2, 0] = True
    t = masked_input(3, adjacency=adjacency)
    jacobian = torch.autograd.functional.jacobian(t, torch.randn(3, dtype=torch.float64))
    assert not jacobian[~(adjacency | torch.eye(3, dtype=torch.bool))].any()

    def net(x):
        return dist.transforms.AffineTransform(x.sum(-1, keepdim=True), 2.0)

    t = AutoregressiveTransform(MaskedInput(net))
    x = torch.randn(5, 3)
    y, ladj = t.call_and_ladj(x)
    assert torch.allclose(y, 2 * x + x.cumsum(-1) - x, atol=1e-6)
    assert torch.allclose(ladj, torch.full((5,), 2.0).log() * 3)
    assert torch.allclose(t.inv(y), x, atol=1e-5)


def test_any_meta():
    class Cumulative(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            earlier = x.cumsum(-1) - x
            return dist.transforms.AffineTransform(self.scale * earlier, 2.0)

    t = AutoregressiveTransform(Cumulative())
    y = torch.randn(5, 8)
    assert torch.allclose(t(t.inv(y)), y, atol=1e-4)
    few = AutoregressiveTransform(Cumulative(), passes=2)
    with pytest.warns(RuntimeWarning, match="has not converged after 2 passes"):
        few.inv(y)


def test_a_meta_that_is_not_autoregressive():
    network, x = nn.Linear(3, 3), torch.randn(2, 3)
    t = AutoregressiveTransform(lambda x: dist.transforms.AffineTransform(network(x), 1.0))
    with pytest.warns(UserWarning, match=r"not autoregressive.*MaskedInput\(net\)"):
        t(x)
    x = torch.randn(2, 3, dtype=torch.float64)
    t = masked_input(3)
    assert torch.allclose(t.inv(t(x)), x)


def test_starts_as_the_identity_and_trains():
    conditioner = MaskedMLP(3, 2)
    t = AutoregressiveTransform(ConditionedUnivariate(conditioner, Affine()))
    x = torch.randn(100, 3)
    assert torch.equal(t(x), x)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    data = torch.stack([x[:, 0], x[:, 1] + x[:, 0] ** 2, x[:, 2] / 5], -1)
    # of either direction the log-likelihood of data rises
    for flow in (t.inv, t):
        density = dist.TransformedDistribution(base, [flow])
        optim = torch.optim.Adam(t.parameters(), 0.01)
        losses = []
        for _ in range(40):
            loss = -density.log_prob(data).mean()
            optim.zero_grad()
            loss.backward()
            optim.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.3


def test_distribution():
    t, sizes = layer(5), [(3,), (3, 4), (3, 4, 5)]
    for size in sizes:
        base = dist.Normal(torch.zeros((*size, 5), dtype=torch.float64), 1.0).to_event(1)
        for flow in (t, t.inv):
            draw = dist.TransformedDistribution(base, [flow]).sample()
            assert draw.shape == (*size, 5)


def test_nothing_is_cached():
    t = layer(3)
    assert t.with_cache(0) is t.with_cache(1) is t
    x = torch.randn(2, 3, dtype=torch.float64)
    before = t(x)
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(t(x), before)
    assert torch.allclose(t.inv(t(x)), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": [0, 0, 1]}, "permutation"),
        ({"adjacency": torch.ones(3, 3)}, "cycle"),
        ({"hidden_dims": []}, "at least one width"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedMLP(3, 2, **options)


def test_errors_of_arguments():
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 3\), got \(2, 4\)"):
        layer(3)(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected a conditioner with 2 parameters"):
        ConditionedUnivariate(MaskedMLP(3, 5), Affine())
    with pytest.raises(TypeError, match="expected a function that returns a torch Transform"):
        AutoregressiveTransform(lambda x: x)(torch.zeros(2))
    with pytest.raises(ValueError, match="bound: expected a positive finite number"):
        Affine(bound=0.0)


def test_copies():
    t = layer(3)
    x = torch.randn(2, 3, dtype=torch.float64)
    for twin in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert torch.equal(twin(x), t(x))
        assert torch.equal(twin.inv(x), t.inv(x))
        assert twin.inv.inv is twin
