# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Failures of flows: values, gradients, inverses, copies, dtypes, devices and compilers."""

import copy
import itertools
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import pyro_artransform as art
from pyro_artransform import conditioners, transforms, univariate

FAMILIES = {
    "affine": univariate.Affine,
    "spline": univariate.RationalQuadraticSpline,
    "monotone": univariate.MonotoneNeural,
}
families = pytest.mark.parametrize("family", FAMILIES)
#: those whose inverse is in closed form
closed = pytest.mark.parametrize("family", ["affine", "spline"])
directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def scrambled(flow: nn.Module, gain: float = 1.0) -> nn.Module:
    """Linear layers as PyTorch draws them, with all weights multiplied."""
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return flow


def new_flow(dim: int, family: str, layers: int = 1, context: int = 0) -> nn.Module:
    hidden, family = (max(16, dim),) * 2, FAMILIES[family]
    if context:
        return art.conditional_iaf(dim, context, layers, hidden, univariate=family)
    return art.iaf(dim, layers, hidden, univariate=family)


def distribution(flow, dim: int, inverse: bool = False):
    zero = next(flow.parameters()).new_zeros(dim)
    base = dist.Normal(zero, zero + 1).to_event(1)
    return dist.TransformedDistribution(base, [flow.inv if inverse else flow])


def by_lambda(dim: int):
    """A flow that cannot know its parameters, which are in a closure, and these."""
    weight = torch.randn(2, dim, dim).div(dim).requires_grad_()

    def meta(x: Tensor):
        shift, scale = (x @ w.tril(-1).T for w in weight)
        return transforms.MonotonicAffineTransform(shift + weight[0, 0, 0], scale)

    return transforms.AutoregressiveTransform(meta), [weight]


def distributions():
    for family, inverse in itertools.product(FAMILIES, (False, True)):
        flow = scrambled(new_flow(3, family, layers=2))
        yield f"{family}, {inverse}", distribution(flow, 3, inverse), list(flow.parameters())
    flow, hidden = by_lambda(3)
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    for t in (flow, flow.inv):
        yield "a lambda", dist.TransformedDistribution(base, [t]), hidden


def test_f01_stale_cache():
    """A log density after a change of parameters, or of x in place, is the new one."""
    for name, q, parameters in distributions():
        for draw in (q.sample, q.rsample):
            x = draw((5,))
            before = q.log_prob(x.detach().clone())
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            torch.testing.assert_close(q.log_prob(x), q.log_prob(x.clone()), msg=name)
            assert not torch.isclose(q.log_prob(x), before).any(), name
        x = q.sample((5,))
        q.log_prob(x)
        x.mul_(0.5)
        torch.testing.assert_close(q.log_prob(x), q.log_prob(x.clone()), msg=name)


def test_f02_second_backward():
    """The same tensor can be scored and differentiated again and again."""
    for _, q, parameters in distributions():
        for x in (q.sample((5,)), q.sample((5,)).requires_grad_()):
            for _ in range(2):
                (-q.log_prob(x).mean()).backward()
                torch.autograd.grad(-q.log_prob(x).mean(), parameters)


def test_f03_lost_gradient():
    """Gradients of a log density do not depend on where x came from."""
    for name, q, parameters in distributions():
        with torch.no_grad():
            silent = q.rsample((5,))
        for x in (silent, q.sample((5,)), q.rsample((5,))):
            found, expected = (
                torch.autograd.grad(q.log_prob(z).sum(), parameters, retain_graph=True)
                for z in (x, x.clone())
            )
            torch.testing.assert_close(found, expected, msg=name)


@families
def test_f04_log_det(family):
    """The log-determinant is that of the Jacobian, and densities integrate to one."""
    for dim in (1, 3, 8):
        flow = scrambled(new_flow(dim, family))
        x = 3 * torch.randn(1, dim)
        y, ladj = flow.call_and_ladj(x)
        matrix = jacobian(lambda v, f=flow: f.call_and_ladj(v)[0], x).reshape(dim, dim)
        expected = torch.linalg.slogdet(matrix)[1].reshape(1)
        torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-8)
        back = flow.inv.call_and_ladj(y.detach())[1]
        # an inverse by root finding is as exact as its tolerance
        torch.testing.assert_close(back, -expected, rtol=0, atol=1e-6)
    flow = scrambled(new_flow(1, family), 3.0)
    wide, near = (torch.linspace(-end, end, 10_001)[:, None] for end in (1e3, 10.0))
    with torch.no_grad():
        y = flow(wide)
        assert (y.diff(dim=0) > 0).all()
        assert y[0] < -10 < 10 < y[-1]
        for inverse in (False, True):
            grid = torch.cat([(flow.inv if inverse else flow)(near), wide]).sort(0).values
            density = distribution(flow, 1, inverse).log_prob(grid).exp()
            assert abs(torch.trapezoid(density, grid.squeeze(-1)) - 1) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@closed
