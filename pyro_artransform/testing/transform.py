# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a transform, as assertions."""

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor

from .conditioner import BATCH_SHAPES, DTYPES, default_dtype, normal, redraw


def check_transform(
    make: Callable[[], TransformModule], input_dim: int, *, gain: float = 1.0, atol: float = 1e-9
) -> None:
    """Checks that a transform of real vectors keeps its contract, in both directions.

    The log-determinant is that of the autograd Jacobian; the inverse undoes the transform, has the opposite
    log-determinant and owns the parameters; gradients are right both ways, in the argument and in the
    parameters; nothing remembered is out of date after parameters changed by any means; copies and
    pickles work and train apart; the dtype follows the input.

    :param make: builds the transform; its parameters are then re-drawn, at PyTorch's scale times ``gain``.
    :param input_dim: the number D of coordinates.
    :param atol: the tolerance of round trips in float64, relative to ``1 + |x|``.
    :raises AssertionError: that says which contract broke, and for which input.
    """
    transform: Any = redraw(make().double(), gain)
    assert isinstance(transform, TransformModule), f"not a TransformModule: {type(transform)}"
    assert transform.event_dim == 1, f"event_dim: expected 1, got {transform.event_dim}"
    for shape in BATCH_SHAPES:
        _check_values(transform, normal((*shape, input_dim)), atol)
    x = normal((3, input_dim), seed=1)
    _check_log_det(transform, x, atol)
    _check_gradients(transform, x)
    _check_gradients(transform.inv, transform(x).detach(), "the inverse's ")
    _check_ownership(transform)
    _check_memory(transform, x, atol)
    _check_copies(transform, x, atol)
    for default, dtype in product(DTYPES, DTYPES):
        with default_dtype(default):
            transform = redraw(make().to(dtype), gain)
            y, ladj = transform.call_and_ladj(normal((3, input_dim), dtype))
            found = {t.dtype for t in (y, ladj, *transform.inv.call_and_ladj(y.detach()))}
            where = f"under the default {default}"
            assert found == {dtype}, f"dtype: expected {dtype} {where}, got {found}"


def _close(a: Tensor, b: Tensor, atol: float) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= atol * (1 + b.abs())).all())


def _check_values(transform: Any, x: Tensor, atol: float) -> None:
    where = f"for x of shape {tuple(x.shape)}"
    y, ladj = transform.call_and_ladj(x)
    for name, found, shape in (("y", y, x.shape), ("log-determinant", ladj, x.shape[:-1])):
        got = f"got {tuple(found.shape)}"
        assert found.shape == shape, f"{name}: expected shape {tuple(shape)} {where}, {got}"
    assert _close(transform(x), y, atol), f"__call__ differs from call_and_ladj {where}"
    fresh = x.clone()
    again = transform.log_abs_det_jacobian(fresh, transform(fresh))
    assert _close(again, ladj, atol), f"log_abs_det_jacobian differs from call_and_ladj {where}"
    back, inverse_ladj = transform.inv.call_and_ladj(y.detach().clone())
    error = ((back - x).abs() / (1 + x.abs())).max().item()
    assert error <= atol, f"inverse: T.inv(T(x)) is off by {error:.2g} {where}"
    assert _close(inverse_ladj, -ladj, atol), f"inv.call_and_ladj: not the opposite of ladj {where}"
    far = transform.inv(x.clone()).detach()
    error = ((transform(far) - x).abs().amax(-1) / (1 + x.abs() + far.abs()).amax(-1)).max().item()
    assert error <= atol, f"inverse: T(T.inv(y)) is off by {error:.2g} of the largest {where}"
    shapes = transform.forward_shape(x.shape), transform.inverse_shape(x.shape)
    assert shapes == (x.shape, x.shape), f"forward_shape and inverse_shape: got {shapes} {where}"


