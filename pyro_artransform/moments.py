# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The location and the scale of rows of numbers."""

from typing import Any

import torch
from torch import Tensor

from .arguments import to_tensor

# up to so many coordinates, and from so many rows for each on, there are correlations
_MOST_CORRELATED, _ROWS_PER_DIM = 200, 10


def check_rows(name: str, rows: Any) -> Tensor:
    """Rows of finite numbers, shape ``(n, D)``, two at least; without a graph.

    :param name: the name of the argument.
    :param rows: a tensor, array or list.
    :raises ValueError: if it is none.
    """
    rows = to_tensor(name, rows, torch.empty(0, device="cpu", dtype=torch.get_default_dtype()))
    if rows.dim() != 2 or len(rows) < 2 or not rows.shape[-1]:
        got = tuple(rows.shape)
        raise ValueError(f"{name}: expected shape (n, D) with two rows or more, got {got}")
    if not rows.isfinite().all():
        count = int((~rows.isfinite()).any(-1).sum())
        raise ValueError(
            f"{name}: expected finite numbers, got others in {count} of {len(rows)} rows"
        )
    return rows.detach()


def location_and_scale(
    name: str, rows: Tensor, full_rank: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The means of rows and the Cholesky factor of their covariance, or their standard deviations.

    Correlations are found in units of each coordinate, in double precision.

    :param name: the name of the rows in an error.
    :param rows: shape ``(n, D)``, as :func:`check_rows` returns them.
    :param full_rank: whether there are correlations; by default up to 200 coordinates, where there are
        ten rows or more for each.
    :return: shapes ``(D,)`` and ``(D, D)``, or ``(D,)`` and ``(D,)``.
    :raises ValueError: if a coordinate is constant, or a linear function of others where there are
        correlations.
    """
    loc, scale = rows.mean(0), rows.std(0)
    constant = (~(scale > 0)).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"{name}: expected coordinates that vary, got constant ones: {constant}")
    if full_rank is None:
        num_rows, dim = rows.shape
        full_rank = dim <= _MOST_CORRELATED and num_rows >= _ROWS_PER_DIM * dim
    if not full_rank:
        return loc, scale
    correlations = ((rows - loc) / scale).double().T.cov().reshape(2 * scale.shape)
    factor, failed = torch.linalg.cholesky_ex(correlations)
    if failed:
        raise ValueError(
            f"{name}: expected coordinates none of which is a linear function of others, got such "
            "ones, which have no density: leave one out"
        )
    return loc, scale[:, None] * factor.to(scale.dtype)
