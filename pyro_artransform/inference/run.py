# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The stages of a fit: set up, initialize or resume, optimize, evaluate."""

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..joint import LogJoint
from ..joint.handlers import hidden_sites
from ..joint.protocols import FlowGuide, MinibatchGuide, ScaledSteps, StoredGuide, StructuredGuide
from . import checkpoint as files
from .config import FitConfig, OptimizationConfig
from .evaluation.evaluate import (
    Drawn,
    ModelAndGuide,
    draw,
    evaluate,
    evaluate_minibatches,
    look_at_marginals,
)
from .evaluation.verdict import FitStatus
from .guide_argument import choose
from .initialization.gaussians import Gaussians, Modes
from .initialization.initial_guide import (
    UNCHANGED,
    InitialGuide,
    find_initial_guide,
    find_initial_minibatch_guide,
)
from .initialization.sparse_start import find_sparse_start
from .loader import Batch, BatchStream
from .loader_checks import check_use, refuse_missing
from .optimization.minibatch_elbo import MinibatchObjective, PassEstimate, validation_batches
from .optimization.objective import BatchObjective, PathObjective, PyroObjective
from .optimization.schedule import new_schedule
from .optimization.selection import begin, is_at_posterior, select_parameters
from .optimization.training import Trainer, Training
from .parallel import Processes, checksum
from .progress import ProgressBar
from .result import FitResult

Path = str | os.PathLike[str]
Function = Callable[..., object]

_INTERRUPTED = "it was interrupted"


