# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a univariate family, and the transform that every family returns."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints


def values_can_be_read() -> bool:
    """
    Whether a tensor's value may be looked at now.

    It may not while ``torch.jit`` or ``torch.compile`` record, and in a ``torch.func`` transform.
    """
    return not (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def soft_bound(x: Tensor, bound: float) -> Tensor:
    r"""
    Squashes the real line smoothly into ``(-bound, bound)``, with slope 1 at zero.

    .. math:: b(x) = \frac{x}{\sqrt{1 + (x / \text{bound})^2}}

    The gradient decays like ``|x|**-3`` and so is still a positive number where that of a
    hyperbolic tangent has long been rounded to zero.

    :param Tensor x: A tensor of any shape.
    :param float bound: The largest absolute value, positive.
    :return: A tensor of the shape of ``x``; 0 at 0 exactly.
    """
    if not values_can_be_read():
        # The same function, in a form whose automatic derivatives are right to any order.
        return torch.sin(torch.atan(x / bound)) * bound
    return _SoftBound.apply(x, bound) if torch.is_grad_enabled() else _quotient(x, bound)


def _quotient(x: Tensor, bound: float) -> Tensor:
    large = torch.finfo(x.dtype).max ** 0.4
    x = x.clamp(-large, large)  # the square must not overflow
    # numbers as arguments of a kernel are cheaper than as operands, which become tensors first
    return torch.addcmul(x.new_ones(()), x, x, value=bound**-2).rsqrt_().mul_(x)


class _SoftBound(torch.autograd.Function):
    """
    The quotient with its derivative in closed form.

    The automatic derivative of the quotient is a difference of nearly equal numbers: wrong by up
    to 200 % in float32 for ``|x|`` up to 1e4 and bound 3, and zero further out. The sine of the arc
    tangent has a good one, but takes eight times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return _quotient(x, bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        large = torch.finfo(x.dtype).max ** 0.3
        slope = torch.rsqrt(1 + (x.clamp(-large, large) / ctx.bound) ** 2)
        return gradient * slope**3, None


def broadcast_error(names: str, shapes: list[torch.Size]) -> ValueError:
    """
    The error for parameters whose shapes do not go together.

    :param str names: The names of the parameters, in words.
    :param shapes: Their shapes.
    """
    got = ", ".join(str(tuple(shape)) for shape in shapes)
    return ValueError(f"expected {names} of shapes that broadcast to each other, got {got}")


def check_broadcast(names: str, *tensors: Tensor) -> None:
    """
    Checks that parameters broadcast to each other.

    :param str names: The names of the parameters, in words.
    :param tensors: The parameters.
    :raises ValueError: If they do not.
    """
    # While torch.jit traces, sizes are tensors, and comparing them would be a warning.
    if torch.jit.is_tracing():
        return
    shapes = [tensor.shape for tensor in tensors]
    if any(shape != shapes[0] for shape in shapes[1:]):
        try:
            torch.broadcast_shapes(*shapes)
        except RuntimeError:
            raise broadcast_error(names, shapes) from None


def positive(name: str, value: float) -> float:
    """
    Checks an argument that has to be a positive, finite number.

    :param str name: The name of the argument.
    :param float value: Its value.
    :raises ValueError: If it is not.
    """
    # Comparisons only: torch.compile may make this number a symbol.
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"expected {name} to be a positive finite number, got {value!r}")
    return float(value)


def at_least(name: str, value: int, least: int) -> int:
    """
    Checks an argument that has to be an integer that is not too small.

    :param str name: The name of the argument.
    :param int value: Its value.
    :param int least: The smallest value allowed.
    :raises ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected {name} to be an integer of at least {least}, got {value!r}")
    return value


def split_params(params: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """
    Splits the last dimension of the parameters of a family.

    :param Tensor params: Of shape ``(*, D, P)``.
    :param sizes: Sizes that add up to ``P``.
    :return: Views of shapes ``(*, D, size)``.
    """
    if torch.jit.is_tracing() or params.dim() < 2:
        # TorchScript cannot differentiate a split.
        ends = list(itertools.accumulate(sizes))
        return [params[..., end - size : end] for size, end in zip(sizes, ends, strict=True)]
    # The gradient of a split is one concatenation; that of n slices is n tensors of zeros as large
    # as params. Along the next-to-last dimension it gets the layout that conditioners produce.
    parts = params.transpose(-1, -2).split(list(sizes), -2)
    return [part.transpose(-1, -2) for part in parts]


def unbind_params(params: Tensor) -> Sequence[Tensor]:
    """
    The parameters of a family, one by one.

    :param Tensor params: Of shape ``(*, D, P)``.
    :return: P views of shape ``(*, D)``.
    """
    if torch.jit.is_tracing() or params.dim() < 2:
        return [params[..., k] for k in range(params.shape[-1])]
    return params.transpose(-1, -2).unbind(-2)


class ElementwiseTransform(Transform):
    """
    An increasing bijection of the real line, applied to each element.

    A subclass says how to compute a value together with the logarithm of its derivative, in both
    directions: :meth:`call_and_ladj` and :meth:`inverse_and_ladj`. The rest follows. Nothing is
    remembered between calls, so nothing can be out of date.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        The value and the logarithm of its derivative.

        :param Tensor x: Of shape ``(*, D)``.
        :return: ``y`` and ``log(dy / dx)``, both of shape ``(*, D)``.
        """
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """
        The inverse and the logarithm of its derivative.

        :param Tensor y: Of shape ``(*, D)``.
        :return: ``x`` and ``log(dx / dy)``, both of shape ``(*, D)``.
        """
        raise NotImplementedError

    @property
    def inv(self) -> "ElementwiseTransform":
        """The inverse, which has ``call_and_ladj`` too; ``t.inv.inv is t``."""
        return InverseElementwiseTransform(self)

    def with_cache(self, cache_size: int = 1) -> "ElementwiseTransform":
        """Returns itself: recomputing is cheap, and never out of date."""
        return self

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """
        The logarithm of the derivative at ``x``.

        :param Tensor x: Of shape ``(*, D)``.
        :param Tensor y: The value at ``x``; not needed here.
        :return: Of shape ``(*, D)``.
        """
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]


class InverseElementwiseTransform(ElementwiseTransform):
    """
    An elementwise transform with its two directions exchanged.

    :param ElementwiseTransform base: The transform to invert.
    """

    def __init__(self, base: ElementwiseTransform) -> None:
        super().__init__()
        self.base = base

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InverseElementwiseTransform) and self.base == other.base

    def __repr__(self) -> str:
        return f"{self.base!r}.inv"

    @property
    def inv(self) -> ElementwiseTransform:
        """The transform that this one inverts."""
        return self.base

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.inverse_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.call_and_ladj(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        # Both ends are known, so the root need not be found again.
        return -self.base.log_abs_det_jacobian(y, x)


class Univariate(nn.Module):
    """
    A family of increasing bijections of the real line.

    A subclass sets :attr:`num_params` and implements :meth:`forward`. Contracts (all of them are
    checked by :func:`pyro_artransform.testing.check_univariate`): zero parameters are the
    identity; whatever the parameters, the map is strictly increasing from the real line onto the
    real line, and the logarithm of its derivative is bounded to about 3 in absolute value.
    """

    #: The number of parameters of each coordinate, P.
    num_params: int

    def forward(self, params: Tensor) -> Transform:
        """
        The member of the family that has these parameters.

        :param Tensor params: Unconstrained, of shape ``(*, D, P)``.
        :return: A transform that acts on each element of a tensor of shape ``(*, D)``.
        :raises ValueError: If the last dimension is not ``P``.
        """
        raise NotImplementedError

    def check_params(self, params: Tensor) -> None:
        """
        Checks the shape of the parameters.

        :param Tensor params: Of shape ``(*, D, P)``.
        :raises ValueError: If the last dimension is not ``P``.
        """
        # While torch.jit traces, sizes are tensors, and comparing them would be a warning.
        if torch.jit.is_tracing():
            return
        shape = tuple(params.shape)
        if shape[-1:] != (self.num_params,):
            raise ValueError(
                f"expected params of shape (*, D, {self.num_params}) for "
                f"{type(self).__name__}, got {shape}"
            )
