# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The set-up of a fit: one run of model and guide, and what follows from it and the options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ..diagnostics.importance_weights import log_joint_of
from ..joint.protocols import FlowGuide, ScaledSteps, StoredGuide, StructuredGuide
from ..joint.speed import warn_if_slow
from .config import FitConfig
from .evaluation.evaluate import ModelAndGuide
from .initialization.start import InitialGuide
from .loader import Batch, BatchStream, check_use
from .mcmc import Deadline, Sampling
from .optimization.objective import (
    BatchObjective,
    MinibatchObjective,
    Objective,
    PathObjective,
    PyroObjective,
    validation_batches,
)
from .optimization.schedule import Schedule
from .optimization.training import Training
from .parallel import Parallel, ScalesOfFirst, SharedObjective

Function = Callable[..., object]
#: of a model, its arguments and whether they are a mini-batch: a guide, and why it is this one
Chooser = Callable[..., tuple[Function, str]]

T = TypeVar("T")


@dataclass(frozen=True)
class SetUp:
    """What a fit consists of before its start.

    :param objective: that of this process alone.
    :param minibatches: the same, where each step sees a mini-batch of the stream.
    :param num_particles: draws for each step, of all processes.
    :param sampling: the draws that were asked for.
    :param looped_because: why the model is run for one draw after the other, if it is.
    """

    subject: ModelAndGuide
    config: FitConfig
    objective: BatchObjective | MinibatchObjective
    schedule: Schedule
    num_particles: int
    optim: object
    stream: BatchStream | None
    sampling: Sampling | None
    deadline: Deadline
    parallel: Parallel | None
    guide_reason: str
    looped_because: str

    @property
    def minibatches(self) -> MinibatchObjective | None:
        return self.objective if isinstance(self.objective, MinibatchObjective) else None

    def new_training(self, schedule: Schedule) -> Training:
        """A training that begins at the present parameters."""
        objective: Objective = self.objective
        guide: object = self.subject.guide
        scales: ScaledSteps | None = guide if isinstance(guide, ScaledSteps) else None
        if self.parallel is not None:
            objective = SharedObjective(objective, self.parallel)
            if scales is not None and self.stream is not None:
                scales = ScalesOfFirst(scales, self.parallel)
        options = self.num_particles, self.optim, scales, self.parallel
        return Training(objective, schedule, *options)

    def by_first(self, what: str, function: Callable[[], T]) -> T:
        """What a function returns in the first process, which alone calls it."""
        return function() if self.parallel is None else self.parallel.first(what, function)

    def copy_first(self) -> None:
        """Gives all parameters and buffers the values that they have in the first process."""
        if self.parallel is not None:
            self.parallel.copy_first(self.tensors())

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers, in an order that all processes have."""
        found = list(self.objective.parameters().values())
        for module in (self.subject.guide, self.subject.model):
            if isinstance(module, nn.Module):
                found += [*module.parameters(), *module.buffers()]
        return found

    def missing(self) -> tuple[str, ...]:
        """Dependencies that a guide with a graph has missed, in words."""
        guide: object = self.subject.guide
        if not isinstance(guide, StructuredGuide):
            return ()
        batches = [Batch(self.subject.args, self.subject.kwargs)]
        if self.minibatches is not None:
            batches = self.minibatches.validation
        return tuple(guide.missing_over_batches(batches))


@dataclass(frozen=True)
class StartedFit:
    """A fit whose guide is at its start, or further.

    :param earlier_seconds: the wall time that the fit took before it was resumed.
    """

    set_up: SetUp
    training: Training
    initial: InitialGuide
    earlier_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """The wall time of the whole fit so far."""
        return self.earlier_seconds + self.set_up.deadline.seconds


def set_up(
    model: Function,
    guide: Function | None,
    choose_guide: Chooser,
    arguments: Batch,
    stream: BatchStream | None,
    config: FitConfig,
    num_steps: int | None,
    num_particles: int | None,
    optim: object,
    parallel: Parallel | None,
    num_draws: int | None,
    max_seconds: float | None,
) -> SetUp:
    """Runs model and guide once; what cannot be fitted is an error here."""
    deadline = Deadline(max_seconds)
    batches = [arguments] if stream is None else validation_batches(stream, config.minibatch)
    is_minibatch, guide_reason = not (stream is None or stream.whole.is_all_data), ""
    if guide is None:
        guide, guide_reason = choose_guide(model, *batches[0], is_minibatch=is_minibatch)
    subject = _run_once(model, guide, batches[0], stream)
    log_joint = subject.log_joint
    if not (is_minibatch or log_joint.is_random):
        stream = None
    of_batch = _objective_of_batch(subject, config, stream is not None)
    objective: BatchObjective | MinibatchObjective = of_batch
    if stream is not None:
        given = of_batch, stream, log_joint, batches, config.minibatch
        objective = MinibatchObjective(*given)
    sampling = None
    if num_draws is not None:
        if stream is not None or log_joint.is_random:
            raise ValueError(
                "draws: expected a model of all data, since chains need its density, got one that sees "
                "mini-batches, or is random otherwise: fit without draws"
            )
        sampling = Sampling(subject, num_draws, deadline, num_steps is None)
    latent_dim = log_joint.latents.latent_dim
    settings = config.optimization.for_latents(latent_dim)
    epoch = 1 if stream is None else stream.num_batches
    if num_particles is None:
        num_particles = settings.num_particles
        is_structured = isinstance(cast(object, guide), StructuredGuide)
        if latent_dim >= settings.many_latents and is_structured:
            num_particles = settings.num_particles_of_many
    total = num_particles
    if parallel is not None:  # a batch is not shared: each process has another one
        own = num_particles if stream is not None else parallel.share(num_particles)
        total = own * parallel.size
    made = SetUp(
        subject,
        config,
        objective,
        Schedule(settings, epoch).of_length(num_steps),
        total,
        optim,
        stream,
        sampling,
        deadline,
        parallel,
        guide_reason,
        _reason_of_loop(of_batch, log_joint.reason),
    )
    if parallel is not None:
        _check_processes(made, parallel, batches[0], num_steps, num_particles)
    warn_if_slow(log_joint, made.looped_because, stacklevel=3)
    return made


def _run_once(
    model: Function, guide: Function, batch: Batch, stream: BatchStream | None
) -> ModelAndGuide:
    """Runs model and guide, so that what cannot be fitted is an error now."""
    (args, kwargs), given = batch, cast(object, guide)
    if isinstance(given, StoredGuide):  # a new guide is to be new, whatever was fitted before
        given.drop_orphans()
    log_joint = log_joint_of(model, guide, args, kwargs)
    if stream is not None:
        check_use(stream, guide, log_joint, batch)
    subject = ModelAndGuide(model, guide, args, kwargs, log_joint)
    next(subject.weighted_draws(1))  # an error if the guide lacks a latent
    return subject


def _objective_of_batch(
    subject: ModelAndGuide, config: FitConfig, is_minibatch: bool
) -> BatchObjective:
    """The objective for a batch: by the path gradient, if the guide has all latents of the model."""
    model, _, args, kwargs, log_joint = subject
    guide: object = subject.guide
    if isinstance(guide, FlowGuide):
        with torch.no_grad():
            latent, _ = guide.rsample_and_log_prob(1)
        if latent.shape[-1] == log_joint.latents.latent_dim:
            return PathObjective(log_joint, guide)
    num = (config.minibatch if is_minibatch else config.optimization).num_estimates
    return PyroObjective(model, subject.guide, Batch(args, kwargs), log_joint, num)


def _reason_of_loop(objective: BatchObjective, reason: str) -> str:
    """Why the model is run for one draw after the other, if it is."""
    if not isinstance(objective, PyroObjective):
        return reason
    if objective.is_vectorized:
        return ""
    return reason or "model and guide do not run in a plate of particles"


def _check_processes(
    made: SetUp, parallel: Parallel, batch: Batch, num_steps: int | None, num_particles: int
) -> None:
    """Checks that all processes have the same fit, and gives them the same parameters."""
    tensors = made.tensors()
    same: dict[str, object] = {"num_steps": num_steps, "num_particles": num_particles}
    same["parameters"] = [tuple(tensor.shape) for tensor in tensors]
    if made.stream is None:
        data = filter(torch.is_tensor, (*batch.args, *batch.kwargs.values()))
        same["data (sums)"] = str([float(tensor.double().sum()) for tensor in data])
    parallel.check_same(same)
    parallel.copy_first(tensors)
