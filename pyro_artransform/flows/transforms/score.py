# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The score u at the value of an autoregressive transform, with parameters held fixed.

It solves :math:`J^\top u = r` by substitution, where J is the triangular Jacobian, and r is the score at x
minus the gradient of the log-determinant.
"""

from typing import Any

import torch
from torch import Tensor

from ..univariate import Univariate
from ..univariate.base import Derivatives
from .conditioned import AutoregressiveMeta
from .flow_module import call_and_ladj


def score_by_substitution(
    meta: AutoregressiveMeta, x: Tensor, score: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The value, its log-determinant, and the score at the value; None without a linearization."""
    if meta.depth == 1:
        return _elementwise_score(meta, x, score)
    linearization = meta.linearize(x)
    if linearization is None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    family, params = meta.family, linearization.params
    at = family.derivatives(params, rows) or _derivatives(family, params, rows)
    right = score.reshape(rows.shape)
    if at.ladj_by_x is not None:
        right = right - at.ladj_by_x
    if at.ladj_by_params is not None:
        right = right - linearization.pull_back(at.ladj_by_params)
    # J = diag(slope) (I - N), with N as in solve_adjoint for the slopes inverse_by_params
    u = linearization.solve_adjoint(at.inverse_by_params, right) * (-at.ladj.detach()).exp()
    return at.y.reshape(x.shape), at.ladj.sum(-1).reshape(x.shape[:-1]), u.reshape(x.shape)


def _derivatives(family: Univariate, params: Tensor, x: Tensor) -> Derivatives:
    """The derivatives of any family, by automatic differentiation."""
    with torch.enable_grad():
        # the family gets a view of x, so that derivatives in it exclude the network
        point = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        params = params if params.requires_grad else params.detach().requires_grad_()
        y, ladj = call_and_ladj(family(params), point)
        totals = y.sum(), ladj.sum()  # gradients of others import SymPy, which takes 0.3 s
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    slope, by_params = torch.autograd.grad(totals[0], [point, params], **options)
    inverse = -by_params / slope[..., None]
    if not ladj.requires_grad:  # constant, as for a shift
        return Derivatives(y, ladj, inverse, None, None)
    volume = torch.autograd.grad(totals[1], [point, params], **options)
    return Derivatives(y, ladj, inverse, *volume)


def _elementwise_score(
    meta: AutoregressiveMeta, x: Tensor, score: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`score_by_substitution` for a diagonal J; None if the transform is of vectors."""
    with torch.enable_grad():
        point = x if x.requires_grad else x.detach().requires_grad_()
        y, ladj = call_and_ladj(meta(point), point)
        total = ladj.sum()
    if ladj.shape != x.shape:
        return None
    if ladj.requires_grad:
        options: Any = {"retain_graph": True, "materialize_grads": True}
        (by_volume,) = torch.autograd.grad(total, point, **options)
        score = score - by_volume
    return y, ladj.sum(-1), score / ladj.detach().exp()
