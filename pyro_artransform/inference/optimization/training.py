# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The steps of a fit to a model, and the choice of the parameters that it ends with."""

import copy
import math
import statistics
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...joint.protocols import ScaledSteps
from ..parallel import Parallel
from .objective import Objective
from .optimizers import Adam, users_optimizer
from .schedule import Schedule, score_of
from .steps import FitError, Steps

_END = ("decay_start", "end", "reason")
# standard errors by which the average has to be better than the last parameters
_CLEAR = 2.0
_COPIED = ("norms", "average", "best", "best_loss")
_BLOCK = 50  # steps whose mean loss says which parameters were the best


class Training(Steps):
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
        self.schedule, self._config = schedule, schedule.config
        self._parallel = parallel or Parallel()
        self.parameters = objective.parameters()
        if not self.parameters:
            raise ValueError("there is nothing to train: neither guide nor model has parameters")
        trained = list(self.parameters.values())
        is_guide_alone, config = objective.is_guide_alone(), self._config
        if optim is None:
            step_size = config.step_size if is_guide_alone else config.model_step_size
            self.optimizer = Adam(trained, step_size, scales)
        else:
            self.optimizer = users_optimizer(optim, trained)
        super().__init__(trained, config.clip_factor)
        #: gradients of the model's log density, one for each draw
        self.num_gradients = 0
        self.start = ""  #: the name of the initial guide
        self.earlier_seconds = 0.0  #: the wall time that the fit took before it was resumed
        self._average, self._best, self._best_loss = self.copies(), self.copies(), math.inf
        # the weights say nothing of the parameters of a model
        self._has_checks = objective.has_weights and is_guide_alone

    @property
    def step_size(self) -> float | None:
        """The largest step size from now on; ``None`` where the optimizer is the user's."""
        return self.optimizer.step_size if isinstance(self.optimizer, Adam) else None

    def check_start(self) -> None:
        """Ends a fit before its first step that finds its end itself, and has nothing left to win."""
        is_asked = self.schedule.num_steps is not None or self.step_size is None
        if self._has_checks and not is_asked:
            self.schedule = self.schedule.after_check(0, self._gap())

    def _gap(self) -> float:
        return score_of(self.objective, self._config.num_compared).gap

    def nonfinite_sites(self) -> list[str]:
        return self.objective.nonfinite_sites()

    def is_over(self) -> bool:
        """Whether the schedule is at its end."""
        return self.schedule.is_over(self.num_steps)

    @torch.enable_grad()
    def step(self) -> float:
        """Takes one step, or skips it; returns the loss, the negative ELBO in nats."""
        count = self.num_particles
        if self.schedule.end is not None and self.num_steps >= self.schedule.decay_start:
            loss, count = self.objective.tail_loss(count)
        else:
            loss = self.objective.loss(count)
        self.num_gradients += count
        if not loss.requires_grad:
            raise FitError("there is nothing to train: neither guide nor model has parameters")
        value, gradients = self.value_and_gradients(loss)
        if isinstance(self.optimizer, Adam):
            self.optimizer.factor = self.schedule.factor(self.num_steps)
        value, gradients = self._parallel.mean(value, gradients, self.trained)
        self.take(value, gradients)
        self._remember()
        self.schedule = self.schedule.observe(self.losses)
        if self._has_checks and self.schedule.is_for_check(self.num_steps):
            present = self.copies()
            self.set_parameters(self._average)
            self.schedule = self.schedule.after_check(self.num_steps, self._gap())
            self.set_parameters(present)
        return value

    def _remember(self) -> None:
        """Updates the average and the best parameters; goes back to these where the loss runs away."""
        parameters = [*map(Tensor.detach, self.trained)]
        weight = self.schedule.average_weight(self.num_steps)
        torch._foreach_lerp_(self._average, parameters, weight)
        if self.num_steps % _BLOCK:
            return
        loss = statistics.fmean(self.losses[-_BLOCK:])
        if loss < self._best_loss:
            self._best, self._best_loss = self.copies(), loss
        elif isinstance(self.optimizer, Adam) and self._runs_away():
            self.set_parameters(self._best)
            self._average, self._norms = self.copies(), []
            self.optimizer.restart(self._config.retreat)

    def _runs_away(self) -> bool:
        """Whether half of the last steps have a larger loss than any of the first, or all of them none."""
        if self.last_are_skipped(_BLOCK):
            return True
        # of whole epochs: some batches have larger losses than others
        count = self.schedule.whole_epochs(_BLOCK)
        if self.num_steps < 2 * count:
            return False
        first = [*filter(math.isfinite, self.losses[:count])]
        last = [*filter(math.isfinite, self.losses[-count:])]
        return bool(first and last) and statistics.median(last) > max(first)

    def select_parameters(self) -> str:
        """Leaves the last parameters, or the averaged ones if their ELBO is clearly larger; says which."""
        if not self.losses:
            return "last"
        last, state, draws = self.copies(), torch.get_rng_state(), list[Tensor]()
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
            "parameters": dict(zip(self.parameters, self.copies())),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {name: getattr(self.schedule, name) for name in _END},
            "losses": torch.tensor(self.losses, dtype=torch.float64, device="cpu"),
            "num_gradients": self.num_gradients,
            "start": self.start,
            "culprits": dict(self.culprits),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` returned; an error if it is of other parameters."""
        expected = {name: tuple(p.shape) for name, p in self.parameters.items()}
        got = {name: tuple(p.shape) for name, p in state["parameters"].items()}
        if expected != got:
            raise ValueError(f"checkpoint: expected the parameters {expected}, got {got}")
        self.set_parameters(state["parameters"].values())
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule = replace(self.schedule, **state["schedule"])
        self.losses = state["losses"].tolist()
        self.num_gradients, self.culprits = state["num_gradients"], Counter(state["culprits"])
        self.start = state["start"]
        for name in _COPIED:
            setattr(self, f"_{name}", state[name])
