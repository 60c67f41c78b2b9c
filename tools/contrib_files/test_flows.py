# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import transforms as T

from pyro_artransform.flows import (
    AutoregressiveTransform,
    FlowDistribution,
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_iaf,
    conditional_maf,
    conditional_spline_autoregressive,
    hinged_marginals,
    iaf,
    maf,
    spline_autoregressive,
    spline_marginals,
)
from pyro_artransform.flows.conditioners import MaskedInput, MaskedMLP
from pyro_artransform.flows.transforms import (
    ComposedTransform,
    CompressedTails,
    ConditionedUnivariate,
    LocationScale,
)
from pyro_artransform.flows.univariate import (
    Affine,
    MonotoneNeural,
    RationalQuadraticSpline,
)


@pytest.fixture(autouse=True)
def _fresh_start():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)


def redrawn(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_().div_(2 * parameter.shape[-1] ** 0.5)
    return module.double()


def layer(dim, **options):
    conditioner = MaskedMLP(dim, 2, [16, 16], **options)
    return redrawn(AutoregressiveTransform(ConditionedUnivariate(conditioner, Affine())))


def hinges(dim, scale=5.0):
    t = redrawn(hinged_marginals(dim))
    with torch.no_grad():
        t.meta.conditioner.params.mul_(scale)
    return t


def flow(dim):
    scale = redrawn(LocationScale(torch.zeros(dim), 1.0, full_rank=True))
    return ComposedTransform(hinges(dim), layer(dim), CompressedTails(), scale)


def standard_normal(*shape):
    return dist.Normal(torch.zeros(shape, dtype=torch.float64), 1.0).to_event(1)


def check(t, x):
    """The inverse, the log-determinants, and who owns the parameters."""
    y, ladj = t.call_and_ladj(x)
    back, back_ladj = t.inverse_and_ladj(y)
    assert ladj.shape == x.shape[:-1]
    assert torch.allclose(back, x, atol=1e-6)
    assert torch.allclose(back_ladj, -ladj, atol=1e-6)
    assert torch.allclose(t.inv(y), back)
    assert torch.allclose(t.inv.log_abs_det_jacobian(y, x), -ladj)
    assert len(list(t.inv.parameters())) == len(list(t.parameters()))
    row = x.reshape(-1, x.shape[-1])[0]
    # the transform of a single row, whatever the rows of a context
    jacobian = torch.autograd.functional.jacobian(t, row)
    if jacobian.dim() == 2:
        determinant = torch.linalg.slogdet(jacobian)[1]
        assert torch.allclose(determinant, ladj.flatten()[0], atol=1e-7)


BUILDERS = [
    affine_autoregressive,
    hinged_marginals,
    iaf,
    maf,
    spline_autoregressive,
    spline_marginals,
    lambda dim: iaf(dim, 1, [16], univariate=lambda: MonotoneNeural(count_units=3)),
    lambda dim: maf(dim, 2, [16], univariate=RationalQuadraticSpline),
]


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("build", BUILDERS)
def test_builders_start_as_the_identity(build, dim):
    t = build(dim)
    x = torch.randn(3, dim)
    assert torch.allclose(t(x), x, atol=1e-6)
    check(redrawn(t), torch.randn(4, dim, dtype=torch.float64))


@pytest.mark.parametrize("dim", [1, 2, 7, 60])
@pytest.mark.parametrize("skip_connections", [False, True])
def test_inverse_of_a_layer(dim, skip_connections):
    t = layer(dim, skip_connections=skip_connections)
    check(t, torch.randn(5, 3, dim, dtype=torch.float64))


@pytest.mark.parametrize("make", [hinges, lambda dim: CompressedTails(), flow])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_inverse_of_tails_and_flows(make, dim):
    check(make(dim), 20 * torch.randn(50, dim, dtype=torch.float64))


CONDITIONAL = [
    conditional_affine_autoregressive,
    conditional_iaf,
    conditional_maf,
    conditional_spline_autoregressive,
]


@pytest.mark.parametrize("shape", [(2,), (1, 2), (4, 2)])
@pytest.mark.parametrize("build", CONDITIONAL)
def test_conditional_builders(build, shape):
    t = redrawn(build(3, 2))
    check(t.condition(torch.randn(shape)), torch.randn(4, 3, dtype=torch.float64))
    base = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    flow = dist.ConditionalTransformedDistribution(base, [t])
    given = flow.condition(torch.randn(4, 2))
    draw = given.rsample()
    assert draw.shape == (4, 3)
    given.log_prob(draw.detach().clone()).sum().backward()
    assert all(p.grad is not None for p in t.parameters())


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


def test_copies():
    t = layer(3)
    x = torch.randn(2, 3, dtype=torch.float64)
    for twin in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert torch.equal(twin(x), t(x))
        assert torch.equal(twin.inv(x), t.inv(x))
        assert twin.inv.inv is twin


def test_compressed_tails():
    t = CompressedTails()
    x = torch.tensor([-1e30, -100.0, -40.0, 0.0, 3.0, 40.0, 100.0, 1e30])
    y, ladj = t.call_and_ladj(x[:, None])
    assert torch.equal(y[2:6, 0], x[2:6])
    assert not ladj[2:6].any()
    assert 48 < y[6] < 49
    assert y.abs().max() < 200
    assert y.isfinite().all()
    assert ladj.isfinite().all()


@pytest.mark.parametrize("full_rank", [False, True])
def test_location_and_scale(full_rank):
    t = redrawn(LocationScale(torch.zeros(4), 1.0, full_rank=full_rank))
    tril = torch.autograd.functional.jacobian(t, torch.zeros(4, dtype=torch.float64))
    assert (torch.count_nonzero(tril) > 4) == full_rank
    expected = dist.MultivariateNormal(t.loc, scale_tril=tril)
    x = torch.randn(6, 4, dtype=torch.float64)
    q = FlowDistribution(standard_normal(4), t)
    assert torch.allclose(q.log_prob(x), expected.log_prob(x))


def test_a_draw_is_scored_without_an_inverse():
    t = flow(4)
    calls = []
    t.inverse_and_ladj = lambda y: calls.append(y) or type(t).inverse_and_ladj(t, y)
    q = FlowDistribution(standard_normal(4), t)
    value = q.rsample((6,))
    log_prob = q.log_prob(value)
    assert not calls
    assert torch.allclose(q.log_prob(value.clone()), log_prob)
    assert len(calls) == 1
    expected = dist.TransformedDistribution(standard_normal(4), t)
    assert torch.allclose(expected.log_prob(value), log_prob)


def test_a_draw_that_was_edited_is_scored_anew():
    q = FlowDistribution(standard_normal(3), layer(3))
    with torch.no_grad():
        value = q.rsample((2,))
        before = q.log_prob(value)
        value += 1.0
    assert torch.allclose(q.log_prob(value), q.log_prob(value.clone()))
    assert not torch.allclose(q.log_prob(value), before)


def test_batches_and_expansion():
    t = layer(3)
    q = FlowDistribution(standard_normal(5, 3), t)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    assert q.log_prob(q.sample((2,))).shape == (2, 5)
    q = FlowDistribution(standard_normal(3), t).expand([4])
    assert q.log_prob(q.sample()).shape == (4,)
    q = FlowDistribution(standard_normal(5, 3).to_event(1), t)
    value = q.sample()
    assert q.log_prob(value).shape == ()
    assert torch.allclose(q.log_prob(value.clone()), q.log_prob(value))


def test_a_transform_without_an_inverse():
    t = dist.transforms.block_autoregressive(2).double()
    q = FlowDistribution(standard_normal(2), t)
    (q.log_prob(value := q.rsample((3,))) + value.sum(-1)).sum().backward()
    assert all(p.grad is not None for p in t.parameters())
    with pytest.raises(NotImplementedError, match="has no inverse"):
        q.log_prob(q.rsample((3,)).clone())


def test_composition():
    affine_part, foreign = layer(3), T.AffineTransform(1.0, 2.0)
    inner = T.ComposeTransform([affine_part.inv, foreign])
    t = ComposedTransform(inner, T.ExpTransform())
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = (affine_part.inv(x) * 2 + 1).exp()
    assert torch.allclose(t(x), expected)
    assert torch.allclose(t.inv(expected), x)
    assert len(list(t.parameters())) == len(list(affine_part.parameters()))
    twin = copy.deepcopy(t)
    assert torch.equal(twin(x), t(x))
    assert not {*map(id, twin.parameters())} & {*map(id, t.parameters())}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedMLP(3, 2, order=[0, 0, 1]), "permutation"),
        (lambda: MaskedMLP(3, 2, adjacency=torch.ones(3, 3)), "cycle"),
        (lambda: MaskedMLP(3, 2, hidden_dims=[]), "at least one width"),
        (lambda: iaf(0), "input_dim: expected a positive integer"),
        (lambda: conditional_maf(3, 0), "context_dim: expected a positive integer"),
        (lambda: maf(3, num_transforms=0), "num_transforms: expected a positive"),
        (lambda: spline_autoregressive(3, count_bins=1), "count_bins: expected"),
        (lambda: Affine(bound=0.0), "bound: expected a positive finite number"),
        (lambda: ConditionedUnivariate(MaskedMLP(3, 5), Affine()), "with 2 parameters"),
        (lambda: layer(3)(torch.zeros(2, 4)), r"x: expected shape \(\*, 3\), got \(2, 4\)"),
        (lambda: AutoregressiveTransform(lambda x: x)(torch.zeros(2)), "a torch Transform"),
        (lambda: FlowDistribution(standard_normal(2), []), r"ComposedTransform\(...\) makes"),
        (lambda: ComposedTransform(nn.Linear(2, 2)), "expected a transform, or a module"),
    ],
)
def test_errors(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