def test_f05_round_trip(family, dtype):
    """T and its inverse undo each other; where float32 cannot, the residual is round-off."""
    torch.set_default_dtype(dtype)
    for layers, dim, gain in itertools.product((1, 3), (1, 8, 64), (1, 2)):
        with torch.no_grad():
            flow = scrambled(new_flow(dim, family, layers), gain)
            x = torch.cat([60 * torch.rand(16, dim) - 30, torch.randn(16, dim)])
            y = flow(x).clone()
            back = flow.inv(y).clone()
            residual = (flow(back) - y).abs() / (1 + y.abs().amax(-1, keepdim=True))
        if (back - x).abs().max() > (1e-4 if dtype == torch.float32 else 1e-9):
            assert residual.max() < 100 * torch.finfo(dtype).eps, (layers, dim, gain)


def test_f06_too_few_passes():
    """As many passes as the graph is deep are exact; with one fewer the residual is said."""
    for dim in (6, 9, 12):
        lower = torch.rand(dim, dim).tril(-1) > 0.55
        lower[1, 0] = lower[2, 1] = True
        shuffle = torch.randperm(dim)
        adjacency = lower[shuffle][:, shuffle]
        paths, depth = adjacency.long(), 1
        while paths.any():
            paths, depth = (paths @ adjacency.long()).clamp(max=1), depth + 1
        y = torch.randn(7, dim)

        def flow(passes, adjacency=adjacency):
            net = conditioners.MaskedMLP(len(adjacency), 2, 16, adjacency=adjacency)
            meta = transforms.ConditionedUnivariate(net, univariate.Affine())
            return scrambled(transforms.AutoregressiveTransform(meta, passes), 2.0)

        exact = flow(depth)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(exact(exact.inv(y).clone()), y, rtol=0, atol=1e-9)
        with pytest.warns(match="residual"), torch.no_grad():
            flow(depth - 1).inv(y)


@closed
@directions
def test_f07_exploding_scale(family, inverse):
    """Large weights make no infinite draw and no infinite gradient, in float32."""
    torch.set_default_dtype(torch.float32)
    for dim, gain in itertools.product((8, 64), (1, 3, 10)):
        flow = scrambled(new_flow(dim, family), gain)
        q = distribution(flow, dim, inverse)
        x = q.rsample((100,)).detach()
        log_prob = q.log_prob(x)
        found = torch.autograd.grad(log_prob.sum(), list(flow.parameters()), allow_unused=True)
        assert all(z.isfinite().all() for z in (x, log_prob, *found) if z is not None)
    raw = torch.linspace(-1e4, 1e4, 2001).requires_grad_()
    affine = transforms.MonotonicAffineTransform(raw.detach(), raw)
    log_scale = affine.log_abs_det_jacobian(raw.detach(), raw.detach())
    assert (log_scale.abs() <= 3.003).all()
    assert (torch.autograd.grad(log_scale.sum(), raw)[0] > 0).all(), "the gradient has died"


@families
def test_f10_identity(family):
    """With zero parameters each transform is the identity, near zero and far out."""
    x = torch.tensor([1e-8, 1e-6, 1e-2, 1.0, 1e2])
    x = torch.cat([x, -x])[:, None]
    for context, dim in itertools.product((0, 2), (1, 4)):
        wide, flow = x.expand(-1, dim).contiguous(), new_flow(dim, family, context=context)
        if context:
            flow = flow.condition(torch.randn(len(x), context))
        y, ladj = flow.call_and_ladj(wide)
        for found, expected in ((y, wide), (ladj, 0 * ladj), (flow.inv(wide), wide)):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@closed
