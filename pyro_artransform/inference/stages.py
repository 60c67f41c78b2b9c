# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The parts of a fit, in their order: start, steps, end."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..joint import LogJoint
from ..joint.handlers import hidden_sites
from . import checkpoint as files
from .config import FitConfig
from .data.checks import check_use
from .data.loader import Batch, Batches
from .evaluation.evaluate import Evaluation, ModelAndGuide, evaluate, evaluate_minibatches
from .evaluation.verdict import FitStatus
from .initialization.minibatch_start import find_initial_minibatch_guide
from .initialization.search import UNCHANGED, InitialGuide, find_initial_guide
from .interrupts import Interrupts
from .objectives.elbo import Objective, PathObjective, PyroObjective, offers_protocol
from .objectives.minibatch_elbo import MinibatchObjective, hold
from .optimization.learning_rate import STEP_SIZES, choose_step_size
from .optimization.optimizers import Adam, users_optimiser
from .optimization.pace import pace_of
from .optimization.schedule import Schedule
from .optimization.selection import keep_the_best
from .optimization.training import Training
from .progress import ProgressBar
from .result import FitResult

_CHECKPOINT_EVERY = 100


class Fitting:
    """A fit of a guide to a model.

    :param model: a Pyro model.
    :param guide: a guide of it.
    :param batch: the arguments of both, unless they come in batches.
    :param batches: the stream of their arguments in batches.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any,
        batch: Batch,
        batches: Batches | None = None,
        config: FitConfig | None = None,
    ) -> None:
        self._config = config or FitConfig()
        self._began = time.perf_counter()
        self._batches, held = batches, hold(batches) if batches is not None else [batch]
        self._args, self._kwargs = held[0]
        self._model, self._guide = model, guide
        self._start = InitialGuide(UNCHANGED, float("nan"), None)
        self._step_size: float | None = None
        self._num_steps: int | None = None
        self._num_pilot_steps = 0
        self._seconds_before = 0.0
        self._has_lost_its_place = False
        _set_up(guide, *held[0])
        self._log_joint = LogJoint(model, *held[0])
        if batches is not None:
            check_use(batches, guide, self._log_joint, held[0])
        # a guide that lacks a latent is an error now, and not after the last step
        next(self._subject().weighted_draws(1))
        self._by_protocol = offers_protocol(guide) and self._fits()
        by_batch: PathObjective | PyroObjective = (
            PathObjective(self._log_joint, guide)
            if self._by_protocol
            else PyroObjective(model, guide, held[0], self._log_joint)
        )
        is_slow = isinstance(by_batch, PyroObjective) and not by_batch.is_vectorized
        self._one_at_a_time = self._why_slow(is_slow)
        self._minibatches: MinibatchObjective | None = None
        if batches is not None and not self._is_all_data(batches):
            self._minibatches = MinibatchObjective(by_batch, batches, self._log_joint, held)
        self._objective: Objective = self._minibatches or by_batch
        self._pace = pace_of(
            self._by_protocol,
            None if self._minibatches is None or batches is None else batches.num_batches,
            self._log_joint.is_subsampled,
        )

    def _is_all_data(self, batches: Batches) -> bool:
        """Whether the only batch is as good as arguments."""
        alone = batches.num_batches == 1 and batches.is_partition
        return alone and not self._log_joint.is_subsampled

    def _subject(self) -> ModelAndGuide:
        return ModelAndGuide(self._model, self._guide, self._args, self._kwargs, self._log_joint)

    def _why_slow(self, is_slow: bool) -> str:
        """Why draws are evaluated one after the other; empty where they are not."""
        if is_slow:
            return self._log_joint.reason or "model and guide do not run in a plate of particles"
        return self._log_joint.reason if self._by_protocol else ""

    def warn_if_slow(self) -> None:
        """Tells the user where a step takes as many runs of the model as there are particles."""
        if self._one_at_a_time:
            warnings.warn(
                "the model cannot be evaluated at many draws at once, so that it is run for one draw "
                f"after the other, which is slow ({self._one_at_a_time}). Write it without branches "
                "on values of its latents, and index from the right, or take fewer num_particles",
                stacklevel=3,
            )

    def warn_if_out_of_place(self) -> None:
        """Tells the user where a fit could not go on in the middle of an epoch."""
        if self._has_lost_its_place:
            warnings.warn(
                "resume: the order of the loader's batches is not known, so that the fit goes on from "
                "the next epoch and not from the middle of one. A DataLoader with a sampler of "
                "PyTorch, or a list, can go on from there",
                stacklevel=3,
            )

    def _fits(self) -> bool:
        """Whether the guide's latents are all latents of the model."""
        with torch.no_grad():
            latent, _ = self._guide.rsample_and_log_prob(1)
        return latent.shape[-1] == self._log_joint.latents.latent_dim

    # Start

    def begin(
        self,
        num_steps: int | None,
        num_particles: int,
        optim: Any,
        resume: Any,
        bar: ProgressBar,
    ) -> Training:
        """A training at its start, or where a checkpoint has left it."""
        self._num_steps = num_steps

        def new_training(step_size: float) -> Training:
            if self._batches is not None:
                self._batches.restart()
            parameters = self._objective.parameters()
            if not parameters:
                raise ValueError(
                    "there is nothing to train: neither guide nor model has parameters"
                )
            made = (
                Adam(parameters, step_size, self._objective.step_units)
                if optim is None
                else users_optimiser(optim, list(parameters.values()))
            )
            pace = self._pace
            schedule = Schedule(
                num_steps, pace.max_constant, pace.has_tail_steps, pace.epoch, pace.min_decay
            )
            return Training(self._objective, parameters, made, schedule, num_particles, pace)

        if resume is not None:
            state = files.read(resume)
            files.check_same(state, num_steps=num_steps, num_particles=num_particles)
            if (state["step_size"] is None) != (optim is not None):
                raise ValueError("resume: expected the optim that the checkpoint was made with")
            return self._restored(state, new_training)
        if self._by_protocol:
            bar.say("start")
            density = self._minibatches.for_start() if self._minibatches else self._log_joint
            self._start = find_initial_guide(
                density, self._run_model, self._guide, self._config.initialization
            )
        elif hasattr(self._guide, "start_near"):
            bar.say("start")
            self._start = self._find_batch_start()
        if optim is None:
            bar.say("step size")
            self._step_size, self._num_pilot_steps = choose_step_size(new_training)
        return new_training(self._step_size or STEP_SIZES[0])

    def _find_batch_start(self) -> InitialGuide:
        batch = Batch(self._args, self._kwargs)
        self._objective.see(*batch)
        return find_initial_minibatch_guide(
            self._log_joint,
            self._model,
            self._guide,
            batch,
            self._objective.elbo_draws,
            self._config.initialization,
        )

    def _run_model(self) -> Any:
        return self._model(*self._args, **self._kwargs)

    def _restored(
        self, state: dict[str, Any], new_training: Callable[[float], Training]
    ) -> Training:
        if state["guide"] is not None:
            files.load_guide(self._guide, state["guide"])
        self._num_steps = state["num_steps"]
        self._step_size = state["step_size"]
        self._num_pilot_steps = state["num_pilot_steps"]
        self._seconds_before = state["seconds"]
        self._start = InitialGuide(
            state["start"], state["start_elbo"], files.unpacked(state["modes"])
        )
        training = new_training(self._step_size or STEP_SIZES[0])
        training.restore(state["training"])
        self._restore_batches(state.get("batches"))
        files.set_random_state(state["random"])
        return training

    def _restore_batches(self, state: dict[str, Any] | None) -> None:
        if (state is None) != (self._minibatches is None):
            raise ValueError("resume: expected a loader where the checkpoint was made with one")
        if self._batches is None or self._minibatches is None or state is None:
            return
        self._has_lost_its_place = not self._batches.restore(state)
        self._minibatches.compare_on(hold(self._batches))

    # Steps

    def go_on(
        self,
        training: Training,
        callback: Callable[[int, float], Any] | None,
        checkpoint: Any,
        bar: ProgressBar,
        interrupts: Interrupts,
    ) -> bool:
        """Takes steps until the training is over, and says whether it is."""
        bar.say("fit")
        is_asked_to_end = False
        while not (training.is_over() or interrupts.requested or is_asked_to_end):
            loss = training.step()
            bar.update(training.losses, training.schedule.end, *self._place(training))
            if checkpoint is not None and training.num_steps % _CHECKPOINT_EVERY == 0:
                self._save(checkpoint, training)
            if callback is not None:
                is_asked_to_end = callback(training.num_steps, -loss) is True
        if checkpoint is not None:
            self._save(checkpoint, training)
        if is_asked_to_end:
            training.schedule.reason = "the callback asked to stop"
        elif not training.is_over():
            training.schedule.reason = "it was interrupted"
        return training.is_over() or is_asked_to_end

    def _place(self, training: Training) -> tuple[str, ...]:
        """Which epoch, and where in it; nothing without mini-batches."""
        if self._batches is None or self._minibatches is None:
            return ()
        end, total = training.schedule.end, self._batches.num_batches
        epoch = f"epoch {self._batches.epoch + 1}"
        if end is not None:
            epoch += f"/{math.ceil(end / total)}"
        return epoch, f"batch {self._batches.position}/{total}"

    def _save(self, path: Any, training: Training) -> None:
        is_module = isinstance(self._guide, nn.Module)
        by_batches = self._batches is not None and self._minibatches is not None
        state = {
            "guide": self._guide.state_dict() if is_module else None,
            "num_steps": self._num_steps,
            "num_particles": training.num_particles,
            "step_size": self._step_size,
            "num_pilot_steps": self._num_pilot_steps,
            "seconds": self._seconds(),
            "start": self._start.name,
            "start_elbo": self._start.elbo,
            "modes": files.packed(self._start.modes),
            "training": training.state(),
            "batches": self._batches.state() if by_batches and self._batches else None,
            "random": files.random_state(),
        }
        files.write(path, state)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began

    # End

    def conclude(self, training: Training, is_over: bool) -> FitResult:
        """The result, with the guide at the best parameters."""
        if self._batches is not None:
            self._batches.close()
        end = keep_the_best(training)
        findings = self._find(training, is_over)
        return FitResult(
            **findings.result_fields(),
            history=[-loss for loss in training.losses],
            num_steps=training.num_steps,
            num_skipped=training.num_skipped,
            num_gradients=training.num_gradients + self._num_pilot_steps * training.num_particles,
            seconds=self._seconds(),
            stopped_because=training.schedule.reason,
            start=self._start.name,
            end=end,
            step_size=self._step_size,
            culprits=dict(training.culprits),
            one_at_a_time=self._one_at_a_time,
        )

    def _find(self, training: Training, is_over: bool) -> Evaluation:
        skipped_share = training.num_skipped / max(training.num_steps, 1)
        status = FitStatus(skipped_share=skipped_share, is_complete=is_over)
        if self._minibatches is not None:
            return evaluate_minibatches(
                self._subject(), self._minibatches, status, self._config.evaluation
            )
        return evaluate(self._subject(), self._start.modes, status, self._config.evaluation)


def _set_up(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Lets a guide learn the latents of its model, and enter its parameters into Pyro's store."""
    with torch.no_grad(), hidden_sites():
        guide(*args, **kwargs)
