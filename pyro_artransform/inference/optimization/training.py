# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The steps of a fit, and choices by the ELBO on common noise: of the step size, and of the end."""

import copy
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...diagnostics import fit_tail
from ...joint.protocols import ScaledSteps
from ..config import OptimizationConfig
from ..loader import BatchStream
from ..parallel import Gradients, Parallel
from .objective import Objective
from .optimizers import Adam, PyroOptimizer, TorchOptimizer, wrap_optimizer
from .schedule import Schedule, Score, gap_of, is_good, quick_score, score_of

_END = ("decay_start", "tail_start", "end", "reason")
_COPIED = ("norms", "average", "best", "best_loss", "kept")


class FitError(RuntimeError):
    """A fit that cannot go on."""


@dataclass
class SkippedSteps:
    """How many steps were skipped, how many of them in a row, and because of which sites."""

    count: int = 0
    in_a_row: int = 0
    sites: Counter[str] = field(default_factory=Counter)

    def note(self, objective: Objective, config: OptimizationConfig) -> None:
        """Counts one more, and names its sites; an error if there are too many in a row."""
        self.count += 1
        self.in_a_row += 1
        if self.count <= config.max_named:  # naming a site runs the model again
            self.sites.update(objective.nonfinite_sites() or ["the gradient"])
        if self.in_a_row >= config.max_skips:
            raise FitError(
                f"the fit stopped: the loss or its gradient was not finite in {self.in_a_row} steps "
                f"in a row, because of {', '.join(self.sites)}. The parameters are finite, as the "
                "last good step left them. Check the data, and that the model and its gradient are finite "
                "for all its latents: what a mask or torch.where leaves out of a value, NaN for example, "
                "stays in its gradient"
            )


@dataclass(frozen=True)
class Trainer:
    """Makes the trainings of a fit, by Adam or the user's optimizer: one for each step size it tries."""

    objective: Objective
    schedule: Schedule
    num_particles: int
    optim: object = None
    scales: ScaledSteps | None = None
    stream: BatchStream | None = None
    parallel: Parallel | None = None

    def new(self, step_size: float | None, schedule: Schedule | None = None) -> "Training":
        """A training that begins at the present parameters, and at the first mini-batch."""
        if self.stream is not None:
            self.stream.restart()
        return Training(self, step_size, schedule or self.schedule)


class Training:
    """The state of a fit between two steps, all of which can be saved and restored."""

    def __init__(self, trainer: Trainer, step_size: float | None, schedule: Schedule) -> None:
        self.objective, self.num_particles = trainer.objective, trainer.num_particles
        self.schedule, self._config, self.step_size = schedule, schedule.config, step_size
        self._parallel = trainer.parallel
        self.parameters = self.objective.parameters()
        if not self.parameters:
            raise ValueError("there is nothing to train: neither guide nor model has parameters")
        trained = list(self.parameters.values())
        self.optimizer: Adam | TorchOptimizer | PyroOptimizer
        if step_size is None:
            self.optimizer = wrap_optimizer(trainer.optim, trained)
        else:
            self.optimizer = Adam(trained, step_size, self._config.betas, trainer.scales)
        #: the loss of each step, not a finite number where the step was skipped
        self.losses: list[float] = []
        #: gradients of the model's log density, one for each draw
        self.num_gradients = 0
        self.skipped = SkippedSteps()
        self._norms: list[float] = []
        self._average, self._best, self._best_loss = self._values(), self._values(), math.inf
        # the weights say nothing of the parameters of a model
        self._has_checks = self.objective.has_weights and self.objective.is_guide_alone()
        #: the parameters at some steps on the way, by name
        self._kept: dict[str, list[Tensor]] = {}

    @property
    def num_steps(self) -> int:
        """The steps taken so far, the skipped ones included."""
        return len(self.losses)

    def is_over(self) -> bool:
        """Whether the schedule is at its end."""
        return self.schedule.is_over(self.num_steps)

    @torch.enable_grad()
    def step(self) -> float:
        """Takes one step, or skips it; returns the loss, the negative ELBO in nats."""
        objective, num_draws = self.objective, self.num_particles
        is_for_tails = self.schedule.is_for_tails(self.num_steps)
        loss = (objective.tail_loss if is_for_tails else objective.loss)(num_draws)
        self.num_gradients += num_draws * (self._config.tail_particles if is_for_tails else 1)
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
            self.skipped.note(objective, self._config)
        self.losses.append(value if math.isfinite(norm) else math.nan)
        self._remember()
        self.schedule = self.schedule.observe(self.losses, self._gap)
        if self._has_checks and self.schedule.is_for_check(self.num_steps):
            present = self._values()
            self.set_parameters(self._average)
            score = quick_score(objective, self._config)
            self.set_parameters(present)
            self.schedule = self.schedule.after_check(self.num_steps, score)
        return value

    def _take(self, gradients: Gradients, present: list[Tensor], norm: float) -> None:
        self.skipped.in_a_row = 0
        self._norms = [*self._norms[1 - self._config.clip_window :], norm]
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
        """Updates the running average and the best parameters, and keeps candidates on the way."""
        step, plan, block = self.num_steps, self.schedule, self._config.best_block
        parameters = [*map(Tensor.detach, self.parameters.values())]
        torch._foreach_lerp_(self._average, parameters, plan.average_weight(step))
        if plan.end is not None:
            # later steps may lose the tails of a posterior for the sake of its middle
            if step == plan.decay_start + (plan.tail_start - plan.decay_start) // 3:
                self._kept["averaged on the way"] = copy.deepcopy(self._average)
            if step == plan.tail_start != plan.end:
                draws = self.objective.elbo_draws(self._config.selection_draws)
                if plan.num_steps is None and fit_tail(draws).khat <= self._config.tail_good_khat:
                    self.schedule = replace(plan, end=step)
                self._kept["last before the tails"] = self._values()
        if step % block == 0:
            loss = statistics.fmean(self.losses[-block:])
            if loss < self._best_loss:
                self._best, self._best_loss = self._values(), loss
            elif isinstance(self.optimizer, Adam) and self._runs_away():
                # on from the best parameters with a smaller step size
                self.set_parameters(self._best)
                self._average, self._norms = self._values(), []
                self.step_size = self.optimizer.restart(self._config.retreat)

    def _runs_away(self) -> bool:
        """Whether half of the last steps have a larger loss than any of the first."""
        # of whole epochs: some batches have larger losses than others
        count = self.schedule.whole_epochs(self._config.best_block)
        if self.num_steps < 2 * count or self.schedule.is_for_tails(self.num_steps - 1):
            return False
        first = [*filter(math.isfinite, self.losses[:count])]
        last = [*filter(math.isfinite, self.losses[-count:])]
        return bool(first and last) and statistics.median(last) > max(first)

    def _gap(self) -> float:
        """How far the ELBO is from the evidence, by importance sampling; 0 without log weights."""
        if not self.objective.has_weights:
            return 0.0
        return gap_of(self.objective.elbo_draws(self._config.selection_draws))

    def _values(self) -> list[Tensor]:
        return [*map(torch.clone, map(Tensor.detach, self.parameters.values()))]

    @torch.no_grad()
    def set_parameters(self, values: Iterable[Tensor]) -> None:
        """Puts the parameters at given values, one for each, in place."""
        for parameter, value in zip(self.parameters.values(), values):
            parameter.copy_(value)

    def candidates(self) -> dict[str, list[Tensor]]:
        """What the fit could end with, by name: the values of all parameters."""
        averaged = {"averaged": self._average} if self.losses else {}
        best = {"best": self._best} if math.isfinite(self._best_loss) else {}
        return {"last": self._values(), **averaged, **self._kept, **best}

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


