# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The stages of a fit, after its set-up: initialize, optimize, evaluate."""

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import nn

from ..joint import LogJoint
from ..joint.handlers import hidden_sites
from ..joint.protocols import FlowGuide, MinibatchGuide, ScaledSteps
from . import checkpoint as files
from .config import FitConfig
from .data.checks import check_use
from .data.loader import Batch, BatchStream
from .evaluation.evaluate import FitStatus, ModelAndGuide, evaluate, evaluate_minibatches
from .initialization.minibatch_start import find_initial_minibatch_guide
from .initialization.search import UNCHANGED, InitialGuide, find_initial_guide
from .objectives.minibatch_elbo import MinibatchObjective, validation_batches
from .objectives.objective import BatchObjective, Objective
from .objectives.path_gradient import PathObjective
from .objectives.pyro_elbo import PyroObjective
from .optimization.schedule import Schedule, new_schedule
from .optimization.selection import choose_step_size, select_parameters
from .optimization.training import Trainer, Training
from .result import FitResult
from .session import ProgressBar

Path = str | os.PathLike[str]
Callback = Callable[[int, float], object]


@dataclass(frozen=True)
class Problem:
    """What is fitted.

    :param subject: the model, the guide, and arguments of both: of a mini-batch, where they change.
    :param objective: what is minimized.
    :param schedule: that of a fit which finds its end itself.
    :param by_path: whether the guide is initialized, and trained by the path gradient.
    :param looped_because: why draws are evaluated one after the other; empty where they are not.
    :param stream: the batches of a loader, if there is one.
    :param minibatches: the objective again, if its arguments change from step to step.
    :param config: the settings of the fit.
    :param began: when it began, in seconds of :func:`time.perf_counter`.
    """

    subject: ModelAndGuide
    objective: Objective
    schedule: Schedule
    by_path: bool
    looped_because: str
    stream: BatchStream | None
    minibatches: MinibatchObjective | None
    config: FitConfig
    began: float

    def trainer(self, num_steps: int | None, num_particles: int, optim: object) -> Trainer:
        """Makes trainings of so many steps, with so many draws for each.

        :param num_steps: the number of steps; ``None`` where the fit finds its end itself.
        :param optim: the user's optimizer; ``None`` for Adam.
        """
        guide = self.subject.guide
        scales = guide if isinstance(guide, ScaledSteps) else None
        schedule = self.schedule.of_length(num_steps)
        return Trainer(self.objective, schedule, num_particles, optim, scales, self.stream)


@dataclass(frozen=True)
class Initialized:
    """What was done before the first step.

    :param initial: the initial guide.
    :param step_size: the step size; ``None`` where the optimizer is the user's.
    :param search_steps: the steps that the learning-rate search took.
    :param seconds: the seconds of a fit that this one goes on from.
    """

    initial: InitialGuide
    step_size: float | None = None
    search_steps: int = 0
    seconds: float = 0.0


class Ending(NamedTuple):
    """Why the steps ended, and whether as planned, or asked for by the callback."""

    reason: str
    is_planned: bool


def set_up(
    model: Callable[..., object],
    guide: Callable[..., object],
    arguments: Batch,
    stream: BatchStream | None,
    config: FitConfig,
) -> Problem:
    """Runs model and guide once, and finds out how they can be fitted.

    :param arguments: the arguments of both, unless they come from the stream.
    """
    began = time.perf_counter()
    validation = [arguments] if stream is None else validation_batches(stream, config.minibatch)
    args, kwargs = arguments = validation[0]
    # the guide learns the latents of its model, and enters its parameters into Pyro's store
    with torch.no_grad(), hidden_sites():
        guide(*args, **kwargs)
    log_joint = LogJoint(model, args, kwargs)
    if stream is not None:
        check_use(stream, guide, log_joint, arguments)
    subject = ModelAndGuide(model, guide, args, kwargs, log_joint)
    # a guide that lacks a latent is an error now, and not after the last step
    next(subject.weighted_draws(1))
    minibatches, num_batches = None, None
    if stream is None or _is_all_data(stream, log_joint):
        of_batch = _objective_of_batch(subject, config, config.optimization.num_estimates)
    else:
        of_batch = _objective_of_batch(subject, config, config.minibatch.num_estimates)
        minibatches = MinibatchObjective(of_batch, stream, log_joint, validation, config.minibatch)
        num_batches = stream.num_batches
    by_path = isinstance(of_batch, PathObjective)
    schedule = new_schedule(config.optimization, by_path, num_batches, log_joint.is_subsampled)
    looped_because = _why_looped(of_batch, log_joint)
    if looped_because:
        warnings.warn(
            "the model cannot be evaluated at many draws at once, so that it is run for one draw "
            f"after the other, which is slow ({looped_because}). Write it without branches "
            "on values of its latents, and index from the right, or take fewer num_particles",
            stacklevel=3,
        )
    objective = minibatches or of_batch
    return Problem(
        subject, objective, schedule, by_path, looped_because, stream, minibatches, config, began
    )