def _check_log_det(transform: Any, x: Tensor, atol: float) -> None:
    ladj = transform.call_and_ladj(x)[1]
    for row, value in zip(x, ladj):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform.call_and_ladj(v)[0], row)
        expected = torch.linalg.slogdet(jacobian)[1]
        wanted = f"that of the autograd Jacobian is {expected.item():.8g} at x = {row.tolist()}"
        assert _close(value, expected, atol), f"log-determinant: {value.item():.8g}, but {wanted}"


def _check_gradients(transform: Any, x: Tensor, whose: str = "") -> None:
    """Along random directions gradients must agree with differences; what was detached has none."""
    x = x.clone().requires_grad_()
    parameters = [p for p in transform.parameters() if p.requires_grad]
    for where, leaves in (("the parameters", parameters), ("x", [x])):
        for k, name in enumerate(("y", "the log-determinant") if leaves else ()):

            def output(*leaves: Tensor, k: int = k) -> Tensor:
                # gradcheck moves them in place, and passes over an output without a gradient
                return transform.call_and_ladj(x)[k] + 0 * sum(leaf.sum() for leaf in leaves)

            try:
                torch.autograd.gradcheck(output, leaves, rtol=1e-5, fast_mode=True)
            except RuntimeError as error:
                differ = " ".join(str(error).splitlines()[:3])  # before whole Jacobians
                raise AssertionError(f"{whose}gradient of {name} in {where}: {differ}") from error


def _check_ownership(transform: Any) -> None:
    count, inverse = len(list(transform.parameters())), transform.inv
    assert len(list(inverse.parameters())) == count, "inv: it does not own the parameters"
    assert inverse.inv is transform, "inv: t.inv.inv is not t"
    assert len({id(p) for p in transform.parameters()}) == count, "a parameter is registered twice"
    cyclic = inverse in list(transform.modules()) and transform in list(inverse.modules())
    assert not cyclic, "inv: the transform and its inverse are submodules of each other"


def _check_memory(transform: Any, x: Tensor, atol: float) -> None:
    """What is remembered must be what recomputing gives, however the parameters were changed."""
    parameters = list(transform.parameters())
    if not parameters:
        return
    for name, grad in product(("data", "detach"), (True, False)):
        with torch.set_grad_enabled(grad):
            y = transform(x)
            with torch.no_grad():
                for p in parameters:
                    (p.data if name == "data" else p.detach()).add_(0.01)
            stale = transform.log_abs_det_jacobian(x, y)
            fresh = transform.log_abs_det_jacobian(x.clone(), y.clone())
            after = f"after p.{name} was edited"
            assert _close(stale, fresh, atol), f"memory: old log-determinant {after}"
            stale, fresh = transform.inv(y), transform.inv(y.detach().clone())
            assert _close(stale, fresh, atol), f"memory: old inverse {after}"
    with torch.no_grad():
        y = transform(x)
    for _ in range(2):
        gradients = []
        for point in (y, y.clone()):
            x = transform.inv(point)
            log_prob = -x.square().sum() - transform.log_abs_det_jacobian(x, point).sum()
            gradients.append(torch.autograd.grad(log_prob, parameters, materialize_grads=True))
        for a, b in zip(*gradients):
            assert _close(a, b, 1e-7), "memory: another gradient for a value made without gradients"


def _check_copies(transform: Any, x: Tensor, atol: float) -> None:
    y = transform(x)
    if y.requires_grad:
        y.sum().backward()
    inverse, expected = transform.inv, transform(x).detach()
    copies = {
        "deepcopy": copy.deepcopy(transform),
        "deepcopy of inv": copy.deepcopy(inverse).inv,
        "pickle": pickle.loads(pickle.dumps(transform)),
        "pickle of inv": pickle.loads(pickle.dumps(inverse)).inv,
    }
    with torch.no_grad():
        for name, twin in copies.items():
            assert _close(twin(x), expected, atol), f"{name}: other values"
            for p in twin.parameters():
                p.add_(1.0)
            assert _close(transform(x), expected, atol), f"{name}: it shares parameters"
        assert _close(transform.with_cache(0)(x), expected, atol), "with_cache: other values"
