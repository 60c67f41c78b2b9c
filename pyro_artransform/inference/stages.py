# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The stages of a fit: set up or resume, initialize, optimize, evaluate."""

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Event
from typing import NamedTuple

import torch
from torch import nn

from ..joint import LogDensity, LogJoint
from ..joint.handlers import hidden_sites
from ..joint.protocols import FlowGuide, MinibatchGuide, ScaledSteps
from . import checkpoint as files
from .config import FitConfig
from .data.checks import check_use
from .data.loader import Batch, BatchStream
from .evaluation.evaluate import ModelAndGuide, evaluate, evaluate_minibatches
from .evaluation.verdict import FitStatus
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

_INTERRUPTED = "it was interrupted"


class Problem(NamedTuple):
    """What is fitted.

    :param subject: the model, the guide, and arguments of both: of a mini-batch, where they change.
    :param objective: what is minimized.
    :param schedule: that of a fit which finds its end itself.
    :param by_path: whether the guide is initialized, and trained by the path gradient.
    :param looped_because: why draws are evaluated one after the other; empty where they are not.
    :param stream: the mini-batches, if there are several.
    :param config: the settings of the fit.
    :param began: when it began, in seconds of :func:`time.perf_counter`.
    """

    subject: ModelAndGuide
    objective: Objective
    schedule: Schedule
    by_path: bool
    looped_because: str
    stream: BatchStream | None
    config: FitConfig
    began: float

    def trainer(self, num_steps: int | None, num_particles: int, optim: object) -> Trainer:
        """Makes trainings of so many steps, with so many draws for each."""
        guide = self.subject.guide
        scales = guide if isinstance(guide, ScaledSteps) else None
        schedule = self.schedule.of_length(num_steps)
        return Trainer(self.objective, schedule, num_particles, optim, scales, self.stream)


class Initialized(NamedTuple):
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


def set_up(
    model: Callable[..., object],
    guide: Callable[..., object],
    arguments: Batch,
    stream: BatchStream | None,
    config: FitConfig,
) -> Problem:
    """Finds out how model and guide can be fitted.

    :param arguments: the arguments of both, unless they come from the stream.
    """
    began = time.perf_counter()
    batches = [arguments] if stream is None else validation_batches(stream, config.minibatch)
    subject = _run_once(model, guide, batches[0], stream)
    log_joint, num_batches = subject.log_joint, None
    if stream and stream.num_batches == 1 and stream.is_partition and not log_joint.is_subsampled:
        stream = None  # the only batch is as good as arguments
    objective: Objective
    objective = of_batch = _objective_of_batch(subject, config, stream is not None)
    if stream is not None:
        objective = MinibatchObjective(of_batch, stream, log_joint, batches, config.minibatch)
        num_batches = stream.num_batches
    by_path = isinstance(of_batch, PathObjective)
    schedule = new_schedule(config.optimization, by_path, num_batches, log_joint.is_subsampled)
    looped_because = _why_looped(of_batch, log_joint)
    return Problem(subject, objective, schedule, by_path, looped_because, stream, config, began)


def _run_once(
    model: Callable[..., object],
    guide: Callable[..., object],
    batch: Batch,
    stream: BatchStream | None,
) -> ModelAndGuide:
    """Runs model and guide, so that what cannot be fitted is an error now."""
    args, kwargs = batch
    # the guide learns the latents of its model, and enters its parameters into Pyro's store
    with torch.no_grad(), hidden_sites():
        guide(*args, **kwargs)
    log_joint = LogJoint(model, args, kwargs)
    if stream is not None:
        check_use(stream, guide, log_joint, batch)
    subject = ModelAndGuide(model, guide, args, kwargs, log_joint)
    next(subject.weighted_draws(1))  # an error if the guide lacks a latent
    return subject


def _objective_of_batch(
    subject: ModelAndGuide, config: FitConfig, is_minibatch: bool
) -> BatchObjective:
    """The objective for one batch: by the path gradient, if the guide has all latents of the model."""
    model, _, args, kwargs, log_joint = subject
    guide: object = subject.guide
    if isinstance(guide, FlowGuide):
        with torch.no_grad():
            latent, _ = guide.rsample_and_log_prob(1)
        if latent.shape[-1] == log_joint.latents.latent_dim:
            return PathObjective(log_joint, guide, config.optimization)
    settings = config.minibatch if is_minibatch else config.optimization
    batch = Batch(args, kwargs)
    return PyroObjective(model, subject.guide, batch, log_joint, settings.num_estimates)


def _why_looped(objective: BatchObjective, log_joint: LogJoint) -> str:
    """Why draws are evaluated one after the other, with a warning; empty where they are not."""
    reason = log_joint.reason
    if isinstance(objective, PyroObjective):
        reason = reason or "model and guide do not run in a plate of particles"
        reason = "" if objective.is_vectorized else reason
    if reason:
        warnings.warn(
            "the model cannot be evaluated at many draws at once, so that it is run for one draw "
            f"after the other, which is slow ({reason}). Write it without branches "
            "on values of its latents, and index from the right, or take fewer num_particles",
            stacklevel=4,
        )
    return reason