def _objective_of_batch(
    subject: ModelAndGuide, config: FitConfig, num_estimates: int
) -> BatchObjective:
    """The objective for one batch: by the path gradient, if the guide has all latents of the model."""
    model, guide, args, kwargs, log_joint = subject
    offered: object = guide
    if isinstance(offered, FlowGuide):
        with torch.no_grad():
            latent, _ = offered.rsample_and_log_prob(1)
        if latent.shape[-1] == log_joint.latents.latent_dim:
            return PathObjective(log_joint, offered, config.optimization)
    return PyroObjective(model, guide, Batch(args, kwargs), log_joint, num_estimates)


def _why_looped(objective: BatchObjective, log_joint: LogJoint) -> str:
    """Why draws are evaluated one after the other; empty where they are not."""
    if isinstance(objective, PathObjective):
        return log_joint.reason
    if isinstance(objective, PyroObjective) and objective.is_vectorized:
        return ""
    return log_joint.reason or "model and guide do not run in a plate of particles"


def _is_all_data(stream: BatchStream, log_joint: LogJoint) -> bool:
    """Whether the only batch is as good as arguments."""
    return stream.num_batches == 1 and stream.is_partition and not log_joint.is_subsampled


def initialize(problem: Problem, trainer: Trainer, bar: ProgressBar) -> Initialized:
    """Puts the guide at the best initial one, and chooses a step size."""
    subject, config = problem.subject, problem.config.initialization
    guide: object = subject.guide
    initial = InitialGuide(UNCHANGED, math.nan, None)
    if isinstance(guide, FlowGuide) and problem.by_path:
        bar.say("start")
        minibatches = problem.minibatches
        density = subject.log_joint if minibatches is None else minibatches.mean_log_joint()
        model = partial(subject.model, *subject.args, **subject.kwargs)
        initial = find_initial_guide(density, model, guide, config)
    elif isinstance(guide, MinibatchGuide):
        bar.say("start")
        arguments, draws = Batch(subject.args, subject.kwargs), problem.objective.elbo_draws
        initial = find_initial_minibatch_guide(
            subject.log_joint, subject.model, guide, arguments, draws, config
        )
    if trainer.optim is not None:
        return Initialized(initial)
    bar.say("step size")
    return Initialized(initial, *choose_step_size(trainer))


def resume_fit(
    problem: Problem, trainer: Trainer, num_steps: int | None, path: Path
) -> tuple[Initialized, Training]:
    """A fit where a checkpoint has left it.

    :param num_steps: the number of steps, if it was given.
    :param path: the file of the checkpoint.
    """
    state = files.read(path)
    files.check_same(state, num_steps=num_steps, num_particles=trainer.num_particles)
    if (state["step_size"] is None) != (trainer.optim is not None):
        raise ValueError("resume: expected the optim that the checkpoint was made with")
    if state["guide"] is not None:
        files.load_guide(problem.subject.guide, state["guide"])
    initial = InitialGuide(state["start"], state["start_elbo"], files.unpack_modes(state["modes"]))
    initialized = Initialized(
        initial, state["step_size"], state["num_pilot_steps"], state["seconds"]
    )
    schedule = problem.schedule.of_length(state["num_steps"])
    training = replace(trainer, schedule=schedule).new(initialized.step_size)
    training.restore(state["training"])
    if not _restore_stream(problem, state.get("batches")):
        warnings.warn(
            "resume: the order of the loader's batches is not known, so that the fit goes on from "
            "the next epoch and not from the middle of one. A DataLoader with a sampler of "
            "PyTorch, or a list, can go on from there",
            stacklevel=3,
        )
    files.set_random_state(state["random"])
    return initialized, training


