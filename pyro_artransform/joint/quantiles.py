# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Quantiles of draws, however many numbers there are."""

from collections.abc import Sequence

import torch
from torch import Tensor

# torch.quantile takes no more than 2**24 numbers at a time
_QUANTILE_NUMBERS = 2**23


def check_levels(name: str, levels: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Quantile levels as a vector.

    :param name: the name of the argument.
    :param levels: numbers between 0 and 1.
    :param like: a tensor of the dtype (float32 in place of a shorter one) and device wanted.
    :raises ValueError: if one of them is not between 0 and 1, or there is none.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    vector = torch.as_tensor(levels, dtype=dtype, device=like.device).reshape(-1)
    if not len(vector) or not ((vector >= 0) & (vector <= 1)).all():
        raise ValueError(f"{name}: expected numbers between 0 and 1, got {vector.tolist()}")
    return vector


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """The quantiles ``(q, *)`` of each coordinate of draws ``(n, *)``, in their dtype."""
    columns = draws.reshape(len(draws), -1).split(max(1, _QUANTILE_NUMBERS // len(draws)), dim=1)
    # torch has no quantiles of half precision
    dtype = torch.promote_types(draws.dtype, torch.float32)
    levels = levels.to(dtype)
    found = torch.cat([torch.quantile(part.to(dtype), levels, dim=0) for part in columns], dim=1)
    return found.reshape(levels.shape + draws.shape[1:]).to(draws.dtype)
