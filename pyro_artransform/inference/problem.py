# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The problem of a fit, from its options and one run of model and guide."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import cast

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.util import get_rng_state
from torch import Tensor, nn

from .._base.arguments import first_of, warn_user
from .._base.processes import Processes
from .._base.time_limit import TimeLimit
from ..diagnostics.checks import warn_of_prior
from ..diagnostics.importance_weights import ModelAndGuide
from ..guides.choice import choose_guide, choose_mixture
from ..model import FullDataDensity, LogJoint
from ..model.elements import ElementGroups, ElementTerms
from ..model.handlers import traced_parameters
from ..model.protocols import FlowGuide, MinibatchGuide, StructuredGuide
from .all_batches import density_of_all_rows
from .initialization.start import minibatch_density
from .loader import Batch, BatchStream, check_use
from .optimization.minibatches import NUM_COMMON_DRAWS, NUM_VALIDATION, MinibatchObjective
from .optimization.objective import FEWER, BatchObjective, PathObjective, PyroObjective
from .optimization.schedule import MOST_GAP, NUM_COMPARED, Schedule

# draws per step, and those of structured guides with this many latents or more (benchmarks/price.md); with
# mini-batches, whose rows are the larger noise, there are fewer
_MANY_LATENTS, _NUM_PARTICLES, _NUM_IN_BATCHES = 200, (128, 64), (64, 16)

Function = Callable[..., object]


