# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The optimizers of a fit: Adam, and wrappers for the user's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.optim.optim import _get_state_dict, _load_state_dict
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

#: the ``step_scales`` method of a guide
Scales = Callable[[], Mapping[nn.Parameter, Tensor]]


class Adam:
    """Adam whose step size follows the schedule of the fit.

    It calls PyTorch's functional Adam: the first optimizer object in a process imports the compiler, which
    takes as long as a hundred steps of a small fit.

    A guide may scale the steps of its parameters, since Adam takes equal steps for an sd of 1e-4 or 1e4.
    """

    def __init__(
        self, parameters: Sequence[Tensor], step_size: float, scales: Scales | None = None
    ) -> None:
        self._step_size, self._scales = step_size, scales
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
        adam(moved, gradients, means, squares, [], counts, beta1=0.9, beta2=0.99, **options)
        for parameter, scale, before in scaled:
            parameter.copy_(torch.addcmul(before, scale, parameter - before))

    def state_dict(self) -> Any:
        return [[part.clone() for part in parts] for parts in self._moments.values()]

    def load_state_dict(self, state: Any) -> None:
        for parts, saved in zip(self._moments.values(), state):
            for part, value in zip(parts, saved):
                part.copy_(value)


class PyroOptimizer:
    """Adapts an optimizer of Pyro to PyTorch's interface; a scheduler advances after each step."""

    def __init__(self, optimizer: PyroOptim, parameters: Sequence[Tensor]) -> None:
        self._parameters, self._optimizer = list(parameters), cast(Any, optimizer)
        # Pyro does this only at the first step, but a state may be loaded before
        for parameter in set(parameters) - optimizer.optim_objs.keys():
            optimizer.optim_objs[parameter] = self._optimizer._get_optim(parameter)
            optimizer.grad_clip[parameter] = self._optimizer._get_grad_clip(parameter)

    def step(self) -> None:
        self._optimizer(self._parameters)
        if isinstance(self._optimizer, PyroLRScheduler):
            self._optimizer.step()

    def state_dict(self) -> Any:
        return [_get_state_dict(self._optimizer.optim_objs[p]) for p in self._parameters]

    def load_state_dict(self, state: Any) -> None:
        for parameter, saved in zip(self._parameters, state):
            _load_state_dict(self._optimizer.optim_objs[parameter], saved)


Optimizer = Adam | PyroOptimizer | torch.optim.Optimizer


def users_optimizer(optim: Any, parameters: Sequence[Tensor]) -> Optimizer:
    """The user's optimizer for these parameters, with its own step size.

    :param optim: an optimizer or scheduler of ``pyro.optim`` that needs no loss, or a function from a list
        of parameters to an optimizer of ``torch.optim`` that needs no closure.
    """
    if isinstance(optim, PyroLRScheduler) and optim.pt_scheduler_constructor is ReduceLROnPlateau:
        raise TypeError("optim: expected a scheduler that needs no loss, got ReduceLROnPlateau")
    if isinstance(optim, PyroOptim):
        return PyroOptimizer(optim, parameters)
    made = optim(list(parameters)) if callable(optim) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            "optim: expected an optimizer of pyro.optim, or a function of a list of parameters that "
            f"returns one of torch.optim, got {optim!r}"
        )
    if isinstance(made, torch.optim.LBFGS):
        raise TypeError("optim: expected an optimizer that needs no closure, got LBFGS")
    moved = {parameter for group in made.param_groups for parameter in group["params"]}
    if moved.isdisjoint(parameters):
        raise ValueError(
            "optim: expected an optimizer for the parameters that it is given, got one for others"
        )
    return made