def is_at_posterior(trainer: Trainer) -> bool:
    """Whether nothing is left to win before a step, where the fit finds its end by the guide's weights."""
    objective, schedule = trainer.objective, trainer.schedule
    is_asked = schedule.num_steps is not None or trainer.optim is not None
    if is_asked or not objective.has_weights or not objective.is_guide_alone():
        return False
    return is_good(quick_score(objective, schedule.config), schedule.config)


def begin(trainer: Trainer) -> tuple[Training, int]:
    """A training with the largest step size that a few steps do not speak against.

    A small step size seems best after a few steps and is slow after many: its ELBO has to be clearly
    larger. A fit that finds its end itself goes on from these steps; one of a given number begins anew.

    :return: the training, and the number of steps that the search took without it.
    """
    config = trainer.schedule.config
    # no longer than the fit, and at a constant step size throughout
    num_steps = min(config.search_steps, trainer.schedule.end or config.search_steps)
    schedule = replace(trainer.schedule, end=None)
    state = torch.get_rng_state()
    trials, num_taken, best = list[tuple[float, Training, list[Tensor]]](), 0, -math.inf
    # networks of presets give a tenth, those of a model do not (tutorials/vae_iaf.ipynb)
    first = 0 if trainer.objective.is_guide_alone() else 1
    for step_size in config.step_sizes[first:] or config.step_sizes:
        torch.set_rng_state(state)
        training, score = trainer.new(step_size, schedule), Score()
        before = training.candidates()["last"]
        with suppress(FitError):
            while training.num_steps < num_steps and not training.is_over():
                training.step()
            score = score_of(training.objective, config.search_draws)
        num_taken += training.num_steps
        trials.append((score.elbo, training, training.candidates()["last"]))
        training.set_parameters(before)
        # what cannot win any more is not held
        best = max(best, score.elbo)
        trials = [trial for trial in trials if trial[0] >= best - config.search_min_gain]
        if score.gap < config.search_min_gain:
            break
    elbo, chosen, values = trials[0]
    if trainer.schedule.end is not None or not math.isfinite(elbo):
        return trainer.new(chosen.step_size), num_taken
    chosen.set_parameters(values)
    return chosen, num_taken - chosen.num_steps


def select_parameters(training: Training) -> str:
    """Leaves the parameters at the best candidate, by :func:`best_of`; returns its name."""
    config, candidates = training.schedule.config, training.candidates()
    if len(candidates) == 1:  # no step was taken
        return next(iter(candidates))
    state = torch.get_rng_state()
    scores = {}
    for name, values in candidates.items():
        torch.set_rng_state(state)
        training.set_parameters(values)
        scores[name] = score_of(training.objective, config.selection_draws)
    best = best_of(scores, config)
    training.set_parameters(candidates[best])
    return best


def best_of(scores: dict[str, Score], config: OptimizationConfig) -> str:
    """The name of the largest ELBO, or of a clearly smaller k-hat among those next to equal."""
    best, best_value = "", -math.inf
    least = max(scores.values()).elbo - config.selection_as_good
    for name, score in scores.items():
        price = config.khat_price * max(score.khat, config.selection_good_khat)
        excess = max(score.khat - config.selection_bad_khat, 0.0)
        value = score.elbo - (price + config.khat_price_without_variance * excess)
        if score.elbo >= least and (not best or value > best_value):
            best, best_value = name, value
    return best
