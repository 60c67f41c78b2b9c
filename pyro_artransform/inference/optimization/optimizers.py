# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The optimisers a fit can use: its own Adam, and whatever the user brings."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

_BETAS = (0.9, 0.99)


class Optimiser(Protocol):
    """Takes steps along gradients that stand in the parameters' ``grad``."""

    def step(self, factor: float) -> None:
        """Takes a step, of the step size times the factor where the schedule is the fit's."""

    def state(self) -> Any:
        """Everything that changes, in tensors and plain data."""

    def restore(self, state: Any) -> None:
        """Takes over what :meth:`state` returned."""


class Adam:
    """Adam whose step size follows the schedule of the fit.

    :param parameters: what to train, by name.
    :param step_size: the step size at a factor of one.
    :param units: returns, for parameters whose steps are to be larger or smaller, what to multiply
        them by, of the parameter's shape: Adam's steps are as large for a location with a deviation
        of 1e-4 as for one of 1e4.

    **References**

    1. Adam: A Method for Stochastic Optimization (Kingma, Ba, 2015), https://arxiv.org/abs/1412.6980
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        step_size: float,
        units: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        trained = list(parameters.values())
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
        self._adam = torch.optim.Adam(trained, lr=step_size, betas=_BETAS, fused=fused)
        self._parameters = parameters
        self._step_size = step_size
        self._units = units

    def step(self, factor: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = self._step_size * factor
        units = {name: unit for name, unit in self._units().items() if name in self._parameters}
        before = {name: self._parameters[name].detach().clone() for name in units}
        self._adam.step()
        with torch.no_grad():
            for name, unit in units.items():
                parameter = self._parameters[name]
                parameter.copy_(torch.addcmul(before[name], unit, parameter - before[name]))

    def state(self) -> Any:
        return self._adam.state_dict()

    def restore(self, state: Any) -> None:
        self._adam.load_state_dict(state)


class TorchOptimiser:
    """An optimiser of PyTorch, with the step size that it has.

    :param optimiser: the optimiser of all parameters.
    """

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self._optimiser = optimiser

    def step(self, factor: float) -> None:
        self._optimiser.step()

    def state(self) -> Any:
        return self._optimiser.state_dict()

    def restore(self, state: Any) -> None:
        self._optimiser.load_state_dict(state)


class PyroOptimiser:
    """An optimiser of Pyro, with the step size that it has; a scheduler goes on after each step.

    :param optimiser: the optimiser.
    :param parameters: what to train.
    """

    def __init__(self, optimiser: PyroOptim, parameters: Sequence[Tensor]) -> None:
        self._optimiser = optimiser
        self._parameters = list(parameters)

    def step(self, factor: float) -> None:
        self._optimiser(self._parameters)
        if isinstance(self._optimiser, PyroLRScheduler):
            self._optimiser.step()

    def state(self) -> Any:
        return [[part.state_dict() for part in self._parts(p)] for p in self._parameters]

    def _parts(self, parameter: Tensor) -> list[Any]:
        """The optimiser of a parameter, after its scheduler if it has one; none before a step."""
        made = self._optimiser.optim_objs.get(parameter)
        if made is None:
            return []
        return [made, made.optimizer] if isinstance(self._optimiser, PyroLRScheduler) else [made]

    def restore(self, state: Any) -> None:
        held = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        for parameter, saved in zip(self._parameters, state):
            if not saved:
                continue
            kept = parameter.detach().clone()
            parameter.grad = torch.zeros_like(parameter)
            # Pyro makes the optimiser of a parameter at its first step
            self._optimiser([parameter])
            for part, values in zip(self._parts(parameter), saved):
                part.load_state_dict(values)
            with torch.no_grad():
                parameter.copy_(kept)
        for parameter, grad in zip(self._parameters, held):
            parameter.grad = grad


def users_optimiser(optim: Any, parameters: Sequence[Tensor]) -> Optimiser:
    """An optimiser that the user brings, for these parameters.

    :param optim: an optimiser or scheduler of ``pyro.optim``, or a function of a list of parameters
        that returns one of ``torch.optim``.
    :param parameters: what to train.
    :raises TypeError: if it is neither.
    """
    if isinstance(optim, PyroLRScheduler) and optim.pt_scheduler_constructor is ReduceLROnPlateau:
        raise TypeError("optim: expected a scheduler that needs no loss, got ReduceLROnPlateau")
    if isinstance(optim, PyroOptim):
        return PyroOptimiser(optim, parameters)
    made = optim(list(parameters)) if callable(optim) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            "optim: expected an optimiser of pyro.optim, or a function of a list of parameters that "
            f"returns one of torch.optim, got {optim!r}"
        )
    return TorchOptimiser(made)
