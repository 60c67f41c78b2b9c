# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The steps of a fit, and its final parameters."""

import copy
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from ..._base.processes import Gradients, Processes
from ..._base.time_limit import is_out_of_time
from ...diagnostics.importance_sampling import CLEAR_IN_SE
from ...model.replay.capture import ReplayError
from .objective import Objective
from .schedule import Schedule

_KEPT = ("losses", "num_gradients", "culprits", "schedule", "_norms")
# step size of Adam, also if the model has parameters, such as networks: with 2e-2 an autoencoder ended 5 nats
# per image lower (tutorials/vae_iaf.ipynb)
_STEP_SIZE, _MODEL_STEP_SIZE = 2e-2, 5e-3
# Adam's average of gradients is short since steps are few (benchmarks/price.md), but not with mini-batches
# that all data do not correct, whose noise is larger
_BETA1, _BETA1_OF_MINIBATCHES = 0.8, 0.9
# gradients are clipped to 3 times their median norm over the last 100 steps; a fit gives up if none of its
# last 100 steps is finite
_MAX_SKIPS = 100


class FitError(RuntimeError):
    """Raised when a fit cannot continue."""


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


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Detached copies of tensors."""
    return [*map(torch.clone, map(Tensor.detach, tensors))]


@torch.no_grad()
def copy_to(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copies values to tensors, in place."""
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)


@contextmanager
def common_noise() -> Iterator[None]:
    """A block whose random numbers are the same each time, to compare guides; those after it stay."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def _num_stored() -> int:
    """The number of parameters in Pyro's store that require gradients."""
    return sum(tensor.requires_grad for _, tensor in pyro.get_param_store().named_parameters())


def _scales_of_first(parallel: Processes, scales: Scales) -> dict[nn.Parameter, Tensor]:
    """The step scales of the guide; those of other processes may be of another mini-batch."""
    found = {parameter: scale.clone() for parameter, scale in scales().items()}
    parallel.copy_first(found.values)
    return found


