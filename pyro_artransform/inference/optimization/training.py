# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The steps of a fit, and the choice of the parameters that it ends with."""

import copy
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...joint.protocols import ScaledSteps
from ..parallel import Gradients, Parallel
from .objective import Objective
from .optimizers import Adam, PyroOptimizer, TorchOptimizer, wrap_optimizer
from .schedule import Schedule, Score, score_of

BETAS = (0.9, 0.99)  #: of Adam; the second is short since steps are few
_END = ("decay_start", "end", "reason")
# standard errors by which the average has to be better than the last parameters
_CLEAR = 2.0
_COPIED = ("norms", "average", "best", "best_loss")
# steps whose mean loss says which parameters were the best, and those whose median norm clips gradients
_BLOCK, _CLIP_WINDOW = 50, 100
# steps in a row that are not finite before a fit gives up, and skipped steps whose sites are named
_MAX_SKIPS, _MAX_NAMED = 100, 20


class FitError(RuntimeError):
    """A fit that cannot go on."""


@dataclass
class SkippedSteps:
    """How many steps were skipped, how many of them in a row, and because of which sites."""

    count: int = 0
    in_a_row: int = 0
    sites: Counter[str] = field(default_factory=Counter)

    def note(self, objective: Objective) -> None:
        """Counts one more, and names its sites; an error if there are too many in a row."""
        self.count += 1
        self.in_a_row += 1
        if self.count <= _MAX_NAMED:  # naming a site runs the model again
            self.sites.update(objective.nonfinite_sites() or ["the gradient"])
        if self.in_a_row >= _MAX_SKIPS:
            raise FitError(
                f"the fit stopped: the loss or its gradient was not finite in {self.in_a_row} steps "
                f"in a row, because of {', '.join(self.sites)}. The parameters are finite, as the "
                "last good steps left them. Check the data, and that the model and its gradient are finite "
                "for all its latents: what a mask or torch.where leaves out of a value, NaN for example, "
                "stays in its gradient"
            )


