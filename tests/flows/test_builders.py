# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_artransform as pa
from pyro_artransform.flows.univariate import Affine, RationalQuadraticSpline
from pyro_artransform.testing import check_transform, redraw

BUILDERS = {
    "affine": pa.affine_autoregressive,
    "spline": pa.spline_autoregressive,
    "iaf": pa.iaf,
    "maf": pa.maf,
}
CONDITIONAL = {
    "affine": pa.conditional_affine_autoregressive,
    "spline": pa.conditional_spline_autoregressive,
    "iaf": pa.conditional_iaf,
    "maf": pa.conditional_maf,
}
every_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@pytest.mark.parametrize(
    ("name", "dim"), [("affine", 1), ("spline", 5), ("iaf", 5), ("maf", 1), ("maf", 2)]
)
def test_contract(name, dim):
    check_transform(lambda: BUILDERS[name](dim), dim)


@pytest.mark.parametrize("build", CONDITIONAL.values(), ids=CONDITIONAL)
def test_conditional(build):
    t = build(3, 2)
    x = torch.randn(5, 3)
    for context in (torch.randn(5, 2), torch.randn(1, 2), torch.randn(2)):
        assert torch.allclose(t.condition(context)(x), x)
    redraw(t)
    q = dist.ConditionalTransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [t])
    given = q.condition(torch.randn(5, 2))
    value = given.rsample()
    assert value.shape == (5, 3)
    loss = -given.log_prob(value.detach().clone()).sum()
    loss.backward()
    assert all(p.grad is not None for p in t.parameters())
    with pytest.raises(ValueError, match="context_dim: expected a positive integer, got 0"):
        build(3, 0)


@pytest.mark.parametrize("build", CONDITIONAL.values(), ids=CONDITIONAL)
def test_a_large_context_with_a_constant_column(build):
    t, scale = redraw(build(3, 2)), 1e3
    x, context = torch.randn(64, 3), scale * torch.randn(64, 2)
    context[:, 1] = scale
    optimizer = torch.optim.Adam(t.parameters(), 1e-2)
    for _ in range(10):
        y, ladj = t.condition(context).call_and_ladj(x)
        loss = (0.5 * y.square().sum(-1) - ladj).mean()
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@every_builder
def test_devices(build):
    """A default device makes no tensor of a flow, and all that a flow holds moves with it."""
    t, x = redraw(build(3)), torch.randn(4, 3)
    with torch.device("meta"):
        y, ladj = t.call_and_ladj(x)
        back, inverse_ladj = t.inv.call_and_ladj(y.detach().clone())
    assert {z.device.type for z in (y, ladj, back, inverse_ladj)} == {"cpu"}
    assert torch.allclose(back, x, atol=1e-5)
    held = [z for m in t.to("meta").modules() for z in vars(m).values() if torch.is_tensor(z)]
    assert all(z.is_meta for z in [*t.state_dict().values(), *held])


def test_order_alternates():
    orders = [part.meta.conditioner.order.tolist() for part in pa.iaf(3, 4).parts]
    assert orders == [[0, 1, 2], [2, 1, 0], [0, 1, 2], [2, 1, 0]]


def test_arguments_reach_the_network():
    t = pa.spline_autoregressive(
        3, 7, count_bins=5, bound=2.0, nonlinearity=torch.tanh, order=[2, 1, 0]
    )
    assert t.meta.conditioner.hidden_dims == (7,)
    assert t.meta.conditioner.nonlinearity is torch.tanh
    assert t.meta.conditioner.order.tolist() == [2, 1, 0]
    assert t.meta.univariate.num_params == 14
    options = {"univariate": lambda: RationalQuadraticSpline(count_bins=4), "nonlinearity": None}
    for flow in (
        pa.iaf(3, 2, 7, **options).parts,
        pa.maf(3, 2, 7, **options).inv.parts,
        pa.conditional_iaf(3, 2, 2, 7, **options).transforms,
        pa.conditional_maf(3, 2, 2, 7, **options).inv.transforms,
    ):
        assert flow[1].meta.univariate.num_params == 11
        assert flow[1].meta.conditioner.hidden_dims == (7,)
        assert flow[1].meta.conditioner.skip is None
    flow = pa.conditional_maf(3, 2, 2, skip_connections=True)
    assert all(t.meta.conditioner.skip is not None for t in flow.inv.transforms)
    flow = pa.maf(3, 3, nonlinearity=torch.nn.PReLU())
    assert len({id(part.meta.conditioner.nonlinearity) for part in flow.inv.parts}) == 1


@every_builder
def test_bad_sizes(build):
    for bad in (0, 3.0, "3", True, None):
        message = f"input_dim: expected a positive integer, got {bad!r}"
        with pytest.raises(ValueError, match=message):
            build(bad)
    with pytest.raises(ValueError, match="hidden_dims"):
        build(3, hidden_dims=())
    assert build(np.int64(3), hidden_dims=np.int32(8))(torch.zeros(3)).shape == (3,)


def test_bad_layers():
    with pytest.raises(ValueError, match="num_transforms: expected a positive integer"):
        pa.iaf(3, 0)
    with pytest.raises(TypeError, match=r"new family for each layer, such as Affine, got Affine\("):
        pa.maf(3, univariate=Affine())
    with pytest.raises(TypeError, match="univariate: expected it to return a Univariate, got"):
        pa.iaf(3, univariate=lambda: Affine)
