# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Values and log-determinants of any torch transform, from one evaluation where it offers that."""

import torch
from torch import Tensor
from torch.distributions import Transform

from ..univariate.base import ElementwiseTransform
from .flow_module import FlowModule


def call_and_ladj(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` and ``log |dy/dx|`` over the event dimensions of any torch transform."""
    if isinstance(transform, (ElementwiseTransform, FlowModule)):
        y, ladj = transform.call_and_ladj(x)
    else:
        # torch's cache compares identities only: after an optimizer step it would answer with old values
        transform.clear_cache()  # type: ignore[attr-defined]  # which Pyro adds
        y = transform(x)
        ladj = transform.log_abs_det_jacobian(x, y)
    return y, expand_ladj(ladj, y, transform.codomain.event_dim)


def inverse_and_ladj(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``log |dx/dy|`` over the event dimensions of any bijective torch transform."""
    if isinstance(transform, (ElementwiseTransform, FlowModule)):
        x, ladj = transform.inverse_and_ladj(y)
    else:
        transform.clear_cache()  # type: ignore[attr-defined]  # which Pyro adds
        x = transform.inv(y)
        ladj = -transform.log_abs_det_jacobian(x, y)
    return x, expand_ladj(ladj, x, transform.domain.event_dim)


def expand_ladj(ladj: Tensor, value: Tensor, event_dim: int) -> Tensor:
    """A log-determinant over ``event_dim`` dimensions with the batch shape of a value."""
    shape = value.shape[: value.dim() - event_dim]
    # while torch.jit traces, sizes are tensors and cannot be compared
    return ladj.expand(shape) if torch.jit.is_tracing() or ladj.shape != shape else ladj
