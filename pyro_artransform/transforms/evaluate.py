# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Values and log-determinants of any torch transform, from one evaluation."""

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from ..univariate.base import ElementwiseTransform, values_can_be_read


def as_transform(value: object) -> Transform:
    """What a meta returned, after a check that it is a bijection of real vectors.

    :param value: anything.
    :raises TypeError: if it is no torch transform.
    :raises ValueError: if it acts on something else than real numbers or vectors.
    """
    if isinstance(value, ElementwiseTransform):
        return value
    if not isinstance(value, Transform):
        raise TypeError(
            f"meta: expected a function that returns a torch Transform, got one that returns a "
            f"{type(value).__name__}. For a network that returns parameters, "
            "ConditionedUnivariate(conditioner, family) is the meta"
        )
    for side in (value.domain, value.codomain):
        if getattr(side, "base_constraint", side) is not constraints.real or side.event_dim > 1:
            raise ValueError(
                f"meta: expected a transform of real numbers or vectors, got {type(value).__name__} "
                f"from {value.domain} to {value.codomain}"
            )
    return value


def call_and_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` and ``log |dy/dx|``, by the transform's own ``call_and_ladj`` where it has one.

    :param transform: any torch transform.
    :param x: its argument.
    :return: the value and the log-determinant over the transform's own event dimensions.
    """
    own = getattr(transform, "call_and_ladj", None)
    if own is not None:
        return own(x)
    _forget(transform)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def inverse_and_ladj(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``log |dx/dy|``, by the transform's own ``inverse_and_ladj`` where it has one.

    :param transform: any bijective torch transform.
    :param y: a value.
    :return: the argument and the log-determinant of the inverse.
    """
    own = getattr(transform, "inverse_and_ladj", None)
    if own is not None:
        return own(y)
    _forget(transform)
    x = transform.inv(y)
    return x, -transform.log_abs_det_jacobian(x, y)


def inverse_at(transform: Transform, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`inverse_and_ladj`, where x is known, if the transform can make use of it.

    :param transform: any bijective torch transform.
    :param x: the inverse of y.
    :param y: a value.
    """
    own = getattr(transform, "inverse_at", None)
    return inverse_and_ladj(transform, y) if own is None else own(x, y)


def sum_ladj(ladj: Tensor, value: Tensor, event_dim: int, total_event_dim: int) -> Tensor:
    """Sums a log-determinant over the event dimensions that a transform did not sum itself.

    :param ladj: of any shape that broadcasts to the value's without its last ``event_dim`` dimensions.
    :param value: the transform's value, at its full (broadcast) shape.
    :param event_dim: the transform's own number of event dimensions.
    :param total_event_dim: the number of event dimensions wanted.
    :return: shape ``value.shape[:-total_event_dim]``.
    """
    shape = value.shape[: value.dim() - event_dim]
    missing = total_event_dim - event_dim
    # while torch.jit traces, sizes are tensors and cannot be compared
    if torch.jit.is_tracing() or ladj.shape != shape:
        ladj = ladj.expand(shape)
    return ladj.sum(tuple(range(-missing, 0))) if missing > 0 else ladj


def values_are_readable(*tensors: Tensor) -> bool:
    """Whether Python may look at values here.

    It may not while ``torch.jit`` or ``torch.compile`` trace, inside a ``torch.func`` transform, and on the
    meta device.
    """
    return values_can_be_read() and all(tensor.device.type != "meta" for tensor in tensors)


def _forget(transform: Transform) -> None:
    # torch's cache compares identities only: after an optimiser step it would answer with old values
    if getattr(transform, "_cache_size", 0):
        transform._cached_x_y = None, None
