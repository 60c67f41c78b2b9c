# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Inverses of autoregressive transforms, and their gradients.

The inverse of ``y = meta(x)(x)`` is the fixed point of

.. math::

    u(x) = \mathrm{meta}(x)^{-1}(y).

Coordinate i of u reads only coordinates before i, so each pass makes the next level of the graph
exact, and after as many passes as the graph is deep all of them are.

The gradient follows from the implicit function theorem. With :math:`M = \partial u / \partial x`, which
is strictly triangular, the adjoint of the fixed point solves :math:`(I - M^\top) v = g`. The solution is
found as the limit of :math:`v \leftarrow g + M^\top v`, a vector-Jacobian product each, exact after as many as
the graph is deep; neither the passes nor the Jacobian are kept in memory.

**References**

1. Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (Song, Meng, Liao,
   Ermon, 2021), https://arxiv.org/abs/2002.03629
2. Deep Equilibrium Models (Bai, Kolter, Koltun, 2019), https://arxiv.org/abs/1909.01377
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform

from .evaluate import inverse_and_ladj, sum_ladj, values_are_readable
from .warn import warn_user

Meta = Callable[[Tensor], Transform]


class Plan(NamedTuple):
    """How to invert.

    :param passes: at most so many passes.
    :param exact: whether so many passes are known to be enough.
    """

    passes: int
    exact: bool


def plan_passes(y: Tensor, passes: int | None, depth: int | None) -> Plan:
    """The number of passes for an inverse.

    :param y: shape ``(*, D)``.
    :param passes: the number that the user asked for, or None.
    :param depth: the depth of the graph where it is known.
    """
    if passes is None:
        # one pass more than D shows, where the depth is not known, that nothing moves any more
        return Plan(y.shape[-1] + 1, False) if depth is None else Plan(depth, True)
    return Plan(passes, depth is not None and passes >= depth)


def invert(meta: Meta, y: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The inverse at ``y`` and its log-determinant, differentiable in y and all parameters.

    :param meta: a function of x that returns a transform.
    :param y: shape ``(*, D)``.
    :param plan: how many passes.
    :return: ``x`` of shape ``(*, D)`` and ``log |det dx/dy|`` of shape ``(*,)``.
    """
    if not values_are_readable(y):
        return _unrolled(meta, y, plan)
    with torch.no_grad():
        x, transform, converged = _iterate(meta, y.detach(), plan)
        if not (converged or plan.exact):
            _warn_of_residual(meta, x, y, plan)
    if not torch.is_grad_enabled():
        return x, _ladj(transform, x, y)
    return _with_gradient(meta, x, y)


def _unrolled(meta: Meta, y: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """All passes, differentiated by autograd: where no value can be read."""
    x = torch.zeros_like(y)
    for _ in range(plan.passes - 1):
        x = meta(x).inv(y)
    x, ladj = inverse_and_ladj(transform := meta(x), y)
    return x, sum_ladj(ladj, x, transform.event_dim, 1)


def _ladj(transform: Transform, x: Tensor, y: Tensor) -> Tensor:
    ladj = transform.log_abs_det_jacobian(x, y)
    return -sum_ladj(ladj, x, transform.event_dim, 1)


def _iterate(meta: Meta, y: Tensor, plan: Plan) -> tuple[Tensor, Transform, bool]:
    """Passes until nothing moves; the last transform has the parameters of the solution.

    What moved by round-off alone stays where it is: the map may amplify the jitter of an early
    coordinate from pass to pass.
    """
    x = torch.zeros_like(y)
    for _ in range(plan.passes):
        transform = meta(_finite(x))
        new = transform.inv(y)
        moved = _moved(new, x)
        if not bool(moved.any()):
            return x.expand(new.shape), transform, True
        x = torch.where(moved, new, x)
    return x, transform, False


def _finite(x: Tensor) -> Tensor:
    """Early passes may overflow, and infinity times a masked zero would spoil what is exact already."""
    large = torch.finfo(x.dtype).max ** 0.75
    return x.nan_to_num(0.0, large, -large).clamp(-large, large)


def _moved(new: Tensor, old: Tensor) -> Tensor:
    """What changed by more than round-off; what became infinite or undefined in the same way did not."""
    change = (new - old).abs()
    still = change <= 2 * torch.finfo(new.dtype).eps * (1 + new.abs())
    return ~(still | (new == old) | (new.isnan() & old.isnan()))


def _warn_of_residual(meta: Meta, x: Tensor, y: Tensor, plan: Plan) -> None:
    """Says how far ``meta(x)(x)`` is from y, if it is further than round-off explains."""
    residual = (meta(x)(x) - y).abs()
    scale = 1e3 * torch.finfo(x.dtype).eps * (1 + x.abs() + y.abs())
    bad = (residual > scale) & residual.isfinite()
    if bool(bad.any()):
        worst = torch.where(bad, residual, torch.zeros_like(residual)).max().item()
        warn_user(
            f"the inverse of an AutoregressiveTransform has not converged after {plan.passes} passes: "
            f"the largest residual |T(x) - y| is {worst:.3g}. Leave passes=None for an exact inverse of "
            "an autoregressive meta",
            RuntimeWarning,
        )


def _with_gradient(meta: Meta, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluates once more, with a graph, and solves the triangular system in the backward pass."""
    point = _finite(x.detach()).requires_grad_()
    transform = meta(point)
    out, ladj = inverse_and_ladj(transform, y)
    ladj = sum_ladj(ladj, out, transform.event_dim, 1)
    if not (y.requires_grad or _reaches_other_leaves(out, ladj, point)):
        return out.detach(), ladj.detach()
    return _Implicit.apply(out, ladj, point)


def _reaches_other_leaves(out: Tensor, ladj: Tensor, point: Tensor) -> bool:
    """Whether a parameter, seen or not, is in the graph: ``point`` alone needs no gradient."""
    todo, seen = [out.grad_fn, ladj.grad_fn], {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if getattr(node, "variable", point) is not point:
                return True
            todo.extend(parent for parent, _ in node.next_functions)
    return False


class _Implicit(torch.autograd.Function):
    """The identity, whose backward pass turns a gradient at the solution into one at the last pass."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, ladj: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
        ctx.graph = out, ladj, point
        return out.view_as(out), ladj.view_as(ladj)

    @staticmethod
    def backward(ctx: Any, g_out: Tensor, g_ladj: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of an inverse cannot be differentiated again (create_graph=True). "
                "Inside a torch.func transform, such as torch.func.hessian, it can"
            )
        out, ladj, point = ctx.graph
        return _solve(out, ladj, point, g_out, g_ladj), g_ladj, None


def _solve(out: Tensor, ladj: Tensor, point: Tensor, g_out: Tensor, g_ladj: Tensor) -> Tensor:
    """The adjoint of the fixed point, by vector-Jacobian products until nothing moves."""
    v = g_out
    for _ in range(out.shape[-1]):
        values, weights = zip(*((t, g) for t, g in ((out, v), (ladj, g_ladj)) if t.requires_grad))
        (pulled,) = torch.autograd.grad(
            values, point, weights, retain_graph=True, allow_unused=True
        )
        previous, v = v, g_out if pulled is None else g_out + pulled
        if not bool(_moved(v, previous).any()):
            break
    return v
