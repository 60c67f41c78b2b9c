# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Whether values agree up to round-off, and the tolerances for it."""

from collections.abc import Mapping
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


def agree(found: Any, expected: Any, rtol: Any = tolerance, atol: float | None = None) -> bool:
    """Whether tensors, or mappings to them, have the same shapes and values, and NaN in the same places.

    :param rtol: the relative tolerance, or a function of the expected values, by default :func:`tolerance`.
    :param atol: the absolute tolerance, by default the relative one.
    """
    if isinstance(expected, Mapping):
        same_names = found.keys() == expected.keys()
        return same_names and all(agree(found[k], expected[k], rtol, atol) for k in expected)
    rtol = rtol(expected) if callable(rtol) else rtol
    atol = rtol if atol is None else atol
    same_shape = found.shape == expected.shape
    return same_shape and torch.allclose(found, expected, rtol, atol, equal_nan=True)