class FitRun:
    """A fit: set up by its constructor, then initialized or resumed, optimized, and concluded."""

    _training: Training

    def __init__(
        self,
        model: Function,
        guide: Function | None,
        arguments: Batch,
        stream: BatchStream | None,
        config: FitConfig,
        num_steps: int | None,
        num_particles: int | None,
        optim: object,
        processes: Processes,
    ) -> None:
        self._began, self._config, self._processes = time.perf_counter(), config, processes
        batches = [arguments] if stream is None else validation_batches(stream, config.minibatch)
        self._guide_reason = ""
        is_minibatch = stream is not None and not stream.whole.is_all_data
        if guide is None:
            guide, self._guide_reason = choose(model, *batches[0], is_minibatch=is_minibatch)
        self._subject = subject = _run_once(model, guide, batches[0], stream)
        log_joint, is_random = subject.log_joint, subject.log_joint.is_random
        if not (is_minibatch or is_random):
            stream = None
        of_batch = _objective_of_batch(subject, config, stream is not None)
        self._stream, self._minibatches, num_batches = stream, None, None
        if stream is not None:
            num_batches = stream.num_batches
            self._minibatches = MinibatchObjective(
                of_batch, stream, log_joint, batches, config.minibatch, processes
            )
        self._by_path = isinstance(of_batch, PathObjective)
        settings = config.optimization.for_latents(log_joint.latents.latent_dim)
        schedule = new_schedule(settings, self._by_path, num_batches, is_random)
        schedule = schedule.of_length(num_steps)
        self._objective = self._minibatches or of_batch
        scales = guide if isinstance(guide, ScaledSteps) else None
        if num_particles is None:
            num_particles = _num_particles(subject, config.optimization)
        # those of a batch are not shared: each process has another batch
        own = processes.share(num_particles) if stream is None else num_particles
        objective = processes.shared(self._objective)
        if stream is not None:  # batches of other sizes may have other scales
            scales = processes.scales(scales)
        self._trainer = Trainer(
            objective, schedule, own * processes.size, optim, scales, stream, processes
        )
        given = {"num_steps": num_steps, "num_particles": num_particles}
        processes.check_same(
            lambda: {**given, "arguments (by checksum)": _checksum(batches[0], stream)}
        )
        processes.align(self._tensors)
        self._looped_because = _why_looped(of_batch, log_joint)
        self._initial = InitialGuide(UNCHANGED, math.nan, None)
        self._search_steps = 0
        self._is_resumed = False
        self._is_saved = False

    def _tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers, by name."""
        found = dict(self._objective.parameters())
        offered: dict[str, object] = {"guide": self._subject.guide, "model": self._subject.model}
        for name, module in offered.items():
            if isinstance(module, nn.Module):
                found |= dict(module.named_parameters(prefix=name))
                found |= dict(module.named_buffers(prefix=name))
        return found

    def initialize(self, bar: ProgressBar) -> None:
        """Puts the guide at the best initial one, and chooses a step size."""
        bar.say("start")
        self._initial = self._processes.first(self._start)
        self._processes.align(self._tensors)
        self._processes.draw_apart()
        trainer = self._trainer
        if is_at_posterior(trainer):
            step_size = trainer.schedule.config.step_sizes[0]
            self._training = trainer.new(step_size, trainer.schedule.without_steps())
        elif trainer.optim is None:
            bar.say("step size")
            self._training, self._search_steps = begin(trainer)
        else:
            self._training = trainer.new(None)

    def _start(self) -> InitialGuide:
        """Puts the guide at the best initial one, if it can be put anywhere."""
        if self._minibatches is not None:
            refuse_missing(self._missing())
        model, _, args, kwargs, log_joint = self._subject
        guide: object = self._subject.guide
        config = self._config.initialization
        if isinstance(guide, FlowGuide) and self._by_path:
            minibatches, bound = self._minibatches, partial(model, *args, **kwargs)
            density = minibatches.mean_log_joint() if minibatches else log_joint
            if isinstance(guide, StructuredGuide):
                return find_sparse_start(density, bound, guide, config)
            return find_initial_guide(density, bound, guide, config)
        if isinstance(guide, MinibatchGuide):
            batch, elbo_draws = Batch(args, kwargs), self._objective.elbo_draws
            return find_initial_minibatch_guide(log_joint, model, guide, batch, elbo_draws, config)
        return self._initial

    def resume(self, path: Path) -> None:
        """Goes on from where a checkpoint has left another fit."""
        self._is_resumed = True
        state, trainer = self._processes.first(partial(files.read, path)), self._trainer
        own = files.state_of_process(state, self._processes.rank, self._processes.size)
        options = {"num_steps": trainer.schedule.num_steps, "num_particles": trainer.num_particles}
        for name, got in options.items():
            if got not in (state[name], None):
                raise ValueError(f"resume: expected {name}={state[name]!r}, as before, got {got!r}")
        if (state["step_size"] is None) != (trainer.optim is not None):
            was = (
                "with optim=, got none" if state["step_size"] is None else "without optim=, got one"
            )
            raise ValueError(f"resume: the checkpoint was made {was}")
        if state["guide"] is not None:
            files.load_guide(self._subject.guide, state["guide"])
        packed, modes = state["modes"], None
        if packed is not None:
            modes = Modes(Gaussians(*packed[:2]), *packed[2:])
        self._initial = InitialGuide(state["start"], state["start_elbo"], modes)
        self._search_steps = state["num_pilot_steps"]
        self._began -= state["seconds"]
        schedule = trainer.schedule.of_length(state["num_steps"])
        self._training = replace(trainer, schedule=schedule).new(state["step_size"])
        self._training.restore(state["training"])
        self._restore_stream(own["batches"])
        files.set_random_state(own["random"])

    def _restore_stream(self, state: files.State | None) -> None:
        stream, minibatches = self._stream, self._minibatches
        if (state is None) != (stream is None):
            was = "without a loader, got one" if state is None else "with a loader, got none"
            raise ValueError(f"resume: the checkpoint was made {was}")
        if state is None or stream is None or minibatches is None:
            return
        is_in_place = stream.restore(state)
        minibatches.compare_on(validation_batches(stream, self._config.minibatch))
        if not is_in_place:
            warnings.warn(
                "resume: the order of the loader's batches is not known, so the fit goes on from the "
                "next epoch. From the middle goes a list, or a DataLoader with a sampler of PyTorch",
                stacklevel=4,
            )

    def save(self, path: Path) -> None:
        """Saves everything that the fit needs to go on; where the disk refuses, it warns."""
        stream = self._stream
        own = {
            "batches": None if stream is None else stream.state(),
            "random": files.random_state(),
        }
        by_process = self._processes.gather_objects(own)
        if self._processes.rank > 0:
            return
        guide, training = self._subject.guide, self._training
        initial, modes = self._initial, self._initial.modes
        state = {
            "guide": guide.state_dict() if isinstance(guide, nn.Module) else None,
            "num_steps": training.schedule.num_steps,
            "num_particles": training.num_particles,
            "step_size": training.step_size,
            "num_pilot_steps": self._search_steps,
            "seconds": time.perf_counter() - self._began,
            "start": initial.name,
            "start_elbo": initial.elbo,
            "modes": modes and [*modes.gaussians, modes.value, modes.converged],
            "training": training.state(),
            "processes": by_process,
        }
        try:
            files.write(path, state)
        except (OSError, RuntimeError) as error:  # torch reports a full disk by either
            warnings.warn(
                f"checkpoint: {path} could not be written, so that the fit goes on without; an earlier "
                f"file stays as it was ({error}). Is the disk full?",
                stacklevel=4,
            )
        else:
            self._is_saved = True

    def optimize(
        self,
        checkpoint: Path | None,
        callback: Callable[[int, float], object] | None,
        bar: ProgressBar,
        interrupted: Event,
    ) -> str:
        """Takes steps until there are enough, or the callback or Ctrl-C ends them; says which."""
        bar.say("fit")
        training, processes = self._training, self._processes

        def told(step: int, loss: float) -> tuple[bool, ...]:
            answer: Any = None if callback is None else callback(step, -loss)
            # True, or one of NumPy or PyTorch
            is_asked = (answer.item() if hasattr(answer, "item") else answer) is True
            return processes.any(is_asked, interrupted.is_set())

        ends = processes.any(False, interrupted.is_set())
        of_search = [] if self._is_resumed else training.losses
        for step, loss in enumerate(of_search, 1):
            if not any(ends):
                ends = told(step, loss)
        while not (training.is_over() or any(ends)):
            loss, plan = training.step(), training.schedule
            place = () if self._stream is None else self._stream.place(plan.end)
            bar.update(training.losses, plan.expected_end(training.num_steps), *place)
            if checkpoint and training.num_steps % self._config.optimization.checkpoint_every == 0:
                self.save(checkpoint)
            ends = told(training.num_steps, loss)
        if checkpoint is not None:
            self.save(checkpoint)
        if ends[0]:
            return "the callback asked to stop"
        return training.schedule.reason if training.is_over() else _INTERRUPTED

    def _missing(self) -> tuple[str, ...]:
        """Dependencies that a guide with a graph has missed, in words."""
        _, guide, args, kwargs, _ = self._subject
        offered: object = guide
        if not isinstance(offered, StructuredGuide):
            return ()
        batches = [Batch(args, kwargs)]
        if self._minibatches is not None:
            batches = self._minibatches.validation
        return tuple(offered.missing_over_batches(batches))

    def conclude(self, stopped_because: str) -> FitResult:
        """The result of the fit, with the guide at the best parameters."""
        if self._stream is not None:
            self._stream.close()
        end, missing = select_parameters(self._training), self._processes.first(self._missing)
        self._processes.align(self._tensors)  # buffers, which steps may have changed
        seen: Drawn | PassEstimate
        if self._minibatches is not None:
            seen = self._minibatches.over_a_pass()
        else:
            most = self._training.num_gradients
            seen = draw(self._subject, self._config.evaluation, self._processes, most)
        result = self._processes.first(partial(self._judge, seen, end, missing, stopped_because))
        return replace(result, guide=self._subject.guide)

    def _judge(
        self, seen: Drawn | PassEstimate, end: str, missing: tuple[str, ...], stopped_because: str
    ) -> FitResult:
        """The result of the fit but for its guide, by what all processes have seen."""
        training, config = self._training, self._config
        skipped = training.skipped.count
        share, is_complete = skipped / max(training.num_steps, 1), stopped_because != _INTERRUPTED
        status = FitStatus(share, is_complete, self._is_saved, missing=missing)
        if isinstance(seen, PassEstimate):
            found = evaluate_minibatches(self._subject, seen, status, config.evaluation)
        else:
            found = evaluate(self._subject, self._initial.modes, status, config, seen)
        look = look_at_marginals(self._subject, found, config.evaluation)
        return FitResult(
            **look.result_fields(found),
            history=[-loss for loss in training.losses],
            num_steps=training.num_steps,
            num_skipped=skipped,
            num_gradients=training.num_gradients + self._search_steps * training.num_particles,
            seconds=time.perf_counter() - self._began,
            stopped_because=stopped_because,
            start=self._initial.name,
            end=end,
            step_size=training.step_size,
            culprits=dict(training.skipped.sites),
            one_at_a_time=self._looped_because or self._subject.log_joint.reason,
            guide_reason=self._guide_reason,
        )


def _run_once(
    model: Function, guide: Function, batch: Batch, stream: BatchStream | None
) -> ModelAndGuide:
    """Runs model and guide, so that what cannot be fitted is an error now."""
    (args, kwargs), given = batch, cast(object, guide)
    if isinstance(given, StoredGuide):  # a new guide is to be new, whatever was fitted before
        given.drop_orphans()
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
    """The objective for a batch: by the path gradient, if the guide has all latents of the model."""
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


def _checksum(batch: Batch, stream: BatchStream | None) -> str:
    """Of the tensors of a batch, if all processes have to have the same one."""
    if stream is not None and not stream.whole.is_common:
        return ""
    return checksum(batch.tensors())


def _num_particles(subject: ModelAndGuide, config: OptimizationConfig) -> int:
    """Draws for each step, where their number is not given."""
    offered: object = subject.guide
    is_many = subject.log_joint.latents.latent_dim >= config.many_latents
    if is_many and isinstance(offered, StructuredGuide):
        return config.num_particles_of_many
    return config.num_particles


def _why_looped(objective: BatchObjective, log_joint: LogJoint) -> str:
    """Why draws are evaluated one after the other, with a warning; empty where they are not."""
    if isinstance(objective, PyroObjective) and objective.is_vectorized:
        return ""
    reason = log_joint.reason
    if isinstance(objective, PyroObjective):
        reason = reason or "model and guide do not run in a plate of particles"
    if reason:
        warnings.warn(
            "the model cannot be evaluated at many draws at once, so that it is run for one draw "
            f"after the other, which is slow ({reason}). Write it without branches on values of its "
            "latents, and index from the right, or take fewer num_particles",
            stacklevel=4,
        )
    return reason
