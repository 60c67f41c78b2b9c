# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Second derivatives of functions whose first derivative is written by hand."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_with_graph(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of a weighted sum of a function's values, which can be differentiated themselves."""
    # views: where one input was made of another, derivatives by it do not go through what made it
    inputs = [value.view_as(value) for value in inputs]
    wanted = [value for value in inputs if value.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, weights, create_graph=True))
    return [next(found) if value.requires_grad else None for value in inputs]
