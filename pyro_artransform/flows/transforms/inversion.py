# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Inverses of autoregressive transforms, their gradients, and scores.

The inverse of ``y = meta(x)(x)`` is the fixed point of

.. math:: u(x) = \mathrm{meta}(x)^{-1}(y).

Each pass makes the next level of the graph exact. With :math:`M = \partial u / \partial x`, which is strictly
triangular, the adjoint of the fixed point solves :math:`(I - M^\top) v = g`, and is the limit of
:math:`v \leftarrow g + M^\top v`. Both are exact after as many passes as the depth of the graph.

By blocks of levels of the graph, an exact inverse takes the arithmetic of about one evaluation.

The score u at the value, with parameters held fixed, solves :math:`J^\top u = r` by substitution, where J is
the triangular Jacobian, and r is the score at x minus the gradient of the log-determinant.

**References**

1. Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (Song, Meng, Liao,
   Ermon, 2021), https://arxiv.org/abs/2002.03629
2. Deep Equilibrium Models (Bai, Kolter, Koltun, 2019), https://arxiv.org/abs/1909.01377
"""

from collections.abc import Iterable
from math import nan
from typing import Any

import torch
from torch import Tensor

from ..._base.arguments import values_can_be_read, warn_user
from ..._base.differentiation import has_other_leaves
from ..conditioners import Blocks, Linearization
from ..univariate import Univariate
from ..univariate.base import Derivatives
from .conditioned import AutoregressiveMeta, Meta, check_returned
from .flow_module import call_and_ladj, call_and_ladj_over_vectors

_UNSTRUCTURED = AutoregressiveMeta()  # declares nothing
_MAX_PASSES = 16  # within a block; if more are needed, smaller blocks are cheaper


def invert(meta: Meta, y: Tensor, passes: int | None) -> tuple[Tensor, Tensor]:
    """The inverse and its log-determinant, differentiable in y and all parameters.

    With ``passes``, at most this many fixed-point passes are taken; otherwise the inverse is exact.
    """
    structured = meta if isinstance(meta, AutoregressiveMeta) else _UNSTRUCTURED
    y = structured.expand(y)
    readable = values_can_be_read(y)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not readable):
        blocks = structured.blocks(y, in_place=readable) if passes is None else None
        if not readable and blocks is not None:
            return by_blocks(structured.family, blocks, y, size=1)
        if not readable:  # a fixed number of passes, differentiated by autograd
            x = torch.zeros_like(y)
            for _ in range(min(passes or structured.depth or y.shape[-1], y.shape[-1]) - 1):
                x = meta(x).inv(y)
            return call_and_ladj_over_vectors(meta(x).inv, y)
        if blocks is None:
            x, ladj, point = _by_passes(meta, y.detach(), structured.depth, passes)
        else:
            x, ladj = by_blocks(structured.family, blocks, y.detach())
            point = x
    if not torch.is_grad_enabled():
        return x, ladj
    linearization = None if blocks is None else blocks.linearization()
    if linearization is not None:
        return _with_known_gradient(structured.family, linearization, y, (x, ladj))
    return _with_gradient(meta, point, y, (x, ladj))


def invert_with_score(meta: Meta, y: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The exact inverse, its log-determinant and the score at x; None without a linearization."""
    if not (isinstance(meta, AutoregressiveMeta) and values_can_be_read(y)) or meta.batch_shape:
        return None
    with torch.no_grad():
        blocks = meta.blocks(y, in_place=True)
        if blocks is None:
            return None
        values = by_blocks(meta.family, blocks, y.detach())
        linearization = blocks.linearization()
    if linearization is None:
        return None
    with torch.enable_grad():
        point = values[0].detach().requires_grad_()
        params = linearization.params.detach().reshape(*y.shape, -1).requires_grad_()
        back, back_ladj = call_and_ladj(meta.family(params), point)
        log_prob = (back * score.detach()).sum() + back_ladj.sum()
        own, weights = torch.autograd.grad(log_prob, [point, params])
    rows = weights.reshape(-1, *weights.shape[-2:])
    new_score = own + linearization.pull_back(rows).reshape(own.shape)
    if torch.is_grad_enabled():
        values = _with_known_gradient(meta.family, linearization, y, values)
    return *values, new_score


