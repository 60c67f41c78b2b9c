# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO by Pyro's own estimators, for any guide."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import fmean, stdev

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from ...joint import LogJoint
from ...joint.handlers import UnmaskedLatents, hidden_sites, traced_parameters
from ...joint.plates import plate_nesting
from ...joint.protocols import MinibatchGuide
from ..data.loader import Batch
from .objective import BatchObjective

_NUM_CHECKED = 8
_NUM_LOOKS = 16


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pyro's validation and its warnings of NaN: a fit counts and names what is not finite.

    The sites are hidden from handlers around the fit, the parameters not.
    """
    with hidden_sites(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered ")
        yield


class PyroObjective(BatchObjective):
    """The ELBO by Pyro's estimators, for any guide; with the path gradient where the guide has one.

    :param model: a Pyro model.
    :param guide: a guide of it.
    :param arguments: the arguments of both.
    :param log_joint: the log joint density of the model.
    :param num_estimates: how many estimates of the ELBO :meth:`elbo_draws` returns, at most.
    """

    def __init__(
        self,
        model: Callable[..., object],
        guide: Callable[..., object],
        arguments: Batch,
        log_joint: LogJoint,
        num_estimates: int = 32,
    ) -> None:
        self._model, self._guide = UnmaskedLatents()(model), guide
        self._arguments, self._num_estimates = arguments, num_estimates
        self._kind = TraceEnum_ELBO if log_joint.is_enumerated else Trace_ELBO
        self._num_plates = plate_nesting(*self._traces())
        #: whether many particles are evaluated at once, in a plate
        self.is_vectorized = log_joint.strategy == "plate" and self._can_be_vectorized()

    def with_arguments(self, batch: Batch) -> "PyroObjective":
        other = copy.copy(self)
        other._arguments = batch
        return other

    def loss(self, num_particles: int) -> Tensor:
        guide: object = self._guide
        gradient = guide.path_gradient if isinstance(guide, MinibatchGuide) else nullcontext
        args, kwargs = self._arguments
        with _quietly(), gradient():
            elbo = self._elbo(num_particles)
            loss: Tensor = elbo.differentiable_loss(self._model, self._guide, *args, **kwargs)
        return loss

    def parameters(self) -> dict[str, Tensor]:
        return traced_parameters(partial(self._value, 1))

    def elbo_draws(self, count: int) -> Tensor:
        batch = max(count // self._num_estimates, 1)
        losses = [self._value(batch) for _ in range(max(count // batch, 1))]
        like = next(iter(self.parameters().values()))
        return -like.new_tensor(losses, dtype=torch.float64)

    @torch.no_grad()
    @_quietly()
    def nonfinite_sites(self) -> list[str]:
        found: list[str] = []
        for _ in range(_NUM_LOOKS):
            for trace in self._traces():
                trace.compute_log_prob()
                for name, node in trace.nodes.items():
                    if "log_prob" in node and not bool(node["log_prob"].isfinite().all()):
                        found.append(name)
            if found:
                break
        return found

    @torch.no_grad()
    @_quietly()
    def _value(self, num_particles: int) -> float:
        args, kwargs = self._arguments
        return float(self._elbo(num_particles).loss(self._model, self._guide, *args, **kwargs))

    def _elbo(self, num_particles: int) -> Trace_ELBO | TraceEnum_ELBO:
        return self._kind(
            num_particles=num_particles,
            vectorize_particles=self.is_vectorized and num_particles > 1,
            max_plate_nesting=self._num_plates,
        )

    @torch.no_grad()
    @_quietly()
    def _traces(self) -> tuple[poutine.Trace, poutine.Trace]:
        """One run of the guide, and of the model at its draws."""
        args, kwargs = self._arguments
        guide_trace = poutine.trace(self._guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(self._model, trace=guide_trace)
        return guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs)

    def _can_be_vectorized(self) -> bool:
        """Whether the mean over particles at once is that over particles in turn, but for noise."""
        with torch.random.fork_rng(devices=[]):
            self.is_vectorized = True
            try:
                at_once = self._finite_values()
            except Exception:  # whatever a model raises for many particles, it needs one at a time
                return False
            self.is_vectorized = False
            in_turn = self._finite_values()
        if len(at_once) < 2 or len(in_turn) < 2:
            return True
        errors = [stdev(values) / math.sqrt(len(values)) for values in (at_once, in_turn)]
        allowed = 10 * math.hypot(*errors) + 1e-6 * abs(fmean(in_turn)) + 1e-8
        return abs(fmean(at_once) - fmean(in_turn)) <= allowed

    def _finite_values(self) -> list[float]:
        values = [self._value(_NUM_CHECKED) for _ in range(_NUM_CHECKED)]
        return [value for value in values if math.isfinite(value)]
