# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Custom and precomputed gradients that support double differentiation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients_with_graph(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Differentiable gradients of a weighted sum of a function's values."""
    # views, so that the derivative by an input ignores how it was computed from another input
    inputs = [value.view_as(value) for value in inputs]
    wanted = [value for value in inputs if value.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, weights, create_graph=True))
    return [next(found) if value.requires_grad else None for value in inputs]


def evaluate_with_gradient(
    function: Callable[[Tensor], Tensor], inputs: Tensor
) -> tuple[Tensor, bool]:
    """Evaluates a function of rows ``(n, d)`` with its gradient, so that no graph is kept.

    :return: the values, and whether the gradient was computed: not if they depend on other leaves.
    """
    inputs = inputs.view_as(inputs)  # has its own graph node
    state = torch.get_rng_state()
    values = function(inputs)
    if not values.requires_grad:
        return values, True
    if has_other_leaves([values], inputs):
        return values, False
    try:
        (gradient,) = torch.autograd.grad(values.sum(), inputs, retain_graph=True)
    except RuntimeError:  # a reentrant checkpoint, or an error that backward will raise
        return values, False
    found: Tensor = KnownGradients.apply(values.detach(), [gradient], function, state, inputs)
    return found, True


def sum_with_gradient(
    parts: Callable[[], Iterable[Callable[[Tensor], Tensor]]], inputs: Tensor
) -> Tensor:
    """Sums functions of rows ``(n, d)`` in double precision, keeping the graph of one at a time.

    :param parts: returns an iterable of the functions; may be called repeatedly.
    """

    nothing = inputs.new_zeros(len(inputs), dtype=torch.float64)

    def total(rows: Tensor) -> Tensor:
        return sum((part(rows) for part in parts()), nothing)

    if not (torch.is_grad_enabled() and inputs.requires_grad):
        return total(inputs)
    values, gradient = nothing, torch.zeros_like(inputs)
    for part in parts():
        rows = inputs.detach().requires_grad_()
        found = part(rows)
        if has_other_leaves([found], rows):
            return total(inputs)
        values = values + found.detach()
        gradient = gradient + torch.autograd.grad(found.sum(), rows)[0]
    state = torch.get_rng_state()
    known: Tensor = KnownGradients.apply(values, [gradient], total, state, inputs)
    return known


def has_other_leaves(values: Sequence[Tensor], inputs: Tensor) -> bool:
    """Whether values depend on leaves other than the inputs."""
    return any(leaf is not inputs for leaf in leaves(values, inputs))


def leaves(values: Sequence[Tensor], inputs: Tensor | None = None) -> Iterator[Tensor]:
    """The leaves that values depend on other than through ``inputs``."""
    # nodes are compared by identity, so references must be kept
    seen: set[Any] = {None} if inputs is None else {None, inputs.grad_fn}
    waiting: list[Any] = [value.grad_fn for value in values]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                yield leaf
            waiting += [child for child, _ in node.next_functions]


class KnownGradients(torch.autograd.Function):
    """Values with precomputed gradients, one per input.

    Double differentiation evaluates ``function`` of rows again, if there is one, from a random ``state``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        gradients: Sequence[Tensor],
        function: Callable[[Tensor], Tensor] | None,
        state: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.gradients, ctx.function, ctx.state = gradients, function, state
        ctx.save_for_backward(*(inputs if function else ()))
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.function and torch.is_grad_enabled():  # create_graph=True
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(ctx.state)  # with the same random numbers
                again = gradients_with_graph(
                    lambda x: [ctx.function(x)], ctx.saved_tensors, weights
                )
            return None, None, None, None, *again
        (weight,) = weights
        if not weight.dim():
            return None, None, None, None, *(weight * gradient for gradient in ctx.gradients)
        # values of weight zero may have an infinite gradient
        (gradient,), by_row = ctx.gradients, weight[:, None]
        found = torch.where(by_row == 0, 0.0, by_row.to(gradient) * gradient)
        return None, None, None, None, found