class Problem:
    """What is fitted, and how: the model, its data, the guide, the objective and the schedule.

    Models, guides and data that cannot be fitted raise an error here, as do batches that ``check_call``
    refuses. The last options are those of :func:`~pyro_artransform.fit`.
    """

    def __init__(
        self,
        model: Function,
        guide: Function | None,
        *,
        arguments: Batch,
        stream: BatchStream | None,
        parallel: Processes,
        limit: TimeLimit,
        check_call: Callable[..., None],
        num_steps: int | None,
        num_particles: int | None,
    ) -> None:
        self.parallel, self.limit, self.guide_reason = parallel, limit, ""
        #: the state of all generators at the beginning, with which chains start
        self.generators = get_rng_state()
        batches = [arguments]
        if stream is not None:
            batches = list(stream.whole.one_pass(NUM_VALIDATION))
            check_call(*batches[0])
        #: the arguments of model and guide; with a loader, those of its first batch
        self.batch = batches[0]
        is_minibatch = not (stream is None or stream.whole.is_all_data)
        guide, whole = self._given(model, guide, stream if is_minibatch else None)
        self.subject = _run_once(model, guide, self.batch, stream)
        log_joint = self.subject.log_joint
        #: a sentence on why the posterior is the prior; empty if it is not
        self.prior_only = warn_of_prior(log_joint.has_data)
        #: the mini-batches of steps, if there are any
        self.stream = stream if is_minibatch or log_joint.is_random else None
        of_batch = _objective_of_batch(self.subject)
        #: why the model runs for one draw at a time; empty if it does not
        self.looped_because = log_joint.reason
        if isinstance(of_batch, PyroObjective) and not of_batch.is_vectorized:
            not_in_a_plate = "model and guide do not vectorize over particles"
            self.looped_because = log_joint.reason or not_in_a_plate
        #: the objective of this process alone
        self.objective: BatchObjective | MinibatchObjective = of_batch
        if self.stream is not None:
            self.objective = MinibatchObjective(
                of_batch, self.stream, log_joint, batches, self.terms, whole
            )
            if self.objective.whole is not None:
                self.subject = self.subject._replace(log_joint=self.objective.whole)
        self.schedule = self._new_schedule().of_length(num_steps)
        wanted = num_particles or self._usual_particles()
        # processes share no batch, so that each takes all draws for its own
        per_process = wanted if self.stream is not None else parallel.share(wanted)
        #: draws per step, of all processes
        self.num_particles = per_process * parallel.size
        if parallel.size > 1:
            self._check_processes(num_steps, num_particles)
        if self.looped_because:
            _warn_of_loop(of_batch, self.looped_because, per_process, self.schedule)

    def _given(
        self, model: Function, guide: Function | None, stream: BatchStream | None
    ) -> tuple[Function, FullDataDensity | None]:
        """The guide, chosen if there is none, and the density of all data if it learned its graph from it."""
        #: the elements of plates that rows of mini-batches read, for a guide that learns its graph from them
        self.terms: ElementTerms | None = None
        whole: FullDataDensity | None = None
        if stream is not None and (guide is None or _is_new(guide)):
            whole, self.terms = _element_terms(model, self.batch, stream)
        if guide is None:
            is_minibatch, has_elements = stream is not None, self.terms is not None
            guide, self.guide_reason = choose_guide(
                model, *self.batch, is_minibatch=is_minibatch, has_elements=has_elements
            )
        offered: object = guide
        if self.terms is None or not isinstance(offered, StructuredGuide):
            return guide, None  # the guide may have coordinates of its own
        offered.set_up_on(self.terms, *self.batch.args, **self.batch.kwargs)
        return guide, whole

    def _new_schedule(self) -> Schedule:
        minibatches, num_compared = self.minibatches, NUM_COMPARED
        if self.is_loop:
            num_compared //= FEWER
        if minibatches is not None and self.has_all_data:
            num_compared = min(NUM_COMMON_DRAWS, num_compared)
        schedule = Schedule(1, num_compared, dim=self.subject.log_joint.latents.latent_dim)
        if minibatches is None:
            return schedule
        # if all data correct a batch, the noise of batches is too small to need averaging over an epoch
        if minibatches.on_all is None:
            return replace(schedule, epoch=minibatches.stream.num_batches)
        return replace(schedule, small_gap=MOST_GAP)

    def _usual_particles(self) -> int:
        """The number of draws per step that the fit chooses."""
        few, fewest = _NUM_PARTICLES if self.stream is None else _NUM_IN_BATCHES
        if self.is_loop:
            return few // FEWER
        has_many = self.subject.log_joint.latents.latent_dim >= _MANY_LATENTS
        return fewest if isinstance(self.subject.guide, StructuredGuide) and has_many else few

    def choose_for_modes(self, num_modes: int) -> None:
        """Replaces a guide that the fit chose by a mixture, if the posterior has several modes."""
        if not self.guide_reason or self.parallel.size > 1 or self.stream is not None:
            return
        if (choice := choose_mixture(self.subject.guide, num_modes)) is not None:
            mixture, self.guide_reason = choice
            self.subject = _run_once(self.subject.model, mixture, self.batch, None)
            self.objective = _objective_of_batch(self.subject)

    @property
    def minibatches(self) -> MinibatchObjective | None:
        """The objective, if each step sees a mini-batch of the stream."""
        return self.objective if isinstance(self.objective, MinibatchObjective) else None

    @property
    def is_loop(self) -> bool:
        """Whether model or guide run for one draw at a time, so that numbers of draws are small."""
        return bool(self.looped_because)

    @property
    def has_all_data(self) -> bool:
        """Whether the log joint density is that of all data."""
        return self.minibatches is None or self.minibatches.whole is not None

    @property
    def fewer(self) -> int:
        """Divides numbers of draws in the search for the initial guide."""
        is_of_passes = self.minibatches is not None and self.has_all_data
        return FEWER ** (self.is_loop + is_of_passes)

    @property
    def density_of_passes(self) -> FullDataDensity | None:
        """All data, if the guide has a Gaussian of elements of plates, which passes over these find."""
        guide, minibatches = self.subject.guide, self.minibatches
        has_gaussian = isinstance(guide, StructuredGuide) and guide.is_of_elements
        is_known = minibatches is not None and self.terms is not None
        return minibatches.whole if minibatches and has_gaussian and is_known else None

    def density_of_start(self) -> LogJoint | None:
        """The density whose draws start a flow; ``None`` for other guides, or if passes start it."""
        minibatches, log_joint = self.minibatches, self.subject.log_joint
        objective = self.objective if minibatches is None else minibatches.objective
        if not isinstance(objective, PathObjective) or self.density_of_passes is not None:
            return None
        if minibatches is not None:
            return minibatches.mean_log_joint()
        return minibatch_density(log_joint) if log_joint.is_random else log_joint

    @cached_property
    def point_estimates(self) -> list[str]:
        """The names of the model's parameters, which are trained too."""
        model, _, args, kwargs, _ = self.subject
        if self.objective.is_guide_alone():
            return []
        with torch.no_grad():
            return [*traced_parameters(partial(model, *args, **kwargs))]

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers, in the same order in all processes."""
        tensors = list(self.objective.parameters().values())
        for module in (self.subject.guide, self.subject.model):
            if isinstance(module, nn.Module):
                tensors += [*module.parameters(), *module.buffers()]
        return tensors

    def missing(self) -> tuple[str, ...]:
        """Dependencies that the graph of a structured guide lacks, in words."""
        guide, minibatches = self.subject.guide, self.minibatches
        if not isinstance(guide, StructuredGuide):
            return ()
        batches = [self.batch] if minibatches is None else minibatches.validation
        return tuple(guide.missing_over_batches(batches))

    def check_graph(self) -> None:
        """Raises an error if other mini-batches than the first have dependencies that the graph lacks."""
        if self.minibatches is not None and (missing := self.missing()):
            raise ValueError(
                "loader: the guide's graph lacks dependencies that other mini-batches have: "
                f"{first_of(missing)}. Make a new guide and set it up with all data before the fit, "
                "guide.set_up(*all_data), or use AutoIAF, or AutoAmortized if rows have latents of their own"
            )

    def _check_processes(self, num_steps: int | None, num_particles: int | None) -> None:
        """Checks that all processes run the same fit, and synchronizes their parameters."""
        same: dict[str, object] = {"num_steps": num_steps, "num_particles": num_particles}
        same["parameters"] = [tuple(tensor.shape) for tensor in self.tensors()]
        stream, (args, kwargs) = self.stream, self.batch
        if stream is None or (self.has_all_data and stream.whole is not stream):
            data = filter(torch.is_tensor, (*args, *kwargs.values()))
            same["data (sums)"] = str([float(tensor.double().sum()) for tensor in data])
        self.parallel.check_same(**same)
        self.parallel.copy_first(self.tensors)


def _is_new(guide: object) -> bool:
    """Whether a guide can learn its graph from mini-batches, and has none yet."""
    is_new = isinstance(guide, AutoGuide) and guide.prototype_trace is None
    return is_new and isinstance(guide, StructuredGuide)


def _element_terms(
    model: Function, batch: Batch, stream: BatchStream
) -> tuple[FullDataDensity | None, ElementTerms | None]:
    """The density of all data, and the elements that rows of all mini-batches read.

    The terms are ``None`` if a structured guide cannot use them, and the density if it is not known.
    """
    log_joint = LogJoint(model, *batch)
    is_slow = log_joint.strategy == "loop" or log_joint.is_enumerated
    if is_slow or not ElementGroups.of(log_joint.latents).members:
        return None, None
    whole = density_of_all_rows(log_joint, stream, batch)
    if whole is None:
        return None, None
    return whole, ElementTerms.of(log_joint, whole.parts, stream.processes)


def _warn_of_loop(
    objective: BatchObjective, reason: str, num_draws: int, schedule: Schedule
) -> None:
    """Warns that a model runs for one draw at a time, with the reason and the expected time.

    :param num_draws: the draws per step.
    """
    # leave the caller's random numbers untouched
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
        began = time.perf_counter()
        if (loss := objective.loss(1)).requires_grad:
            torch.autograd.grad(loss, [*objective.parameters().values()], allow_unused=True)
        seconds = num_draws * (time.perf_counter() - began)
    num_steps = schedule.num_steps or schedule.expected_end(0)
    warn_user(
        "the model cannot be evaluated at many draws at once, so it is run one draw at a time, which is slow "
        f"({reason}). A step of {num_draws} draws takes about {seconds:.2g} seconds, and {num_steps:,} steps "
        f"about {num_steps * seconds:,.0f}. Write model and guide without branches on values of latents, and "
        "index from the right (docs/vectorization.md); or reduce num_particles, or set max_seconds",
        UserWarning,
    )


def _run_once(
    model: Function, guide: Function, batch: Batch, stream: BatchStream | None
) -> ModelAndGuide:
    """Runs model and guide, so that errors in them are raised before the fit starts."""
    (args, kwargs), offered = batch, cast(object, guide)
    # a new guide must not start from an earlier one's values
    if isinstance(offered, (FlowGuide, MinibatchGuide)):
        offered.drop_orphans()
    subject = ModelAndGuide.of(model, guide, args, kwargs)
    if stream is not None:
        check_use(stream, guide, subject.log_joint, batch)
    list(subject.weighted_draws(0))  # raises an error if the guide lacks a latent
    return subject


def _objective_of_batch(subject: ModelAndGuide) -> BatchObjective:
    """The objective for a batch, with the path gradient if the guide has all latents of the model."""
    model, guide, args, kwargs, log_joint = subject
    if isinstance(guide, FlowGuide):
        with torch.no_grad():
            latent, _ = guide.rsample_and_log_prob(1)
        if latent.shape[-1] == log_joint.latents.latent_dim:
            return PathObjective(log_joint, guide)
    return PyroObjective(model, guide, Batch(args, kwargs), log_joint)