class Training:
    """The state of a fit between two steps, which can be restored.

    :param scales: returns the scales of the guide's steps by parameter, if it has any.
    """

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        num_particles: int,
        scales: Scales | None = None,
        parallel: Processes | None = None,
    ) -> None:
        self.objective, self.num_particles = objective, num_particles
        self.schedule = schedule
        self._parallel, self.parameters = parallel or Processes(), objective.parameters()
        if not self.parameters:
            raise ValueError("there is nothing to train: neither guide nor model has parameters")
        self.trained = list(self.parameters.values())
        is_guide_alone = objective.is_guide_alone()
        self._step_size = _STEP_SIZE if is_guide_alone else _MODEL_STEP_SIZE
        beta1 = _BETA1 if schedule.epoch == 1 else _BETA1_OF_MINIBATCHES
        # bound to no method, which would be a cycle that keeps the guide
        own = partial(_scales_of_first, self._parallel, scales or dict)
        self.optimizer = Adam(self.trained, self._step_size, own, beta1=beta1)
        #: the loss of each step, NaN if the step was skipped
        self.losses: list[float] = []
        #: the sites that caused steps to be skipped, with the number of steps
        self.culprits: Counter[str] = Counter()
        self._norms: list[float] = []
        #: gradients of the model's log density, one per draw
        self.num_gradients = 0
        self.start = ""  #: the name of the initial guide
        self._average = copies(self.trained)
        # the state at the last verified replay, to return to
        self._num_compared = 0
        self._confirmed: tuple[list[Tensor], dict[str, Any]] | None = None
        # weights do not judge the parameters of a model
        self._has_checks = objective.has_weights and is_guide_alone
        self._num_stored = _num_stored()
        self._initial: list[Tensor] = []

    @property
    def num_steps(self) -> int:
        """The number of steps so far, including skipped ones."""
        return len(self.losses)

    @property
    def num_skipped(self) -> int:
        return sum(map(math.isnan, self.losses))

    def check_start(self, name: str) -> None:
        """Ends the fit if the user set no number of steps and the initial guide is good enough."""
        self.start = name
        if self._has_checks and self.objective.is_noisy:
            self._initial = copies(self.trained)
        if self._has_checks and self.schedule.num_steps is None:
            self.schedule = self.schedule.after_check(0, self._log_weights)

    def _log_weights(self, count: int) -> Tensor:
        """The log weights of at least ``count`` draws, from all processes."""
        if self.objective.is_noisy:  # all processes evaluate each draw, with their own batches
            found = partial(self.objective.elbo_draws, count)
            return self._parallel.first("the density of all data", found)
        share = self._parallel.share(count)
        draws = self.objective.elbo_draws(share)
        return torch.cat(self._parallel.gather("the draws of all processes", draws)).to(draws)

    def is_over(self) -> bool:
        """Whether the schedule has ended."""
        return self.schedule.is_over(self.num_steps)

    @torch.enable_grad()
    def step(self) -> float:
        """Takes one step, or skips it; returns the loss, the negative ELBO in nats."""
        if self._num_compared != self.objective.num_compared:
            self._num_compared = self.objective.num_compared
            self._confirmed = self.state()
        try:
            loss, num_draws = self._loss()
        except ReplayError:
            # with several processes the others would not go back
            if self._confirmed is not None and self._parallel.size == 1:
                self.restore(self._confirmed)
            loss, num_draws = self._loss()
        self._refuse_new_parameters()
        self.num_gradients += num_draws * self._parallel.size
        if not loss.requires_grad:
            raise FitError("there is nothing to train: neither guide nor model has parameters")
        share = self.schedule.step_size(self._step_size) / self._step_size
        self.optimizer.factor = share * self.schedule.factor(self.num_steps)
        value = self._take(loss)
        weight = self.schedule.average_weight(self.num_steps)
        torch._foreach_lerp_(self._average, [*map(Tensor.detach, self.trained)], weight)
        self.schedule = self.schedule.observe(self.losses)
        if self._has_checks and self.schedule.is_for_check(self.num_steps):
            present = copies(self.trained)
            copy_to(self.trained, self._average)
            self.schedule = self.schedule.after_check(self.num_steps, self._log_weights)
            copy_to(self.trained, present)
        if self.schedule.end is not None and self.num_steps == self.schedule.decay_start:
            copy_to(self.trained, self._average)
            if self._has_checks and not self.objective.is_noisy:
                self.schedule = self.schedule.with_loss_of_decay(self._log_weights)
        return value

    def _take(self, loss: Tensor) -> float:
        """Takes a step, or skips it if the loss or its gradient is not finite; returns the loss."""
        value = loss.item()
        gradients: Gradients | None = None
        if math.isfinite(value):
            gradients = self._gradients(loss)
        value, gradients = self._parallel.mean(value, gradients, self.trained)
        present = [gradient for gradient in gradients or () if gradient is not None]
        norm = math.inf
        if gradients is not None:
            norms = torch._foreach_norm(present)
            norm = torch.stack([*map(Tensor.double, norms)]).norm().item()
        if gradients is None or not math.isfinite(norm):
            self._skip()
            return value
        self.losses.append(value)
        self._norms = [*self._norms[1 - _MAX_SKIPS :], norm]
        limit = 3 * statistics.median(self._norms)
        shrink = min(1.0, limit / norm) if norm > 0 else 1.0
        if shrink < 1.0:
            torch._foreach_mul_(present, shrink)
        for parameter, gradient in zip(self.trained, gradients):
            if gradient is not None and gradient.stride() != parameter.stride():
                # PyTorch's fused Adam assumes equal memory layouts
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.trained:
            parameter.grad = None
        return value

    def _gradients(self, loss: Tensor) -> Gradients:
        """The gradient by each parameter; ``None`` for those that a callback has frozen."""
        moving = [parameter for parameter in self.trained if parameter.requires_grad]
        found = iter(torch.autograd.grad(loss, moving, allow_unused=True))
        return [next(found) if parameter.requires_grad else None for parameter in self.trained]

    def _skip(self) -> None:
        sites = self.objective.nonfinite_sites()
        names = self._parallel.gather("the sites of all processes", sites)
        self.culprits.update([*dict.fromkeys(chain(*names))] or ["the gradient"])
        self.losses.append(math.nan)
        if sum(map(math.isnan, self.losses[-_MAX_SKIPS:])) == _MAX_SKIPS:
            raise FitError(
                f"the fit stopped: the loss or its gradient was not finite for {_MAX_SKIPS} steps in a row, "
                f"because of {', '.join(self.culprits)}. The parameters are those after the last good step. "
                "Check the data, and that the log density and its gradient are finite for all values of the "
                "latents: a NaN that a mask or torch.where removes from a value stays in its gradient"
            )

    def _refuse_new_parameters(self) -> None:
        """Raises an error if there are parameters that the first run lacked: they are not trained."""
        if _num_stored() <= self._num_stored:
            return
        if new := sorted(self.objective.parameters().keys() - self.parameters.keys()):
            raise FitError(
                f"parameters appeared at step {self.num_steps + 1} and would not be trained: {new}. "
                "Expected pyro.param statements to be reached in each run of the model, and parameters that "
                "require gradients from the first step on"
            )
        self._num_stored = _num_stored()

    def _loss(self) -> tuple[Tensor, int]:
        num_draws = self._parallel.share(self.num_particles)
        if self.schedule.is_for_tails and self.num_steps >= self.schedule.decay_start:
            return self.objective.tail_loss(num_draws)
        # weights of draws would move the parameters of a model to other values
        loss = self.objective.robust_loss if self._has_checks else self.objective.loss
        return loss(num_draws), num_draws

    def finish(self) -> None:
        """Sets the parameters to their average, unless a decay determined them, or to a better start."""
        if self.losses and self.num_steps <= self.schedule.decay_start:
            copy_to(self.trained, self._average)
        if self.losses and self._initial and self._is_worse():
            copy_to(self.trained, self._initial)

    def _is_worse(self) -> bool:
        """Whether the ELBO is lower than at the start, by as few draws as show it or time allows."""
        trained, worse = copies(self.trained), False
        for count in (self.schedule.num_few, self.schedule.num_compared):
            gain = self._elbo_draws_at(trained, count) - self._elbo_draws_at(self._initial, count)
            worse = not gain.mean() >= 0
            is_clear = not gain.mean().abs() <= CLEAR_IN_SE * gain.std() / len(gain) ** 0.5
            (is_late,) = self._parallel.any(is_out_of_time())
            if is_clear or is_late:
                break
        copy_to(self.trained, trained)
        return worse

    def _elbo_draws_at(self, parameters: list[Tensor], count: int) -> Tensor:
        """Estimates of the ELBO with common random numbers."""
        copy_to(self.trained, parameters)
        with common_noise():
            return self._log_weights(count).nan_to_num(-math.inf)

    def _tensors(self) -> list[Tensor]:
        """All tensors that steps change."""
        return [*self.trained, *self._average, *self.optimizer.tensors()]

    def state(self) -> tuple[list[Tensor], dict[str, Any]]:
        """All that steps change."""
        return copies(self._tensors()), {name: copy.copy(getattr(self, name)) for name in _KEPT}

    def restore(self, state: tuple[list[Tensor], dict[str, Any]]) -> None:
        """Restores what :meth:`state` returned."""
        tensors, others = state
        copy_to(self._tensors(), tensors)
        for name, value in others.items():
            setattr(self, name, copy.copy(value))
