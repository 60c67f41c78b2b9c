# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Values and log-determinants of any torch transform, from one evaluation where it offers that."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Transform


@runtime_checkable
class WithLadj(Protocol):
    """A transform that gives its value and its log-determinant from one evaluation."""

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value at x and its log-determinant."""

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse at y and its log-determinant."""


def call_and_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` and ``log |dy/dx|`` over the event dimensions of any torch transform."""
    if isinstance(transform, WithLadj):
        return transform.call_and_ladj(x)
    _forget(transform)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def inverse_and_ladj(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``log |dx/dy|`` over the event dimensions of any bijective torch transform."""
    if isinstance(transform, WithLadj):
        return transform.inverse_and_ladj(y)
    _forget(transform)
    x = transform.inv(y)
    return x, -transform.log_abs_det_jacobian(x, y)


def sum_ladj(ladj: Tensor, value: Tensor, event_dim: int, total_event_dim: int) -> Tensor:
    """A log-determinant over ``event_dim`` dimensions of a value, expanded and summed over so many in all."""
    shape = value.shape[: value.dim() - event_dim]
    # while torch.jit traces, sizes are tensors and cannot be compared
    if torch.jit.is_tracing() or ladj.shape != shape:
        ladj = ladj.expand(shape)
    missing = total_event_dim - event_dim
    return ladj.sum(tuple(range(-missing, 0))) if missing > 0 else ladj


def _forget(transform: Transform) -> None:
    # torch's cache compares identities only: after an optimizer step it would answer with old values
    if getattr(transform, "_cache_size", 0):
        transform._cached_x_y = None, None
