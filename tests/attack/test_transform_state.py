# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What may change around a transform: parameters, threads, copies, files, transforms of torch.func."""

import copy
import io
import pickle

import torch
from hypothesis import assume
from hypothesis import strategies as st

from pyro_artransform.testing import redraw
from tests.attack.effort import attack
from tests.attack.flows import flows, inputs, make_input
from tests.attack.test_transforms import MOST_STRETCH, close, jacobian, stretch


def values(flow, x):
    """All that a flow says of x, both ways."""
    with torch.no_grad():
        return [*flow.call_and_ladj(x), *flow.inv.call_and_ladj(x)]


def same(one, other):
    return all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True) for a, b in zip(one, other)
    )


def edit(flow, how):
    """Changes every parameter by some way of writing to it."""
    parameters = list(flow.parameters())
    if how == "adam":
        for p in parameters:
            p.grad = torch.ones_like(p)
        torch.optim.Adam(parameters, lr=0.05).step()
        return
    for p in parameters:
        with torch.no_grad():
            if how == "data":
                p.data.add_(0.05)
            elif how == "numpy":
                p.detach().numpy()[...] += 0.05
            elif how == "swap":
                p.data = p.data + 0.05
            else:
                p.add_(0.05)


EDITS = ("adam", "data", "numpy", "swap", "in place")


@attack(
    "transforms", case=flows(), spec=inputs((1.0,)), how=st.sampled_from(EDITS), graph=st.booleans()
)
def test_values_follow_the_parameters(case, spec, how, graph):
    """Whatever was computed before an edit, the values after it are those of a fresh copy."""
    flow, x = case.flow, make_input(spec, case.dim)
    inverse = flow.inv
    with torch.set_grad_enabled(graph):
        y, back = flow(x), inverse(x)
    edit(flow, how)
    fresh = copy.deepcopy(flow)
    expected = values(fresh, x.clone())
    assert same(values(flow, x), expected)
    assert same(values(inverse.inv, x), expected)
    with torch.no_grad():
        for one, value in ((flow, y), (inverse, back)):
            anew = (fresh if one is flow else fresh.inv).log_abs_det_jacobian(
                x.clone(), value.clone()
            )
            assert close(one.log_abs_det_jacobian(x, value), anew, 1e-12)


@attack("transforms", case=flows(), spec=inputs((1.0,)), number=st.integers(0, 99))
def test_copies_are_equal_and_apart(case, spec, number):
    flow, x = case.flow, make_input(spec, case.dim)
    y, ladj = flow.call_and_ladj(x)
    if y.requires_grad and y.numel():
        (y.sum() + ladj.sum()).backward()
    expected = values(flow, x)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    restored = redraw(copy.deepcopy(flow), 1.0, number)
    restored.load_state_dict(torch.load(file), strict=True)
    copies = [copy.deepcopy(flow), copy.deepcopy(flow.inv).inv, restored]
    if "#" in repr(case) and not _holds_a_function(flow):
        copies += [pickle.loads(pickle.dumps(flow)), pickle.loads(pickle.dumps(flow.inv)).inv]
    for twin in copies:
        assert same(values(twin, x), expected)
        redraw(twin, 1.0, number)
        assert same(values(flow, x), expected)


def _holds_a_function(flow):
    return any(
        not isinstance(getattr(m, "nonlinearity", torch.nn.ELU()), torch.nn.Module)
        for m in flow.modules()
    )


@attack("torch.func", case=flows(large=(), max_layers=2), number=st.integers(0, 99))
def test_function_transforms(case, number):
    """vmap, jacrev, jacfwd and hessian give what plain evaluation and reverse mode give."""
    flow, x = case.flow, make_input(((3,), 1.0, number), case.dim)
    for one in (flow, flow.inv):
        with torch.no_grad():
            y, ladj = one.call_and_ladj(x)
        assume(y.isfinite().all() and (stretch(one, x) < MOST_STRETCH).all())
        mapped, mapped_ladj = torch.func.vmap(one.call_and_ladj)(x)
        assert close(mapped, y, 1e-8)
        assert close(mapped_ladj, ladj, 1e-8)
        expected = jacobian(one, x)
        size = 1 + expected.abs().max()
        by_reverse = torch.func.vmap(torch.func.jacrev(one))(x)
        assert ((by_reverse - expected).abs() <= 1e-7 * size).all()
        by_forward = torch.func.vmap(torch.func.jacfwd(one))(x)
        assert ((by_forward - expected).abs() <= 1e-7 * size).all()


@attack(
    "torch.func",
    few=3,
    case=flows(large=(), max_layers=2, gains=(0.3, 1.0)),
    number=st.integers(0, 99),
)
def test_hessians(case, number):
    """Those of the log-density, against differences of its gradient."""
    flow, x = case.flow, make_input(((), 1.0, number), case.dim)

    def log_prob(v):
        z, ladj = flow.inv.call_and_ladj(v)
        return ladj - 0.5 * z.square().sum()

    hessian = torch.func.hessian(log_prob)(x)
    gradient = torch.func.grad(log_prob)
    assume(hessian.isfinite().all() and hessian.abs().max() < 1e4)
    if any(word in repr(case) for word in ("ReLU", "Quadratic")):
        return  # their second derivatives jump
    step = 1e-5
    for k in range(case.dim):
        e = step * torch.eye(case.dim)[k]
        found = (gradient(x + e) - gradient(x - e)) / (2 * step)
        assert torch.allclose(found, hessian[:, k], rtol=1e-3, atol=1e-3), (found, hessian[:, k])