def _by_passes(
    meta: Meta, y: Tensor, depth: int | None, passes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterates to a fixed point: x, the log-determinant, and the argument of the last pass."""
    # if the depth is unknown, one pass more than D confirms convergence
    most = passes or depth or y.shape[-1] + 1
    x = torch.zeros_like(y)
    for _ in range(most):
        point = _without_overflow(x)
        transform = check_returned(meta(point))
        new = transform.inv(y)
        # changes by more than round-off, which the map may amplify from pass to pass
        unit = 2 * torch.finfo(new.dtype).eps
        moved = ~torch.isclose(x, new, rtol=unit, atol=unit, equal_nan=True)
        x = torch.where(moved, new, x)
        if not bool(moved.any()):
            break
    else:
        if depth is None or most < depth:
            residual = (meta(x)(x) - y).abs()
            round_off = 1e3 * torch.finfo(x.dtype).eps * (1 + x.abs() + y.abs())
            bad = residual[(residual > round_off) & residual.isfinite()]
            if len(bad):
                warn_user(
                    f"the inverse of an AutoregressiveTransform has not converged after {most} passes: "
                    f"the largest residual |T(x) - y| is {bad.max():.3g}. Leave passes=None for an exact "
                    "inverse of an autoregressive meta",
                    RuntimeWarning,
                )
    ladj = transform.log_abs_det_jacobian(x, y)
    ladj = ladj.expand(x.shape[:-1]) if transform.event_dim else ladj.expand(x.shape).sum(-1)
    if depth != 1:  # entries that depend on NaN were computed with a number in its place
        undefined = y.isnan().any(-1)
        x, ladj = x.masked_fill(undefined[..., None], nan), ladj.masked_fill(undefined, nan)
    return x, -ladj, point


def _without_overflow(x: Tensor) -> Tensor:
    """Replaces overflows of early passes: infinity times a masked zero would spoil exact coordinates."""
    large = _bound(x)
    return x.nan_to_num(0.0, large, -large).clamp(-large, large)


def _block_size(depth: int, elements: int) -> int:
    """The number of levels per block for some number of rows times parameters, on a CPU.

    Large blocks save calls. If there are many elements, the few passes in each block cost more than calls.
    """
    for most, size in ((16, 128), (1024, 64), (4096, 32)):
        if elements <= most:
            return size
    return 16 if depth > 16 else 1


def by_blocks(
    family: Univariate, blocks: Blocks, y: Tensor, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The inverse by blocks of ``size`` levels.

    With size 1 no value is read, so that autograd can differentiate it.
    """
    large = _bound(y)
    clean = y.nan_to_num(0.0, large, -large)
    rows, levels = clean.reshape(-1, y.shape[-1]), blocks.levels
    rows = rows if blocks.order is None else rows[:, blocks.order]
    depth = len(levels) - 1
    if blocks.single_levels:
        size = 1
    elif size is None:  # on an accelerator calls cost far more than arithmetic
        is_cpu = y.device.type == "cpu"
        size = _block_size(depth, len(rows) * family.num_params) if is_cpu else depth
    start, done = 0, []
    while start < depth:
        stop = min(start + size, depth)
        blocks.open(start, stop)
        block = rows[:, levels[start] : levels[stop]]
        x, ladj, exact = _solve_block(family, blocks, block, stop - start)
        if exact < stop - start:
            # passes converge slowly here: keep the exact levels, and continue with smaller blocks
            stop, size = start + exact, max(size // 4, 1)
            count = levels[stop] - levels[start]
            x, ladj = x[:, :count], ladj[:, :count]
        done.append((x, ladj))
        if stop < depth:
            blocks.close(x, stop)
        start = stop
    x, ladj = done[0] if len(done) == 1 else (torch.cat(parts, -1) for parts in zip(*done))
    undefined = y.reshape(x.shape)
    undefined = (undefined if blocks.order is None else undefined[:, blocks.order]).isnan()
    # entries that may depend on NaN were computed with a number in its place
    after = undefined.cumsum(-1) > undefined
    x, ladj = x.masked_fill(after, nan), ladj.masked_fill(after, nan)
    x = x if blocks.order is None else x[:, blocks.order.argsort()]
    return x.reshape(y.shape) + (y - clean), ladj.sum(-1).reshape(y.shape[:-1])


def _solve_block(
    family: Univariate, blocks: Blocks, y: Tensor, depth: int
) -> tuple[Tensor, Tensor, int]:
    """x and log-determinants by coordinate in the open block, and the number of exact levels."""
    if depth == 1:
        return *call_and_ladj(family.forward(blocks.params(None)).inv, y), 1
    large, unit = _bound(y), 2 * torch.finfo(y.dtype).eps
    x = y  # a better guess than zeros, since trained layers are near the identity
    for k in range(1, min(depth, _MAX_PASSES) + 1):
        new, ladj = call_and_ladj(family.forward(blocks.params(x)).inv, y)
        # early passes may overflow, and infinity times a masked zero would spoil exact coordinates
        new = new.clamp(-large, large)
        # more than three passes are needed to detect convergence up to round-off
        if 3 < k < depth and torch.allclose(x, new, rtol=unit, atol=unit):
            return new, ladj, depth
        x = new
    return x, ladj, k


def _bound(y: Tensor) -> float:
    """A bound above all plausible values, at which sums of products stay finite."""
    return torch.finfo(y.dtype).max ** 0.75


def at_solution(meta: Meta, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`invert` for a known inverse x, from one evaluation."""
    if not values_can_be_read(y):
        raise RuntimeError(
            "the gradient at a known pair is computed by iteration, which torch.jit, torch.compile and "
            "torch.func do not support; use inverse_and_ladj there"
        )
    return _with_gradient(meta, x.expand(y.shape), y, None)


def _with_gradient(
    meta: Meta, x: Tensor, y: Tensor, values: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Evaluates at x with a graph; returns the given ``values``, if any, with that graph."""
    point = _without_overflow(x.detach()).requires_grad_()
    out, ladj = call_and_ladj_over_vectors(meta(point).inv, y)
    values = (out.detach(), ladj.detach()) if values is None else values
    if not (y.requires_grad or has_other_leaves([out, ladj], point)):
        return values

    def solve(g_out: Tensor, g_ladj: Tensor | None) -> Tensor:
        """The adjoint of the fixed point, by vector-Jacobian products until convergence."""
        v = g_out
        for _ in range(out.shape[-1]):
            pairs = (out, v), (ladj, g_ladj)
            weighted = [(t, g) for t, g in pairs if t.requires_grad and g is not None]
            if not weighted:
                break
            if (pulled := _pulled(weighted, point)) is None:
                break
            previous, v = v, g_out + pulled
            # relative to the row, since gradients scale with the loss
            change, size = (t.abs().amax(-1) for t in (v - previous, v))
            if bool((change <= 2 * torch.finfo(v.dtype).eps * size).all()):
                break
        return v

    return _Implicit.apply(out, ladj, *values, solve)


def _with_known_gradient(
    family: Univariate, linearization: Linearization, y: Tensor, values: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The values of an inverse with a graph, from the conditioner's linearization."""
    params = linearization.params.reshape(*y.shape, -1)
    if not params.requires_grad:
        if not y.requires_grad:
            return values
        params = params.detach().requires_grad_()
    out, ladj = call_and_ladj(family(params).inv, y)
    ladj = ladj.sum(-1)

    def solve(g_out: Tensor, g_ladj: Tensor | None) -> Tensor:
        """The adjoint of the fixed point, by substitution along the graph."""
        shape = (-1, *params.shape[-2:])
        right = g_out.reshape(-1, g_out.shape[-1])
        known = [(ladj, g_ladj)] if ladj.requires_grad and g_ladj is not None else []
        if known and (weights := _pulled(known, params)) is not None:
            right = right + linearization.pull_back(weights.reshape(shape))
        slopes: Any = _pulled([(out, torch.ones_like(out))], params)
        return linearization.solve_adjoint(slopes.reshape(shape), right).reshape(g_out.shape)

    return _Implicit.apply(out, ladj, *values, solve)


def _pulled(weighted: Iterable[tuple[Tensor, Tensor]], point: Tensor) -> Tensor | None:
    with torch.enable_grad():  # gradients of others than scalars import SymPy
        total: Any = sum((value * weight).sum() for value, weight in weighted)
    return torch.autograd.grad(total, point, retain_graph=True, allow_unused=True)[0]


class _Implicit(torch.autograd.Function):
    """The identity; its backward pass maps gradients at the solution to gradients at the last pass."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, ladj: Tensor, x: Tensor, ladj_at_x: Tensor, solve: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.solve, ctx.like = solve, x
        ctx.set_materialize_grads(False)  # an unused log-determinant has no gradient
        return x.view_as(x), ladj_at_x.view_as(ladj_at_x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of an inverse cannot be differentiated again (create_graph=True). "
                "Inside a torch.func transform, such as torch.func.hessian, it can"
            )
        g_out, g_ladj = gradients
        g_out = torch.zeros_like(ctx.like) if g_out is None else g_out
        return ctx.solve(g_out, g_ladj), g_ladj, None, None, None


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