def initialize(problem: Problem, trainer: Trainer, bar: ProgressBar) -> Initialized:
    """Puts the guide at the best initial one, and chooses a step size."""
    model, _, args, kwargs, log_joint = problem.subject
    guide: object = problem.subject.guide
    objective, config = problem.objective, problem.config.initialization
    initial = InitialGuide(UNCHANGED, math.nan, None)
    if isinstance(guide, FlowGuide) and problem.by_path:
        bar.say("start")
        density: LogDensity = log_joint
        if isinstance(objective, MinibatchObjective):
            density = objective.mean_log_joint()
        initial = find_initial_guide(density, partial(model, *args, **kwargs), guide, config)
    elif isinstance(guide, MinibatchGuide):
        bar.say("start")
        initial = find_initial_minibatch_guide(
            log_joint, model, guide, Batch(args, kwargs), objective.elbo_draws, config
        )
    if trainer.optim is not None:
        return Initialized(initial)
    bar.say("step size")
    return Initialized(initial, *choose_step_size(trainer))


def optimize(
    training: Training,
    stream: BatchStream | None,
    save: Callable[[], None] | None,
    callback: Callable[[int, float], object] | None,
    bar: ProgressBar,
    interrupted: Event,
) -> str:
    """Takes steps until the training is over, or the callback or Ctrl-C ends it; says which."""
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
        return "the callback asked to stop"
    return training.schedule.reason if training.is_over() else _INTERRUPTED


def conclude(
    problem: Problem, initialized: Initialized, training: Training, stopped_because: str
) -> FitResult:
    """The result of a fit, with the guide at the best parameters."""
    if problem.stream is not None:
        problem.stream.close()
    end, config = select_parameters(training), problem.config.evaluation
    skipped_share = training.num_skipped / max(training.num_steps, 1)
    status = FitStatus(skipped_share, stopped_because != _INTERRUPTED)
    if isinstance(problem.objective, MinibatchObjective):
        found = evaluate_minibatches(problem.subject, problem.objective, status, config)
    else:
        found = evaluate(problem.subject, initialized.initial.modes, status, config)
    return FitResult(
        **found.result_fields(),
        history=[-loss for loss in training.losses],
        num_steps=training.num_steps,
        num_skipped=training.num_skipped,
        num_gradients=training.num_gradients + initialized.search_steps * training.num_particles,
        seconds=initialized.seconds + time.perf_counter() - problem.began,
        stopped_because=stopped_because,
        start=initialized.initial.name,
        end=end,
        step_size=initialized.step_size,
        culprits=dict(training.nonfinite_sites),
        one_at_a_time=problem.looped_because,
    )


def save_checkpoint(
    path: Path, problem: Problem, initialized: Initialized, training: Training
) -> None:
    """Saves everything that a fit needs to go on."""
    guide, stream = problem.subject.guide, problem.stream
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
        "batches": None if stream is None else stream.state(),
        "random": files.random_state(),
    }
    files.write(path, state)


def resume_fit(problem: Problem, trainer: Trainer, path: Path) -> tuple[Initialized, Training]:
    """A fit where a checkpoint has left it."""
    state, num_steps = files.read(path), trainer.schedule.num_steps
    for name, got in (("num_steps", num_steps), ("num_particles", trainer.num_particles)):
        if got not in (state[name], None):
            raise ValueError(f"resume: expected {name}={state[name]!r}, as before, got {got!r}")
    step_size, batches = state["step_size"], state.get("batches")
    if (step_size is None) != (trainer.optim is not None):
        raise ValueError("resume: expected the optim that the checkpoint was made with")
    if state["guide"] is not None:
        files.load_guide(problem.subject.guide, state["guide"])
    initial = InitialGuide(state["start"], state["start_elbo"], files.unpack_modes(state["modes"]))
    schedule = problem.schedule.of_length(state["num_steps"])
    training = replace(trainer, schedule=schedule).new(step_size)
    training.restore(state["training"])
    if (batches is None) != (problem.stream is None):
        raise ValueError("resume: expected a loader where the checkpoint was made with one")
    if batches is not None:
        _restore_stream(problem, batches)
    files.set_random_state(state["random"])
    return Initialized(initial, step_size, state["num_pilot_steps"], state["seconds"]), training


def _restore_stream(problem: Problem, state: files.State) -> None:
    """Goes to the place in the loader where the checkpoint was made."""
    stream, objective = problem.stream, problem.objective
    if stream is None or not isinstance(objective, MinibatchObjective):
        return
    is_in_place = stream.restore(state)
    objective.compare_on(validation_batches(stream, problem.config.minibatch))
    if not is_in_place:
        warnings.warn(
            "resume: the order of the loader's batches is not known, so that the fit goes on from "
            "the next epoch and not from the middle of one. A DataLoader with a sampler of "
            "PyTorch, or a list, can go on from there",
            stacklevel=4,
        )
