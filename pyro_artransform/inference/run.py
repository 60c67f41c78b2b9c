# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The stages of a fit: set up, start or resume, train, judge."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, TypeVar, cast

import pyro
import torch
from torch import Tensor, nn

from .. import files
from ..arguments import first_of
from ..joint.protocols import (
    CenteredGuide,
    FlowGuide,
    MinibatchGuide,
    ScaledSteps,
    StructuredGuide,
)
from .config import FitConfig
from .evaluation.evaluate import evaluate, evaluate_minibatches, judge_marginals
from .evaluation.verdict import FitStatus
from .initialization.minibatch_start import find_initial_minibatch_guide
from .initialization.start import UNCHANGED, InitialGuide, find_start
from .loader import Batch, BatchStream
from .mcmc import CHAINS_COST_LESS, Deadline, Sampling
from .optimization.objective import (
    MinibatchObjective,
    Objective,
    PathObjective,
    PyroObjective,
    validation_batches,
)
from .optimization.schedule import NOTHING_TO_WIN, new_schedule
from .optimization.training import (
    Trainer,
    Training,
    begin,
    is_at_posterior,
    select_parameters,
)
from .parallel import Parallel, ScalesOfFirst, SharedObjective
from .progress import ProgressBar
from .result import FitResult
from .set_up import objective_of_batch, run_once

Function = Callable[..., object]
#: of a model, its arguments and whether they are a mini-batch: a guide, and why it is this one
Chooser = Callable[..., tuple[Function, str]]

T = TypeVar("T")

_FORMAT = "pyro_artransform fit 6"  # of checkpoints


