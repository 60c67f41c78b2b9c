# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a univariate family, as assertions."""

import copy
import math
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from ..univariate import Univariate
from .conditioner import BATCH_SHAPES, DTYPES, default_dtype

WAYS, PARTS = ("map", "inverse"), ("value", "log-derivative")
COUNT = 6  # parameters that are tried at once


def check_univariate(univariate: Univariate, *, dtype: torch.dtype = torch.float64) -> None:
    """Checks the contracts of a univariate family.

    ``forward`` returns an elementwise bijection; zero parameters are the identity; the map is strictly
    increasing, onto the real line, its inverse and both log-determinants are right, by whichever method;
    gradients pass ``gradcheck`` in both directions, and at large parameters they stay finite and
    log-slopes below 10; each row and coordinate is transformed by its own parameters alone; shapes
    broadcast; dtypes follow the input under either default dtype; and a NaN stays one. What the family
    itself raises is not caught.

    :param univariate: the family, which is copied. The global random state stays as it is.
    :param dtype: the dtype for the checks of values; float32 has wider tolerances.
    :raises AssertionError: that says which contract broke, and for which input.
    """
    check = _Check(univariate, dtype)
    check.interface()
    check.identity()
    for batch in BATCH_SHAPES:
        check.shapes((*batch, 5), (*batch, 5))
        check.shapes((5,), (*batch, 5))
    for gain in (1.0, 4.0):
        transform = check.family(check.params(COUNT, gain=gain))
        check.increasing(transform)
        check.log_derivative(transform)
        check.round_trip(transform)
        check.onto(transform)
    for default, input_dtype in product(DTYPES, DTYPES):
        with default_dtype(default):
            check.dtypes(input_dtype)
    check.each_alone()
    for gain in (10.0, 100.0):
        check.large_params(gain)
    for way, part in product(WAYS, PARTS):
        _Check(univariate, torch.float64).gradient(way, part)
    check.not_a_number()