def test_f12_large_context(family):
    """A context of large variance, or with a column that is constant, gives finite losses."""
    for scale in (1.0, 1e3):
        x, context = torch.randn(64, 3), scale * torch.randn(64, 2)
        context[:, 1] = scale
        flow = scrambled(new_flow(3, family, context=2))
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        for _ in range(10):
            y, ladj = flow.condition(context).call_and_ladj(x)
            loss = (0.5 * y.square().sum(-1) - ladj).mean()
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_f13_not_restored(tmp_path):
    """A state dict brings masks and orders with it, into another process to the bit."""
    graphs = [{"order": range(5)}, {"order": torch.randperm(5)}]
    x = torch.randn(7, 5)
    own, saved = (scrambled(art.affine_autoregressive(5, 16, **graph)) for graph in graphs)
    own.load_state_dict(saved.state_dict(), strict=True)
    y = saved(x).detach().clone()
    assert torch.equal(own(x), y)
    torch.testing.assert_close(own.inv(y), x, rtol=0, atol=1e-9)
    flow = scrambled(art.iaf(5, 3, 16))
    torch.save((flow.state_dict(), x, flow(x).detach()), tmp_path / "flow")
    code = (
        "import sys, torch, pyro_artransform as art; torch.set_default_dtype(torch.float64);"
        "torch.manual_seed(11); torch.set_num_threads(1); state, x, y = torch.load(sys.argv[1]);"
        "flow = art.iaf(5, 3, 16); flow.load_state_dict(state); assert torch.equal(flow(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "flow")], check=True)


def uses(flow) -> list[Callable[[], object]]:
    """What a flow may have done before it is copied."""
    q, x = distribution(flow, 3), torch.randn(4, 3)
    return [
        lambda: None,
        lambda: flow.call_and_ladj(x),
        lambda: (-q.log_prob(x).mean()).backward(),
        lambda: q.log_prob(q.rsample((4,))),
        lambda: (flow.inv(x), flow.inv),
    ]


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


@families
def test_f18_copies(family):
    """Deep copies and pickles work at any moment, and train apart from the original."""
    flow, x = scrambled(new_flow(3, family, layers=2)), torch.randn(7, 3)
    for use, way in itertools.product(uses(flow), (copy.deepcopy, through_pickle)):
        use()
        twin = way(flow)
        with torch.no_grad():
            expected = flow(x).clone()
            assert torch.equal(twin(x), expected)
            for parameter in twin.parameters():
                parameter.sub_(0.1)
            assert torch.equal(flow(x.clone()), expected)
            assert not torch.equal(twin(x), expected)


@families
def test_f19_inverse_copies(family):
    """The inverse is copied and pickled like the flow."""
    flow, y = scrambled(new_flow(3, family)), torch.randn(7, 3)
    with torch.no_grad():
        expected = flow.inv(y).clone()
    for use, way in itertools.product(uses(flow), (copy.deepcopy, through_pickle)):
        use()
        twin = way(flow.inv)
        assert torch.equal(twin(y), expected)
        assert list(twin.parameters())


def test_f27_spline_edges():
    """A spline is finite and increasing at its knots, its bounds and far outside, in float32."""
    bound, bins = 5.0, 8
    knots = torch.linspace(-bound, bound, bins + 1, dtype=torch.float32)
    x = torch.cat([knots, knots.nextafter(knots + 1), knots.nextafter(knots - 1)])
    x = torch.cat([x, 3 * bound * (torch.rand(20_000).float() - 0.5), 1e4 * knots]).sort().values
    for scale, _ in itertools.product((0.0, 1.0, 10.0, 100.0), range(5)):
        shape = (scale * torch.randn(size).float() for size in (bins, bins, bins - 1))
        spline = transforms.MonotonicRQSTransform(*shape, bound=bound)
        for t in (spline, spline.inv):
            y, ladj = t.call_and_ladj(x)
            assert y.isfinite().all()
            assert ladj.isfinite().all()
            outside = x.abs() > bound
            assert torch.equal(y[outside], x[outside])
            assert (y[~outside].abs() <= bound * (1 + 1e-5)).all()
            noise = 1e-5 * (1 + ladj.exp())  # round-off of x, which a steep bin magnifies
            assert (y.diff() >= -noise[1:] - noise[:-1]).all()
