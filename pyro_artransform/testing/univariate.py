# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a univariate family, as assertions."""

import copy
from itertools import product
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from .._base.comparison import tolerance
from ..flows.transforms.flow_module import call_and_ladj
from ..flows.univariate import Univariate
from .comparison import (
    BATCH_SHAPES,
    DTYPES,
    check_gradient,
    default_dtype,
    equal,
    normal,
    require,
)

PARTS = ("value", "log-derivative")


def check_univariate(univariate: Univariate, *, dtype: torch.dtype = torch.float64) -> None:
    """Checks that a univariate family keeps its contract.

    ``forward`` returns an elementwise bijection; zero parameters give the identity; the map is strictly
    increasing and onto the real line; its inverse and both log-determinants are correct by all methods;
    gradients pass ``gradcheck`` in both directions; at large parameters they stay finite, and log-slopes
    below 10; each row and coordinate depends on its own parameters alone; shapes broadcast; dtypes follow
    the input under either default dtype; and NaN propagates.

    :param univariate: the family, which is copied. Its own exceptions are not caught.
    :param dtype: the dtype for checks of values; float32 has wider tolerances.
    :raises AssertionError: with the broken contract and the input.
    """
    family, who = copy.deepcopy(univariate).to(dtype), type(univariate).__name__
    try:
        _check_interface(family, dtype)
        for default, other, shape in product(DTYPES, DTYPES, BATCH_SHAPES):
            with default_dtype(default):
                params = _params(family, other, *shape, 2)
                _check_dtypes_and_shapes(copy.deepcopy(family).to(other)(params), params)
        _check_identity(family, dtype)
        for gain in (1.0, 4.0):
            transform = family(gain * _params(family, dtype, 6))
            _check_bijection(transform, _grid(5.3, dtype, 6).sinh() * 10)
        for gain in (10.0, 100.0):
            _check_large(family, gain * _params(family, dtype, 50), f"random, times {gain:g}")
        for way in ("map", "inverse"):
            _check_independence(family, dtype, way)
            _check_gradients(copy.deepcopy(family).double(), way)
    except AssertionError as error:
        raise AssertionError(f"{who}: {error}") from error


def _params(family: Univariate, dtype: torch.dtype, *shape: int) -> Tensor:
    return normal((*shape, family.num_params), dtype)


def _grid(width: float, dtype: torch.dtype, columns: int) -> Tensor:
    points = torch.linspace(-width, width, 1001, dtype=dtype, device="cpu")
    return points.unsqueeze(-1).repeat(1, columns)