class FitRun:
    """A fit: set up by its constructor, then started or resumed, trained, and judged."""

    _training: Training

    def __init__(
        self,
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
        num_draws: int | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self._deadline = Deadline(max_seconds)
        self._began, self._config, self._parallel = time.perf_counter(), config, parallel
        batches = [arguments] if stream is None else validation_batches(stream, config.minibatch)
        is_minibatch, self._guide_reason = not (stream is None or stream.whole.is_all_data), ""
        if guide is None:
            guide, self._guide_reason = choose_guide(model, *batches[0], is_minibatch=is_minibatch)
        self._subject = subject = run_once(model, guide, batches[0], stream)
        log_joint, is_random = subject.log_joint, subject.log_joint.is_random
        if not (is_minibatch or is_random):
            stream = None
        of_batch = objective_of_batch(subject, config, stream is not None)
        self._stream, self._minibatches, num_batches = stream, None, None
        self._sampling = None
        if num_draws is not None:
            if stream is not None or is_random:
                raise ValueError(
                    "draws: expected a model of all data, since chains need its density, got one that sees "
                    "mini-batches, or is random otherwise: fit without draws"
                )
            self._sampling = Sampling(subject, num_draws, self._deadline, num_steps is None)
        if stream is not None:
            num_batches = stream.num_batches
            given = of_batch, stream, log_joint, batches, config.minibatch
            self._minibatches = MinibatchObjective(*given)
        self._by_path = isinstance(of_batch, PathObjective)
        latent_dim = log_joint.latents.latent_dim
        settings = config.optimization.for_latents(latent_dim)
        schedule = new_schedule(settings, self._by_path, num_batches, is_random)
        schedule = schedule.of_length(num_steps)
        self._objective: Objective = self._minibatches or of_batch
        shared: Objective = self._objective
        offered: object = guide
        scales: ScaledSteps | None = offered if isinstance(offered, ScaledSteps) else None
        if num_particles is None:
            num_particles = settings.num_particles
            if latent_dim >= settings.many_latents and isinstance(offered, StructuredGuide):
                num_particles = settings.num_particles_of_many
        if parallel is not None:
            tensors = self._tensors()
            same: dict[str, object] = {"num_steps": num_steps, "num_particles": num_particles}
            same["parameters"] = [tuple(tensor.shape) for tensor in tensors]
            if stream is None:
                data = filter(torch.is_tensor, (*batches[0].args, *batches[0].kwargs.values()))
                same["data (sums)"] = str([float(tensor.double().sum()) for tensor in data])
            parallel.check_same(same)
            parallel.copy_first(tensors)
            # a batch is not shared: each process has another one
            own = num_particles if stream is not None else parallel.share(num_particles)
            num_particles = own * parallel.size
            shared = SharedObjective(shared, parallel)
            if scales is not None and stream is not None:
                scales = ScalesOfFirst(scales, parallel)
        self._trainer = Trainer(shared, schedule, num_particles, optim, scales, stream, parallel)
        reason = log_joint.reason
        if isinstance(of_batch, PyroObjective):
            reason = reason or "model and guide do not run in a plate of particles"
            reason = "" if of_batch.is_vectorized else reason
        self._looped_because = reason
        if reason:
            warnings.warn(
                "the model cannot be evaluated at many draws at once, so that it is run for one draw "
                f"after the other, which is slow ({reason}). Write it without branches on values of its "
                "latents, and index from the right, or take fewer num_particles",
                stacklevel=3,
            )
        self._initial = InitialGuide(UNCHANGED, math.nan)
        self._search_steps, self._is_resumed, self._is_saved = 0, False, False

    def _by_first(self, what: str, function: Callable[[], T]) -> T:
        """What a function returns in the first process, which alone calls it."""
        return function() if self._parallel is None else self._parallel.first(what, function)

    def _tensors(self) -> list[Tensor]:
        """All parameters and buffers, in an order that all processes have."""
        found = list(self._objective.parameters().values())
        for module in (self._subject.guide, self._subject.model):
            if isinstance(module, nn.Module):
                found += [*module.parameters(), *module.buffers()]
        return found

    def start(self, bar: ProgressBar) -> None:
        """Puts the guide at the best initial one, and chooses a step size."""
        bar.say("start")
        self._initial = self._by_first("the initial guide", self._find_start)
        if self._parallel is not None:
            self._parallel.copy_first(self._tensors())
            pyro.set_rng_seed(self._parallel.seed() + self._parallel.rank)
        trainer, reason = self._trainer, NOTHING_TO_WIN
        is_done = is_at_posterior(trainer)
        if not is_done and self._chains_cost_less(0):
            is_done, reason = True, CHAINS_COST_LESS
        if is_done:
            step_size = trainer.schedule.config.step_sizes[0]
            self._training = trainer.new(step_size, trainer.schedule.without_steps(reason))
        elif trainer.optim is None:
            bar.say("step size")
            self._training, self._search_steps = begin(trainer)
        else:
            self._training = trainer.new(None)

    def _chains_cost_less(self, num_steps: int) -> bool:
        """Whether draws were asked for, and chains give them sooner than after more steps."""
        sampling = self._sampling
        if sampling is None or not sampling.is_due(num_steps):
            return False
        return self._by_first("the chains", sampling.cost_less)

    def _find_start(self) -> InitialGuide:
        """Puts the guide at the best initial one, if it can be put anywhere."""
        if self._minibatches is not None and (missing := self._missing()):
            raise ValueError(
                "loader: the guide's graph lacks dependencies of the posterior that mini-batches have: "
                f"{first_of(missing)}. The first batch alone does not have them all: make the guide anew "
                "and set it up with all data before the fit, guide.set_up(*all_data), or use AutoIAF, or "
                "AutoAmortized for latents of the rows themselves"
            )
        model, _, args, kwargs, log_joint = self._subject
        guide: object = self._subject.guide
        config = self._config.initialization
        if isinstance(guide, FlowGuide) and self._by_path:
            minibatches, bound = self._minibatches, partial(model, *args, **kwargs)
            density = log_joint if minibatches is None else minibatches.mean_log_joint()
            return find_start(density, bound, guide, config)
        if isinstance(guide, MinibatchGuide):
            batch, elbo_draws = Batch(args, kwargs), self._objective.elbo_draws
            return find_initial_minibatch_guide(log_joint, model, guide, batch, elbo_draws, config)
        return self._initial

    def resume(self, path: files.FilePath) -> None:
        """Goes on from where a checkpoint has left another fit, or from the next epoch of its loader."""
        self._is_resumed = True
        state = self._by_first("the checkpoint", partial(_read, path))
        trainer, stream, batches = self._trainer, self._stream, state["batches"]
        options = {"num_steps": trainer.schedule.num_steps, "num_particles": trainer.num_particles}
        for name, got in options.items():
            if got not in (state[name], None):
                raise ValueError(f"resume: expected {name}={state[name]!r}, as before, got {got!r}")
        both = {"optim": (state["step_size"] is None, trainer.optim is not None)}
        both["loader"] = batches is not None, stream is not None
        for name, (had, has) in both.items():
            if had != has:
                was = f"with {name}=, got none" if had else f"without {name}=, got one"
                raise ValueError(f"resume: the checkpoint was made {was}")
        if state["guide"] is not None:
            guide: Any = self._subject.guide
            try:
                guide.load_state_dict(state["guide"])
            except (AttributeError, RuntimeError) as error:
                raise ValueError(f"resume: expected a checkpoint of this guide: {error}") from error
        self._initial = InitialGuide(state["start"], state["start_elbo"])
        self._search_steps = state["num_search_steps"]
        self._began -= state["seconds"]
        schedule = trainer.schedule.of_length(state["num_steps"])
        self._training = replace(trainer, schedule=schedule).new(state["step_size"])
        self._training.restore(state["training"])
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        if self._parallel is not None:
            pyro.set_rng_seed(self._parallel.seed() + self._parallel.rank)
        if stream is not None and not stream.go_on(*batches):
            warnings.warn(
                f"resume: the fit was stopped in the middle of epoch {stream.epoch} of its loader, and goes "
                "on from the next epoch",
                stacklevel=3,
            )

    def save(self, path: files.FilePath) -> None:
        """Saves everything that the fit needs to go on; where the disk refuses, it warns."""
        guide, training, stream = self._subject.guide, self._training, self._stream
        state = {
            "guide": guide.state_dict() if isinstance(guide, nn.Module) else None,
            "num_steps": training.schedule.num_steps,
            "num_particles": training.num_particles,
            "step_size": training.step_size,
            "num_search_steps": self._search_steps,
            "seconds": time.perf_counter() - self._began,
            "start": self._initial.name,
            "start_elbo": self._initial.elbo,
            "training": training.state(),
            "batches": stream and [stream.num_batches, stream.epoch, stream.position],
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        }
        try:
            files.write(path, {"format": _FORMAT, "state": state})
        except (OSError, RuntimeError) as error:  # torch reports a full disk by either
            warnings.warn(
                f"checkpoint: {path} could not be written, so that the fit goes on without; an earlier "
                f"file stays as it was ({error}). Is the disk full?",
                stacklevel=4,
            )
        else:
            self._is_saved = True

    def train(
        self,
        checkpoint: files.FilePath | None,
        callback: Callable[[int, float], object] | None,
        bar: ProgressBar,
        interrupted: Event,
    ) -> str:
        """Takes steps until there are enough, or the callback or Ctrl-C ends them; says which."""
        bar.say("fit")
        self._deadline.interrupted = interrupted.is_set
        training, parallel = self._training, self._parallel
        if parallel is not None and parallel.rank > 0:
            checkpoint = None

        def tell(step: int, loss: float) -> tuple[bool, ...]:
            """Whether the callback, which is told of the step, and Ctrl-C end the fit."""
            answer: Any = callback(step, -loss) if callback is not None and step else None
            # True, or one of NumPy or PyTorch
            is_asked = (answer.item() if hasattr(answer, "item") else answer) is True
            flags = is_asked, self._deadline.is_over()
            return flags if parallel is None else parallel.any(*flags)

        ends = tell(0, math.nan)
        for step, loss in enumerate([] if self._is_resumed else training.losses, 1):
            if not any(ends):
                ends = tell(step, loss)
        while not (training.is_over() or any(ends)):
            loss, plan = training.step(), training.schedule
            place = () if self._stream is None else self._stream.place(plan.end)
            bar.update(training.losses, plan.expected_end(training.num_steps), *place)
            if checkpoint and training.num_steps % self._config.optimization.checkpoint_every == 0:
                self.save(checkpoint)
            ends = tell(training.num_steps, loss)
            if not any(ends) and self._chains_cost_less(training.num_steps):
                training.schedule = training.schedule.ending_at(
                    training.num_steps, CHAINS_COST_LESS
                )
        if checkpoint is not None:
            self.save(checkpoint)
        if ends[0]:
            return "the callback asked to stop"
        return training.schedule.reason if training.is_over() else self._deadline.reason

    def judge(self, stopped_because: str) -> FitResult:
        """The result of the fit, with the guide at the best parameters."""
        if self._stream is not None:
            self._stream.close()
        # chains that were tried are those of the last parameters
        is_tried = self._sampling is not None and stopped_because == CHAINS_COST_LESS
        end = "last" if is_tried else select_parameters(self._training)
        if self._parallel is not None:
            self._parallel.copy_first(self._tensors())
        result = self._by_first("the verdict", partial(self._judge, end, stopped_because))
        return replace(result, guide=self._subject.guide)

    def _missing(self) -> tuple[str, ...]:
        """Dependencies that a guide with a graph has missed, in words."""
        offered: object = self._subject.guide
        if not isinstance(offered, StructuredGuide):
            return ()
        given = [Batch(self._subject.args, self._subject.kwargs)]
        batches = given if self._minibatches is None else self._minibatches.validation
        return tuple(offered.missing_over_batches(batches))

    def _judge(self, end: str, stopped_because: str) -> FitResult:
        """The result of the fit but for its guide."""
        training, config, offered = self._training, self._config, cast(object, self._subject.guide)
        skipped, is_complete = training.skipped.count, not self._deadline.is_over()
        share, sampling = skipped / max(training.num_steps, 1), self._sampling
        status = FitStatus(
            share,
            is_complete,
            self._is_saved,
            has_chains=sampling is not None,
            missing=self._missing,
        )
        chains = None
        if self._minibatches is not None:
            passed = self._minibatches.over_a_pass()
            found = evaluate_minibatches(self._subject, passed, status)
        elif sampling is not None:
            found, chains = sampling.judge(status, config, training.num_steps)
        else:
            found = evaluate(self._subject, status, config, training.num_gradients)
        by_chains = None if sampling is None else sampling.chains
        marginals = judge_marginals(self._subject, found, config.evaluation, by_chains)
        centered = offered.centered_by_site() if isinstance(offered, CenteredGuide) else {}
        return FitResult(
            **found.result_fields(marginals, chains),
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
            coordinates=dict(centered),
            guide_reason=self._guide_reason,
        )


def _read(path: files.FilePath) -> dict[str, Any]:
    """The state that :meth:`FitRun.save` wrote."""
    saved = files.read(path)
    if isinstance(saved, dict) and saved.get("format") == _FORMAT:
        return cast(dict[str, Any], saved["state"])
    raise ValueError(f"{path}: expected a checkpoint of fit, got another file, or a damaged one")
