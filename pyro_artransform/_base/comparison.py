# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Whether values agree up to round-off, and the tolerances for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: units in the last place by which sums of about a thousand terms may differ if reordered
ROUND_OFF = 1e3


def tolerance(values: Tensor) -> float:
    """Relative and absolute tolerance for the round-off of values, also of ill-conditioned ones."""
    return 1e-4 if values.dtype == torch.float32 else 1e-8


def round_off(values: Tensor) -> float:
    """Relative and absolute tolerance for the round-off of a sum of many terms."""
    return ROUND_OFF * torch.finfo(values.dtype).eps


def of_reordered_sums(expected: Tensor, *nearby: Tensor) -> Tensor:
    """Absolute tolerance, by element, for the round-off of the same sums in another order.

    It is relative to the largest of the element, the median of its column and the maximum of its row, since
    terms of that size may cancel: the gradient of a draw is a sum over data.

    :param nearby: values at arguments that differ by round-off, whose differences are allowed, too.
    """
    eps, size = torch.finfo(expected.dtype).eps, expected.abs().nan_to_num(0.0, 0.0)
    for other in nearby:
        size = torch.maximum(size, ((other - expected).abs() / eps).nan_to_num(0.0, 0.0))
    if size.dim() and size.numel():
        row = size.amax(-1, keepdim=True) if size.dim() > 1 else size
        size = torch.maximum(torch.maximum(size, size.median(0).values), row)
    return 64 * eps * size


def agree(
    found: Any,
    expected: Any,
    rtol: Any = tolerance,
    atol: Any = None,
    nearby: Sequence[Sequence[Tensor]] = (),
) -> bool:
    """Whether tensors, or mappings or sequences of them, have the same shapes, dtypes and values.

    Values may differ by ``atol + rtol |expected|``; infinite ones and NaN have to be at the same places.

    :param rtol: the relative tolerance, or a function of the expected values, by default :func:`tolerance`.
    :param atol: the absolute tolerance, by default the relative one; or a function, such as
        :func:`of_reordered_sums`, of the expected values and those of each sequence of ``nearby``.
    """
    if isinstance(expected, Mapping):
        same_names = found.keys() == expected.keys()
        return same_names and all(agree(found[k], expected[k], rtol, atol) for k in expected)
    if isinstance(expected, Sequence):
        parts = zip(found, expected, *nearby)
        same_number = len(found) == len(expected)
        return same_number and all(agree(f, e, rtol, atol, others) for f, e, *others in parts)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    rtol = rtol(expected) if callable(rtol) else rtol
    atol = atol(expected, *nearby) if callable(atol) else rtol if atol is None else atol
    is_close = (found - expected).abs() <= atol + rtol * expected.abs()
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((is_close & expected.isfinite() | is_same).all())
