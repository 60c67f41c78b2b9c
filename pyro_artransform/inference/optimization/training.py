# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The steps of a fit: gradients that are clipped, skipped where they are not finite, and averaged."""

import math
import statistics
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ...diagnostics import fit_tail
from ..objectives.elbo import TAIL_PARTICLES, Objective
from .optimizers import Optimiser
from .pace import Pace
from .schedule import Schedule

_CLIP_WINDOW = 100
_CLIP_FACTOR = 3.0
_BLOCK = 50
# in a row; a posterior that fails so often does not come right by itself
_MAX_SKIPS = 100
# far enough from 0.5, above which weights have no variance, for the noise of k-hat
_GOOD_KHAT = 0.35
_NUM_DRAWS = 5000
# naming a culprit runs the model again
_MAX_NAMED = 20


class FitError(RuntimeError):
    """A fit that cannot go on."""


def gap_of(log_weights: Tensor) -> float:
    """How far the ELBO is from the log evidence, in nats, by importance sampling.

    :param log_weights: of draws of the guide, shape ``(n,)``.
    """
    log_evidence = log_weights.logsumexp(0) - math.log(len(log_weights))
    return float(log_evidence - log_weights.mean())


class Training:
    """A fit between its start and its end, of which everything can be saved and restored.

    :param objective: what to minimise.
    :param parameters: what to train, by name.
    :param optimiser: takes the steps.
    :param schedule: says how large they are, and when to end.
    :param num_particles: draws for each step.
    :param pace: says how far back the average of the parameters reaches; by default about 100 steps.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: dict[str, Tensor],
        optimiser: Optimiser,
        schedule: Schedule,
        num_particles: int,
        pace: Pace | None = None,
    ) -> None:
        self.objective, self.parameters = objective, parameters
        self.optimiser, self.schedule = optimiser, schedule
        self.num_particles = num_particles
        self._pace = pace or Pace(schedule.max_constant)
        #: the loss of each step, not a finite number where the step was skipped
        self.losses: list[float] = []
        self.num_skipped = 0
        #: gradients of the model's log density, one for each draw
        self.num_gradients = 0
        self.culprits: Counter[str] = Counter()
        self._skips_in_a_row = 0
        self._norms: list[float] = []
        self._average = self._snapshot()
        self._best = self._snapshot()
        self._best_loss = math.inf
        self._kept: dict[str, list[Tensor]] = {}

    @property
    def num_steps(self) -> int:
        """The steps taken so far, the skipped ones included."""
        return len(self.losses)

    def is_over(self) -> bool:
        """Whether the schedule is at its end."""
        return self.schedule.is_over(self.num_steps)

    def step(self) -> float:
        """Takes one step.

        :return: the loss, the negative ELBO in nats.
        :raises FitError: if the loss or its gradient was not finite for many steps in a row.
        """
        loss, gradients = self._loss_and_gradients()
        norm = math.inf
        if math.isfinite(loss):
            norm = _norm([g for g in gradients if g is not None])
        if math.isfinite(norm):
            self._take(gradients, norm)
        else:
            self._skip()
        self.losses.append(loss if math.isfinite(norm) else math.nan)
        self._remember()
        self.schedule.observe(self.losses, self._gap)
        return loss

    def _gap(self) -> float:
        """How far the ELBO is from the evidence, by importance sampling; 0 without log weights."""
        if not self.objective.has_weights:
            return 0.0
        return gap_of(self.objective.elbo_draws(_NUM_DRAWS))

    @torch.enable_grad()
    def _loss_and_gradients(self) -> tuple[float, list[Tensor | None]]:
        is_for_tails = self.schedule.is_for_tails(self.num_steps)
        loss_of = self.objective.tail_loss if is_for_tails else self.objective.loss
        loss = loss_of(self.num_particles)
        self.num_gradients += self.num_particles * (TAIL_PARTICLES if is_for_tails else 1)
        if not loss.requires_grad:
            raise FitError("there is nothing to train: neither guide nor model has parameters")
        value = loss.item()
        if not math.isfinite(value):
            return value, []
        trained = list(self.parameters.values())
        return value, list(torch.autograd.grad(loss, trained, allow_unused=True))

    def _take(self, gradients: list[Tensor | None], norm: float) -> None:
        self._skips_in_a_row = 0
        self._norms = [*self._norms[1 - _CLIP_WINDOW :], norm]
        limit = _CLIP_FACTOR * statistics.median(self._norms)
        shrink = min(1.0, limit / norm) if norm > 0 else 1.0
        for parameter, gradient in zip(self.parameters.values(), gradients):
            parameter.grad = None if gradient is None else gradient.mul_(shrink)
        self.optimiser.step(self.schedule.factor(self.num_steps))
        for parameter in self.parameters.values():
            parameter.grad = None

    def _skip(self) -> None:
        self.num_skipped += 1
        self._skips_in_a_row += 1
        if self.num_skipped <= _MAX_NAMED:
            self.culprits.update(self.objective.culprits() or ["the gradient"])
        if self._skips_in_a_row >= _MAX_SKIPS:
            raise FitError(
                f"the fit stopped: the loss or its gradient was not finite in {_MAX_SKIPS} steps in a "
                f"row, because of {', '.join(self.culprits)}. The parameters are finite, as the last "
                "good step left them. Check the data, and whether the model is finite for all values "
                "of its latents"
            )

    def _remember(self) -> None:
        """Keeps the running average, and the parameters after the best block of steps."""
        with torch.no_grad():
            trained = list(self.parameters.values())
            weight = self._pace.average_weight(self.num_steps)
            torch._foreach_lerp_(self._average, trained, weight)
        self._keep_on_the_way()
        if self.num_steps % _BLOCK == 0:
            loss = statistics.fmean(self.losses[-_BLOCK:])
            if loss < self._best_loss:
                self._best, self._best_loss = self._snapshot(), loss

    def _keep_on_the_way(self) -> None:
        """Keeps what later steps, which see the middle of a posterior better, may lose at its rim."""
        schedule, step = self.schedule, self.num_steps
        if schedule.decay_start is None or schedule.tail_start is None:
            return
        if step == schedule.decay_start + (schedule.tail_start - schedule.decay_start) // 3:
            self._kept["averaged on the way"] = [value.clone() for value in self._average]
        if step == schedule.tail_start != schedule.end:
            if fit_tail(self.objective.elbo_draws(_NUM_DRAWS)).khat <= _GOOD_KHAT:
                schedule.skip_tails()
            self._kept["last before the tails"] = self._snapshot()

    def _snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters.values()]

    def set_parameters(self, values: list[Tensor]) -> None:
        """Puts the parameters at given values, in place.

        :param values: one for each parameter.
        """
        with torch.no_grad():
            for parameter, value in zip(self.parameters.values(), values):
                parameter.copy_(value)

    def candidates(self) -> dict[str, list[Tensor]]:
        """What the fit could end with, by name: the values of all parameters."""
        found = {"last": self._snapshot()}
        if self.num_steps:
            found["averaged"] = self._average
        found.update(self._kept)
        if math.isfinite(self._best_loss):
            found["best"] = self._best
        return found

    def state(self) -> dict[str, Any]:
        """Everything that changes, in tensors and plain data."""
        return {
            "parameters": dict(zip(self.parameters, self._snapshot())),
            "optimiser": self.optimiser.state(),
            "schedule": self.schedule.state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64, device="cpu"),
            "norms": list(self._norms),
            "average": [value.clone() for value in self._average],
            "best": [value.clone() for value in self._best],
            "kept": {name: [v.clone() for v in values] for name, values in self._kept.items()},
            "counts": [self.num_skipped, self._skips_in_a_row, self.num_gradients],
            "best_loss": self._best_loss,
            "culprits": dict(self.culprits),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` returned.

        :raises ValueError: if it is of other parameters.
        """
        expected = {name: tuple(p.shape) for name, p in self.parameters.items()}
        got = {name: tuple(p.shape) for name, p in state["parameters"].items()}
        if expected != got:
            raise ValueError(f"checkpoint: expected the parameters {expected}, got {got}")
        self.set_parameters(list(state["parameters"].values()))
        self.optimiser.restore(state["optimiser"])
        self.schedule.restore(state["schedule"])
        self.losses = state["losses"].tolist()
        self._norms = list(state["norms"])
        self._average = [value.clone() for value in state["average"]]
        self._best = [value.clone() for value in state["best"]]
        self._kept = {name: [v.clone() for v in vs] for name, vs in state["kept"].items()}
        self.num_skipped, self._skips_in_a_row, self.num_gradients = state["counts"]
        self._best_loss = state["best_loss"]
        self.culprits = Counter(state["culprits"])


def _norm(gradients: list[Tensor]) -> float:
    norms = torch._foreach_norm(gradients)
    return float(torch.stack([norm.double() for norm in norms]).norm().item())
