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

from .comparison import BATCH_SHAPES, DTYPES, check_gradient, default_dtype, equal, normal, redraw


def check_transform(
    make: Callable[[], TransformModule], input_dim: int, *, gain: float = 1.0, atol: float = 1e-9
) -> None:
    """Checks that a transform of real vectors keeps its contract, in both directions.

    The log-determinant agrees with the autograd Jacobian; the inverse undoes the transform, has the opposite
    log-determinant and owns the parameters; gradients in the argument and in the parameters are correct
    both ways; caches are invalidated by any change of parameters; copies and pickles work and train
    independently; the dtype follows the input.

    :param make: builds the transform; its parameters are then redrawn, at PyTorch's scale times ``gain``.
    :param input_dim: the number D of coordinates.
    :param atol: the tolerance of round trips in float64, relative to ``1 + |x|``.
    :raises AssertionError: with the broken contract and the input.
    """
    transform: Any = redraw(make().double(), gain)
    assert isinstance(transform, TransformModule), f"not a TransformModule: {type(transform)}"
    assert transform.event_dim == 1, f"event_dim: expected 1, got {transform.event_dim}"
    for shape in BATCH_SHAPES:
        _check_values(transform, normal((*shape, input_dim)), atol)
    x = normal((3, input_dim), seed=1)
    _check_gradients(transform, x)
    _check_gradients(transform.inv, transform(x).detach(), "the inverse's ")
    _check_module(transform, x, atol)
    for default, dtype in product(DTYPES, DTYPES):
        with default_dtype(default):
            transform = redraw(make().to(dtype), gain)
            y, ladj = transform.call_and_ladj(normal((3, input_dim), dtype))
            found = {t.dtype for t in (y, ladj, *transform.inv.call_and_ladj(y.detach()))}
            assert found == {dtype}, f"dtype: expected {dtype} by default {default}, got {found}"


def _check_values(transform: Any, x: Tensor, atol: float) -> None:
    where, copied = f"for x of shape {tuple(x.shape)}", x.clone()
    y, ladj = transform.call_and_ladj(x)
    shapes = y.shape, transform.forward_shape(x.shape), transform.inverse_shape(x.shape)
    assert shapes == (x.shape,) * 3, f"shape of y, forward_shape, inverse_shape: {shapes} {where}"
    equal(transform(x), y, f"__call__ differs from call_and_ladj {where}", atol)
    again = transform.log_abs_det_jacobian(copied, transform(copied))
    equal(again, ladj, f"log_abs_det_jacobian differs from call_and_ladj {where}", atol)
    rows = x.reshape(-1, x.shape[-1])
    jacobians = [torch.autograd.functional.jacobian(transform, row) for row in rows]
    expected = torch.linalg.slogdet(torch.stack(jacobians))[1].reshape(x.shape[:-1])
    equal(ladj, expected, f"log-determinant: not that of the autograd Jacobian {where}", atol)
    back, inverse_ladj = transform.inv.call_and_ladj(y.detach().clone())
    equal(back, x, f"inverse: T.inv(T(x)) is not x {where}", atol)
    equal(inverse_ladj, -ladj, f"inv.call_and_ladj: not the opposite of ladj {where}", atol)
    far = transform.inv(copied).detach()
    error = ((transform(far) - x).abs().amax(-1) / (1 + x.abs() + far.abs()).amax(-1)).max().item()
    assert error <= atol, f"inverse: T(T.inv(y)) is off by {error:.2g} of the largest {where}"


def _check_gradients(transform: Any, x: Tensor, whose: str = "") -> None:
    """Checks gradients in the argument and in the parameters, which gradcheck perturbs in place."""
    leaves = {"the parameters": [p for p in transform.parameters() if p.requires_grad]}
    leaves["x"] = [x := x.clone().requires_grad_()]
    for (k, name), where in product(enumerate(("y", "the log-determinant")), leaves):
        if leaves[where]:
            contract = f"{whose}gradient of {name} in {where}"
            check_gradient(lambda *_, k=k: transform.call_and_ladj(x)[k], leaves[where], contract)


def _check_module(transform: Any, x: Tensor, atol: float) -> None:
    """Checks that the inverse owns the parameters, that copies are apart, and that caches follow edits."""
    inverse, parameters = transform.inv, list(transform.parameters())
    owned = len(list(inverse.parameters())) == len(parameters)
    assert owned, "inv: it does not own the parameters"
    assert inverse.inv is transform, "inv: t.inv.inv is not t"
    names = [name for name, _ in transform.named_parameters(remove_duplicate=False)]
    assert len(names) == len(parameters), f"parameters: one of {names} is there twice"
    cyclic = inverse in list(transform.modules()) and transform in list(inverse.modules())
    assert not cyclic, "inv: the transform and its inverse are submodules of each other"
    if (y := transform(x)).requires_grad:
        y.sum().backward()
    with torch.no_grad():
        expected = transform(x)
        equal(transform.with_cache(0)(x), expected, "with_cache: different values", atol)
        twins = {"deepcopy": copy.deepcopy(transform)}
        twins["deepcopy of inv"] = copy.deepcopy(inverse).inv
        twins["pickle"] = pickle.loads(pickle.dumps(transform))
        for name, twin in twins.items():
            equal(twin(x), expected, f"{name}: different values", atol)
            for p in twin.parameters():
                p.add_(1.0)
            equal(transform(x), expected, f"{name}: it shares parameters", atol)
        y = transform(x)
        for p in parameters:
            p.data.add_(0.01)
        new_x, new_y = x.clone(), y.clone()
        found, ladj = (transform.log_abs_det_jacobian(*at) for at in ((x, y), (new_x, new_y)))
        equal(found, ladj, "memory: old log-determinant after p.data was edited", atol)
        equal(inverse(y), inverse(new_y), "memory: old inverse after p.data was edited", atol)
