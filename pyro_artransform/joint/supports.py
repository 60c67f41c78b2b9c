# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Supports of distributions: their bounds, whether two are the same, and how they read."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor


def map_bounds(
    support: constraints.Constraint, fn: Callable[[Tensor], Tensor]
) -> constraints.Constraint:
    """A copy of a support whose bounds are changed.

    :param support: a support.
    :param fn: applied to each tensor in it.
    """
    changed = copy.copy(support)
    for key, value in vars(support).items():
        if isinstance(value, Tensor):
            setattr(changed, key, fn(value))
        elif isinstance(value, constraints.Constraint):
            setattr(changed, key, map_bounds(value, fn))
    return changed


def same_support(a: constraints.Constraint, b: constraints.Constraint) -> bool:
    """Whether two supports are of one kind and have equal bounds."""
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(_same(value, vars(b)[key]) for key, value in vars(a).items())


def describe_support(support: constraints.Constraint) -> str:
    """A support in words, with its bounds."""
    bounds = (f"{key}={_describe(value)}" for key, value in vars(support).items())
    return f"{type(support).__name__.lstrip('_')}({', '.join(bounds)})"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, constraints.Constraint):
        return same_support(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    same = a == b
    return bool(same.all() if isinstance(same, Tensor) else same)


def _describe(value: Any) -> str:
    if isinstance(value, constraints.Constraint):
        return describe_support(value)
    return str(value.tolist() if isinstance(value, Tensor) else value)
