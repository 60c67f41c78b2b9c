# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The optimizer of a fit."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

#: the ``step_scales`` method of a guide
Scales = Callable[[], Mapping[nn.Parameter, Tensor]]


class Adam:
    """Adam whose step size follows the schedule of the fit.

    It calls PyTorch's functional Adam: the first optimizer object in a process imports the compiler, which
    takes as long as a hundred steps of a small fit.

    A guide may scale the steps of its parameters, since Adam takes equal steps for an sd of 1e-4 or 1e4.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        step_size: float,
        scales: Scales | None = None,
        *,
        beta1: float = 0.9,
    ) -> None:
        self._step_size, self._scales, self._beta1 = step_size, scales, beta1
        #: the schedule's factor on the step size
        self.factor = 1.0
        has_kernel = all(p.device.type in ("cpu", "cuda") for p in parameters)
        is_fused = has_kernel and all(map(torch.is_floating_point, parameters))
        has_complex = any(map(torch.is_complex, parameters))
        self._kind = {"fused": is_fused, "has_complex": has_complex}
        #: by parameter, the means of gradients and of their squares, and the number of steps
        self._moments: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}
        for p in parameters:
            device = p.device if is_fused else "cpu"
            steps = torch.zeros((), dtype=torch.float32, device=device)
            self._moments[p] = torch.zeros_like(p.detach()), torch.zeros_like(p.detach()), steps

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step with each ``grad``; a parameter without one stays unchanged."""
        scales = {} if self._scales is None else self._scales()
        scaled = [(p, scales[p], p.detach().clone()) for p in scales if p in self._moments]
        present = [(p, p.grad, *own) for p, own in self._moments.items() if p.grad is not None]
        moved, gradients, means, squares, counts = map(list, zip(*present))
        options: Any = {"weight_decay": 0.0, "amsgrad": False, "maximize": False, **self._kind}
        options.update(lr=self._step_size * self.factor, eps=1e-8)
        # beta2 is small since steps are few
        adam(moved, gradients, means, squares, [], counts, beta1=self._beta1, beta2=0.99, **options)
        for parameter, scale, before in scaled:
            parameter.copy_(torch.addcmul(before, scale, parameter - before))

    def tensors(self) -> list[Tensor]:
        """The moments of all parameters, which steps change in place."""
        return [part for parts in self._moments.values() for part in parts]