class Training:
    """The state of a fit between two steps, all of which can be saved and restored.

    :param optim: the user's optimizer; ``None`` for Adam with the step size of the settings.
    :param scales: the guide, where it scales the steps of its parameters.
    """

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        num_particles: int,
        optim: object = None,
        scales: ScaledSteps | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.objective, self.num_particles = objective, num_particles
        self.schedule, self._config, self._parallel = schedule, schedule.config, parallel
        self.parameters = objective.parameters()
        if not self.parameters:
            raise ValueError("there is nothing to train: neither guide nor model has parameters")
        trained = list(self.parameters.values())
        self.optimizer: Adam | TorchOptimizer | PyroOptimizer
        is_guide_alone, config = objective.is_guide_alone(), self._config
        if optim is None:
            step_size = config.step_size if is_guide_alone else config.model_step_size
            self.optimizer = Adam(trained, step_size, BETAS, scales)
        else:
            self.optimizer = wrap_optimizer(optim, trained)
        #: the loss of each step, not a finite number where the step was skipped
        self.losses: list[float] = []
        #: gradients of the model's log density, one for each draw
        self.num_gradients = 0
        self.skipped = SkippedSteps()
        self._norms: list[float] = []
        self._average, self._best, self._best_loss = self._values(), self._values(), math.inf
        # the weights say nothing of the parameters of a model
        self._has_checks = objective.has_weights and is_guide_alone

    @property
    def num_steps(self) -> int:
        """The steps taken so far, the skipped ones included."""
        return len(self.losses)

    @property
    def step_size(self) -> float | None:
        """The largest step size from now on; ``None`` where the optimizer is the user's."""
        return self.optimizer.step_size if isinstance(self.optimizer, Adam) else None

    def check_start(self) -> None:
        """Ends a fit before its first step that finds its end itself, and has nothing left to win."""
        is_asked = self.schedule.num_steps is not None or self.step_size is None
        if self._has_checks and not is_asked:
            self.schedule = self.schedule.after_check(0, self._score().gap)

    def is_over(self) -> bool:
        """Whether the schedule is at its end."""
        return self.schedule.is_over(self.num_steps)

    @torch.enable_grad()
    def step(self) -> float:
        """Takes one step, or skips it; returns the loss, the negative ELBO in nats."""
        objective = self.objective
        is_ending = self.schedule.end is not None and self.num_steps >= self.schedule.decay_start
        count = objective.num_tail_draws(self.num_particles) if is_ending else self.num_particles
        loss = (objective.tail_loss if is_ending else objective.loss)(count)
        self.num_gradients += count
        if not loss.requires_grad:
            raise FitError("there is nothing to train: neither guide nor model has parameters")
        value, trained = loss.item(), list(self.parameters.values())
        gradients: Gradients | None = None
        if math.isfinite(value):
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        if self._parallel is not None:
            value, gradients = self._parallel.mean(value, gradients, trained)
        norm, present = math.inf, list[Tensor]()
        if gradients is not None:
            present = [gradient for gradient in gradients if gradient is not None]
            norms = torch._foreach_norm(present)
            norm = torch.stack([*map(Tensor.double, norms)]).norm().item()
        if gradients is not None and math.isfinite(norm):
            self._take(gradients, present, norm)
        else:
            self.skipped.note(objective)
        self.losses.append(value if math.isfinite(norm) else math.nan)
        self._remember()
        self.schedule = self.schedule.observe(self.losses)
        if self._has_checks and self.schedule.is_for_check(self.num_steps):
            present = self._values()
            self.set_parameters(self._average)
            self.schedule = self.schedule.after_check(self.num_steps, self._score().gap)
            self.set_parameters(present)
        return value

    def _take(self, gradients: Gradients, present: list[Tensor], norm: float) -> None:
        self.skipped.in_a_row = 0
        self._norms = [*self._norms[1 - _CLIP_WINDOW :], norm]
        limit = self._config.clip_factor * statistics.median(self._norms)
        shrink = min(1.0, limit / norm) if norm > 0 else 1.0
        if shrink < 1.0:
            torch._foreach_mul_(present, shrink)
        for parameter, gradient in zip(self.parameters.values(), gradients):
            if gradient is not None and gradient.stride() != parameter.stride():
                # PyTorch's fused Adam reads both in the order of memory
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        self.optimizer.step(self.schedule.factor(self.num_steps))
        for parameter in self.parameters.values():
            parameter.grad = None

    def _remember(self) -> None:
        """Updates the average and the best parameters; goes back to these where the loss runs away."""
        parameters = [*map(Tensor.detach, self.parameters.values())]
        weight = self.schedule.average_weight(self.num_steps)
        torch._foreach_lerp_(self._average, parameters, weight)
        if self.num_steps % _BLOCK:
            return
        loss = statistics.fmean(self.losses[-_BLOCK:])
        if loss < self._best_loss:
            self._best, self._best_loss = self._values(), loss
        elif isinstance(self.optimizer, Adam) and self._runs_away():
            self.set_parameters(self._best)
            self._average, self._norms = self._values(), []
            self.optimizer.restart(self._config.retreat)

    def _runs_away(self) -> bool:
        """Whether half of the last steps have a larger loss than any of the first, or all of them none."""
        if self.skipped.in_a_row >= _BLOCK:
            return True
        # of whole epochs: some batches have larger losses than others
        count = self.schedule.whole_epochs(_BLOCK)
        if self.num_steps < 2 * count:
            return False
        first = [*filter(math.isfinite, self.losses[:count])]
        last = [*filter(math.isfinite, self.losses[-count:])]
        return bool(first and last) and statistics.median(last) > max(first)

    def _score(self) -> Score:
        return score_of(self.objective, self._config.num_compared)

    def _values(self) -> list[Tensor]:
        return [*map(torch.clone, map(Tensor.detach, self.parameters.values()))]

    @torch.no_grad()
    def set_parameters(self, values: Iterable[Tensor]) -> None:
        """Puts the parameters at given values, one for each, in place."""
        for parameter, value in zip(self.parameters.values(), values):
            parameter.copy_(value)

    def select_parameters(self) -> str:
        """Leaves the last parameters, or the averaged ones if their ELBO is clearly larger; says which."""
        if not self.losses:
            return "last"
        last, state, draws = self._values(), torch.get_rng_state(), list[Tensor]()
        for values in (last, self._average):
            torch.set_rng_state(state)
            self.set_parameters(values)
            found = self.objective.elbo_draws(self._config.num_compared)
            draws.append(found.detach().double())
        gain = draws[1] - draws[0]
        if float(gain.mean()) > _CLEAR * float(gain.std()) / len(gain) ** 0.5:
            return "averaged"
        if not bool(draws[0].isfinite().all()) and bool(draws[1].isfinite().all()):
            return "averaged"
        self.set_parameters(last)
        return "last"

    def state(self) -> dict[str, Any]:
        """Everything that changes, in tensors and plain data."""
        return {
            **{name: copy.deepcopy(getattr(self, f"_{name}")) for name in _COPIED},
            "parameters": dict(zip(self.parameters, self._values())),
            "optimizer": self.optimizer.state(),
            "schedule": {name: getattr(self.schedule, name) for name in _END},
            "losses": torch.tensor(self.losses, dtype=torch.float64, device="cpu"),
            "counts": [self.skipped.count, self.skipped.in_a_row, self.num_gradients],
            "culprits": dict(self.skipped.sites),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` returned; an error if it is of other parameters."""
        expected = {name: tuple(p.shape) for name, p in self.parameters.items()}
        got = {name: tuple(p.shape) for name, p in state["parameters"].items()}
        if expected != got:
            raise ValueError(f"checkpoint: expected the parameters {expected}, got {got}")
        self.set_parameters(state["parameters"].values())
        self.optimizer.restore(state["optimizer"])
        self.schedule = replace(self.schedule, **state["schedule"])
        self.losses = state["losses"].tolist()
        count, in_a_row, self.num_gradients = state["counts"]
        self.skipped = SkippedSteps(count, in_a_row, Counter(state["culprits"]))
        for name in _COPIED:
            setattr(self, f"_{name}", state[name])