def _restore_stream(problem: Problem, state: dict[str, Any] | None) -> bool:
    """Whether the stream is where the checkpoint left it."""
    if (state is None) != (problem.minibatches is None):
        raise ValueError("resume: expected a loader where the checkpoint was made with one")
    if problem.stream is None or problem.minibatches is None or state is None:
        return True
    is_in_place = problem.stream.restore(state)
    validation = validation_batches(problem.stream, problem.config.minibatch)
    problem.minibatches.compare_on(validation)
    return is_in_place


def optimize(
    training: Training,
    stream: BatchStream | None,
    save: Callable[[], None] | None,
    callback: Callback | None,
    bar: ProgressBar,
    interrupted: Event,
) -> Ending:
    """Takes steps until the training is over, or the callback or Ctrl-C ends it.

    :param stream: the mini-batches, if there are several.
    :param save: saves a checkpoint.
    """
    bar.say("fit")
    is_asked_to_end = False
    every = training.schedule.config.checkpoint_every
    while not (training.is_over() or interrupted.is_set() or is_asked_to_end):
        loss, end = training.step(), training.schedule.end
        bar.update(training.losses, end, *(() if stream is None else stream.place(end)))
        if save is not None and training.num_steps % every == 0:
            save()
        if callback is not None:
            is_asked_to_end = callback(training.num_steps, -loss) is True
    if save is not None:
        save()
    if is_asked_to_end:
        return Ending("the callback asked to stop", True)
    if not training.is_over():
        return Ending("it was interrupted", False)
    return Ending(training.schedule.reason, True)


def save_checkpoint(
    path: Path, problem: Problem, initialized: Initialized, training: Training
) -> None:
    """Saves everything that a fit needs to go on."""
    guide, minibatches = problem.subject.guide, problem.minibatches
    batches = None if minibatches is None or problem.stream is None else problem.stream.state()
    state = {
        "guide": guide.state_dict() if isinstance(guide, nn.Module) else None,
        "num_steps": training.schedule.num_steps,
        "num_particles": training.num_particles,
        "step_size": initialized.step_size,
        "num_pilot_steps": initialized.search_steps,
        "seconds": initialized.seconds + time.perf_counter() - problem.began,
        "start": initialized.initial.name,
        "start_elbo": initialized.initial.elbo,
        "modes": files.pack_modes(initialized.initial.modes),
        "training": training.state(),
        "batches": batches,
        "random": files.random_state(),
    }
    files.write(path, state)


def conclude(
    problem: Problem, initialized: Initialized, training: Training, ending: Ending
) -> FitResult:
    """The result of a fit, with the guide at the best parameters."""
    if problem.stream is not None:
        problem.stream.close()
    end, config = select_parameters(training), problem.config.evaluation
    status = FitStatus(training.num_skipped / max(training.num_steps, 1), ending.is_planned)
    if problem.minibatches is not None:
        found = evaluate_minibatches(problem.subject, problem.minibatches, status, config)
    else:
        found = evaluate(problem.subject, initialized.initial.modes, status, config)
    return FitResult(
        **found.result_fields(),
        history=[-loss for loss in training.losses],
        num_steps=training.num_steps,
        num_skipped=training.num_skipped,
        num_gradients=training.num_gradients + initialized.search_steps * training.num_particles,
        seconds=initialized.seconds + time.perf_counter() - problem.began,
        stopped_because=ending.reason,
        start=initialized.initial.name,
        end=end,
        step_size=initialized.step_size,
        culprits=dict(training.nonfinite_sites),
        one_at_a_time=problem.looped_because,
    )