def _values(family: Univariate, way: str, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    transform = family(params)
    return call_and_ladj(transform if way == "map" else transform.inv, x)


def _check_interface(family: Univariate, dtype: torch.dtype) -> None:
    count = family.num_params
    is_count = type(count) is int and count >= 1
    assert is_count, f"num_params must be a positive int, got {count!r}"
    transform = family(_params(family, dtype, 2))
    got = f"forward(params) must return a torch Transform, got {type(transform).__name__}"
    assert isinstance(transform, Transform), got
    dims = transform.domain.event_dim, transform.codomain.event_dim
    assert dims == (0, 0), f"the transform must be elementwise (event_dim 0), got {dims}"
    assert transform.bijective, "the transform must have bijective = True"


def _check_identity(family: Univariate, dtype: torch.dtype) -> None:
    sizes = torch.tensor([0, 1e-8, 1e-6, 1e-2, 1, 3, 5, 30, 1e2], dtype=dtype, device="cpu")
    x, limit = torch.cat([sizes, -sizes]).unsqueeze(-1), 20 * torch.finfo(dtype).eps
    y, ladj = _values(family, "map", 0 * _params(family, dtype, 1), x)
    equal(y, x, "zero params must be the identity", limit, x=x)
    equal(ladj, 0 * x, "zero params must have log-determinant zero", limit, x=x)


def _check_dtypes_and_shapes(transform: Any, params: Tensor) -> None:
    for more in ((), (5,)):
        x = normal((*more, *params.shape[:-1]), params.dtype)
        y = transform(x)
        results = y, transform.log_abs_det_jacobian(x, y), transform.inv(x)
        dtypes, shapes = [r.dtype for r in results], [tuple(r.shape) for r in results]
        wanted = f"the dtype must follow the input, {x.dtype} (default {torch.get_default_dtype()})"
        assert dtypes == [x.dtype] * 3, f"{wanted}, got {dtypes} of call, log-determinant, inverse"
        wanted = f"call, log-determinant and inverse must have the shape {tuple(x.shape)} of x"
        assert shapes == [x.shape] * 3, f"{wanted}, got {shapes}"


def _check_bijection(transform: Any, x: Tensor) -> None:
    round_off, y = tolerance(x), transform(x.requires_grad_())
    ends = {"x": x[:-1], "next_x": x[1:], "y": y[:-1], "next_y": y[1:]}
    require(y[1:] > y[:-1], "the map must be strictly increasing", **ends)
    ladj, slope = transform.log_abs_det_jacobian(x, y), torch.autograd.grad(y.sum(), x)[0]
    wanted = "the log-determinant must be the logarithm of the derivative"
    equal(ladj, slope.log(), wanted, 10 * round_off, x=x)
    # where the map is flat, the inverse amplifies round-off in y
    back, flat = transform.inv(y), (-ladj).exp().clamp_min(1.0)
    equal(back, x, "the inverse must undo the map", round_off * flat, x=x, y=y)
    back_ladj = transform.inv.log_abs_det_jacobian(y, back)
    wanted = "the inverse's log-determinant must be minus that of the map"
    equal(back_ladj, -ladj, wanted, 1e3 * round_off, x=x)
    far = transform.inv(x)
    again = transform(far.where(far.isfinite(), nan))
    equal(again, x, "the map must be onto the real line", 10 * round_off, inverse=far)
    for way, function in {"map": transform, "inverse": transform.inv}.items():
        require(function(nan * x).isnan(), f"a NaN must remain NaN in the {way}", x=nan * x)
    both = {"call_and_ladj": (x, y, ladj), "inverse_and_ladj": (y, back, back_ladj)}
    for method, (argument, *expected) in both.items():
        wanted = f"{method} must agree with the methods of torch, such as log_abs_det_jacobian"
        found = getattr(transform, method)(argument) if hasattr(transform, method) else ()
        for one, other in zip(found, expected):
            equal(one, other, wanted, 10 * round_off, argument=argument)


def _check_independence(family: Univariate, dtype: torch.dtype, way: str) -> None:
    """Compares rows or coordinates alone with the same among others with large params."""
    params, x = 4 * _params(family, dtype, 3, 3), normal((3, 3), dtype, seed=1)
    for dim, others in enumerate(("rows", "coordinates")):
        alone = [_values(family, way, *pair) for pair in zip(params.split(1, dim), x.split(1, dim))]
        for part, among, own in zip(PARTS, _values(family, way, params, x), zip(*alone)):
            wanted = f"the {part} of the {way} must not depend on those of other {others}"
            equal(among, torch.cat(own, dim), wanted, tolerance(x), x=x)


def _check_large(family: Univariate, params: Tensor, how: str) -> None:
    x = _grid(30, params.dtype, len(params)).requires_grad_()
    params.requires_grad_()
    (y, ladj), where = _values(family, "map", params, x), f"at large params ({how})"
    finite = y.isfinite() & ladj.isfinite()
    require(finite, f"values must be finite {where}", x=x, y=y, ladj=ladj)
    bounded = (ladj.abs() <= 10.0) | (x.abs() > 3)  # layers of a flow should have about 3
    wanted = f"log-slopes must be bounded, here by 10 for |x| <= 3, {where}: see soft_bound"
    require(bounded, wanted, x=x, ladj=ladj)
    total = y.sum() + ladj.sum() + family(params).inv(x).sum()
    for slope in torch.autograd.grad(total, (params, x)):
        require(slope.isfinite(), f"gradients must be finite {where}", gradient=slope)


def _check_gradients(family: Univariate, way: str) -> None:
    leaves = _params(family, torch.float64, 2).requires_grad_(), normal((3, 2)).requires_grad_()
    for k, part in enumerate(PARTS):
        wanted = f"the gradients of the {part} of the {way} must agree with differences"
        check_gradient(lambda *at, k=k: _values(family, way, *at)[k], leaves, wanted)
