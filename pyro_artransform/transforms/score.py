# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Scores of flows at their own draws: the gradient of the log-density with its parameters held fixed.

With :math:`y = T(x)` and :math:`J = \partial y / \partial x`, the score of y's density solves

.. math::

    J^\top u = \nabla_x \log p(x) - \nabla_x \log |\det J|

For an autoregressive layer :math:`J = \mathrm{diag}(d) + N` with N strictly triangular. The solution is
the limit of :math:`u \leftarrow (r - N^\top u) / d`, a vector-Jacobian product each through the graph that
drew y, exact after as many as the graph is deep.
"""

from typing import Any

import torch
from torch import Tensor

from .evaluate import call_and_ladj, inverse_at

# of the largest number of a row: a gradient estimate has far more noise than this
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}


def call_and_score(transform: Any, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, the log-determinant and the score of y, by the transform's own way where it has one.

    :param transform: any bijective torch transform.
    :param x: its argument.
    :param score: the score of the density of x, of its shape.
    """
    own = getattr(transform, "call_and_score", None)
    if own is not None:
        return own(x, score)
    y, ladj = call_and_ladj(transform, x)
    return y, ladj, score_by_inverse(transform, x, y, score)


@torch.enable_grad()
def score_by_inverse(transform: Any, x: Tensor, y: Tensor, score: Tensor) -> Tensor:
    """The score of y, by differentiating the inverse.

    :param transform: any bijective torch transform.
    :param x: its argument.
    :param y: its value.
    :param score: the score of the density of x, of its shape.
    :return: the shape of y.
    """
    point = y.detach().requires_grad_()
    back, ladj = inverse_at(transform, x.detach(), point)
    total = (back * score.detach()).sum() + ladj.sum()
    found: Tensor = torch.autograd.grad(total, point)[0]
    return found


def score_by_products(x: Tensor, y: Tensor, ladj: Tensor, score: Tensor, depth: int) -> Tensor:
    """The score of y, by vector-Jacobian products through the graph between x and y.

    :param x: shape ``(*, D)``; y and ladj are functions of it.
    :param y: elementwise in x but for the conditioner, shape ``(*, D)``.
    :param ladj: the log-determinant by coordinate, shape ``(*, D)``.
    :param score: the score of the density of x, shape ``(*, D)``.
    :param depth: after so many products the solution is exact.
    :return: shape ``(*, D)``.
    """
    ones = torch.ones_like(ladj)
    scale = ladj.detach().exp()
    by_volume = torch.autograd.grad(ladj, x, ones, retain_graph=True, allow_unused=True)[0]
    rest = score if by_volume is None else score - by_volume
    u = rest / scale
    for _ in range(depth - 1):
        (pulled,) = torch.autograd.grad(y, x, u, retain_graph=True)
        previous, u = u, u + (rest - pulled) / scale
        if _settled(u, previous):
            break
    return u


def _settled(new: Tensor, old: Tensor) -> bool:
    change, size = (new - old).abs().amax(-1), new.abs().amax(-1)
    return bool((change <= _TOLERANCE.get(new.dtype, 1e-3) * size).all())