class _Check:
    """A family under check, and the parameters that are tried."""

    def __init__(self, family: Univariate, dtype: torch.dtype) -> None:
        self.who = type(family).__name__
        self.family = copy.deepcopy(family).to(dtype)
        self.dtype = dtype
        self.tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        self.generator = torch.Generator().manual_seed(0)

    def require(self, holds: Tensor | bool, contract: str, **values: Tensor) -> None:
        """Fails with the first input for which the contract does not hold, in words."""
        bad = ~torch.as_tensor(holds)
        if not bad.any():
            return
        where = tuple(bad.nonzero()[0].tolist())
        entries = {name: v.detach().broadcast_to(bad.shape)[where] for name, v in values.items()}
        shown = ", ".join(f"{name} = {entry.item():.9g}" for name, entry in entries.items())
        at = f" for {shown}" if shown else ""
        raise AssertionError(f"{self.who}: {contract} (contract broken{at}; entry {where})")

    def params(self, *shape: int, gain: float = 1.0) -> Tensor:
        return gain * self.normal(*shape, self.family.num_params)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device="cpu")

    def grid(self, low: float, high: float, count: int, columns: int = 1) -> Tensor:
        """Points of shape ``(count, columns)``, with equal columns."""
        points = torch.linspace(low, high, count, dtype=self.dtype, device="cpu")
        return points.unsqueeze(-1).repeat(1, columns)

    def interface(self) -> None:
        count = self.family.num_params
        ok = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        self.require(ok, f"num_params must be a positive int, got {count!r}")
        transform = self.family(self.params(2))
        message = f"forward(params) must return a torch Transform, got {type(transform).__name__}"
        self.require(isinstance(transform, Transform), message)
        ok = transform.domain.event_dim == 0 == transform.codomain.event_dim
        self.require(ok, "the transform must be elementwise (event_dim 0)")
        self.require(bool(transform.bijective), "the transform must say bijective = True")

    def identity(self) -> None:
        points = (0.0, 1e-8, 1e-6, 1e-2, 1.0, 3.0, 5.0, 30.0, 1e2)
        x = torch.cat([sign * self.grid(p, p, 1) for p, sign in product(points, (1, -1))])
        y, ladj = _values(self.family(0 * self.params(1)), x)
        limit = 20 * torch.finfo(self.dtype).eps
        ok = (y - x).abs() <= limit * (1 + x.abs())
        self.require(ok, "zero params must be the identity", x=x, y=y)
        wanted = "zero params must have log-determinant zero"
        self.require(ladj.abs() <= limit, wanted, x=x, ladj=ladj)

    def increasing(self, transform: Any) -> None:
        for width in (1e3, 10.0):
            x = self.grid(-width, width, 2001)
            y = transform(x)
            ends = {"x": x[:-1], "next_x": x[1:], "y": y[:-1], "next_y": y[1:]}
            self.require(y[1:] > y[:-1], "the map must be strictly increasing", **ends)

    def log_derivative(self, transform: Any) -> None:
        x = self.grid(-12, 12, 199, COUNT).requires_grad_()
        y, ladj = _values(transform, x)
        expected = torch.autograd.grad(y.sum(), x)[0].log()
        ok = (ladj - expected).abs() <= self.tolerance * 10 * (1 + expected.abs())
        wanted = "the log-determinant must be the logarithm of the derivative"
        self.require(ok, wanted, x=x, ladj=ladj, expected=expected)
        self.agrees(transform, "call_and_ladj", x, y, ladj)

    def agrees(self, transform: Any, method: str, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        """A method that returns both, where there is one, must give y and its log-derivative at x."""
        if not hasattr(transform, method):
            return
        found, expected = torch.stack(getattr(transform, method)(x)), torch.stack([y, ladj])
        ok = ((found - expected).abs() <= 10 * self.tolerance * (1 + expected.abs())).all(0)
        values = {"at": x, "value": found[0], "expected_value": y, "ladj": found[1]}
        message = f"{method} must agree with the methods of torch, such as log_abs_det_jacobian"
        self.require(ok, message, **values, expected_ladj=ladj)

    def round_trip(self, transform: Any) -> None:
        x = self.grid(-30, 30, 301, COUNT)
        y, ladj = _values(transform, x)
        back = transform.inv(y)
        # where the map is flat, round-off in y is more round-off in x, whatever the inverse does
        limit = self.tolerance * (1 + x.abs()) * (-ladj).exp().clamp_min(1.0)
        message = "the inverse must undo the map"
        self.require((back - x).abs() <= limit, message, x=x, y=y, inverse=back)
        back_ladj = transform.inv.log_abs_det_jacobian(y, back)
        ok = (ladj + back_ladj).abs() <= 1e3 * self.tolerance * (1 + ladj.abs())
        message = "the inverse's log-determinant must be minus that of the map"
        self.require(ok, message, x=x, ladj=ladj, of_inverse=back_ladj)
        self.agrees(transform, "inverse_and_ladj", y, back, back_ladj)

    def onto(self, transform: Any) -> None:
        y = self.grid(-1e3, 1e3, 2, COUNT)
        x = transform.inv(y)
        again = transform(x)
        ok = x.isfinite() & ((again - y).abs() <= self.tolerance * 10 * (1 + y.abs()))
        self.require(ok, "the map must be onto the real line", y=y, inverse=x, again=again)

    def shapes(self, params_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
        params, x = self.params(*params_shape), self.normal(*shape)
        transform = self.family(params)
        y, ladj = _values(transform, x)
        got = [tuple(result.shape) for result in (y, ladj, transform.inv(x))]
        message = f"the call, log-determinant and inverse must have the shape {shape} of x"
        self.require(got == [shape] * 3, f"{message}, got {got}")
        again = self.family(params.mT.contiguous().mT)(x)
        same = torch.isclose(again, y, rtol=self.tolerance, atol=self.tolerance)
        self.require(same, "a transposed view of the same params must give the same result", x=x)

    def dtypes(self, dtype: torch.dtype) -> None:
        transform = copy.deepcopy(self.family).to(dtype)(self.params(3).to(dtype))
        x = self.grid(-2, 2, 3).to(dtype)
        got = [result.dtype for result in (*_values(transform, x), transform.inv(x))]
        wanted = f"the dtype must follow the input, {dtype} (default {torch.get_default_dtype()})"
        self.require(got == [dtype] * 3, f"{wanted}, got {got} of call, log-determinant, inverse")

    def each_alone(self) -> None:
        """One row, or one coordinate, must stay where params and input of all others change."""
        params, other_params = self.params(3, 3), self.params(3, 3, gain=4.0)
        x, other_x = self.normal(2, 3, 3)
        numbers = torch.arange(3, device="cpu").expand(3, 3)
        places = {"rows": numbers.mT, "coordinates": numbers}
        for way, who, number in product(WAYS, places, range(3)):
            same = places[who] == number
            before = self.both(way, params, x)
            mixed = torch.where(same.unsqueeze(-1), params, other_params)
            after = self.both(way, mixed, torch.where(same, x, other_x))
            for part, a, b in zip(PARTS, before, after):
                ok = ~same | torch.isclose(a, b, rtol=self.tolerance, atol=self.tolerance)
                message = f"the {part} of the {way} must not depend on those of other {who}"
                self.require(ok, message, before=a, after=b)

    def both(self, way: str, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value and the log-derivative, by the one method that returns both where there is one."""
        transform: Any = self.family(params) if way == "map" else self.family(params).inv
        both_at_once = hasattr(transform, "call_and_ladj")
        return transform.call_and_ladj(x) if both_at_once else _values(transform, x)

    def large_params(self, gain: float) -> None:
        where = f"at large params (random, times {gain:g})"
        params = self.params(50, gain=gain).requires_grad_()
        x = self.grid(-30, 30, 61, len(params)).requires_grad_()
        transform = self.family(params)
        y, ladj = _values(transform, x)
        ok = y.isfinite() & ladj.isfinite()
        self.require(ok, f"values must be finite {where}", x=x, y=y, ladj=ladj)
        ok = (ladj.abs() <= 10.0) | (x.abs() > 3)  # about 3 is what a layer of a flow should have
        message = f"log-slopes must be bounded, here by 10 for |x| <= 3, {where}"
        self.require(ok, f"{message}: see soft_bound", x=x, ladj=ladj)
        total = y.sum() + ladj.sum() + transform.inv(x).sum()
        for gradient in torch.autograd.grad(total, (params, x)):
            ok = gradient.isfinite()
            self.require(ok, f"gradients must be finite {where}", gradient=gradient)

    def gradient(self, way: str, part: str) -> None:
        def output(params: Tensor, x: Tensor) -> Tensor:
            # gradcheck ignores outputs without a gradient, and so what was detached
            return self.both(way, params, x)[PARTS.index(part)] + 0 * (params.sum() + x.sum())

        params, x = self.params(2).requires_grad_(), self.normal(3, 2).requires_grad_()
        try:
            torch.autograd.gradcheck(output, (params, x))  # which broadcast
        except RuntimeError as error:
            message = f"the gradients of the {part} of the {way} must agree with differences"
            raise AssertionError(f"{self.who}: {message}: {error}") from error

    def not_a_number(self) -> None:
        nan, transform = math.nan * self.normal(1), self.family(self.params(1))
        for way, function in zip(WAYS, (transform, transform.inv)):
            self.require(function(nan).isnan(), f"a NaN must stay one in the {way}")


def _values(transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)
