# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO by Pyro's own estimators, for any guide."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from ...joint import LogJoint
from ...joint.handlers import UnmaskedLatents, hidden_sites, plate_nesting, traced_parameters
from ...joint.protocols import MinibatchGuide
from ...joint.vectorization import GuideDraws
from ..loader import Batch
from .objective import BatchObjective

_NUM_LOOKS = 16


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pyro's validation and its warnings of NaN: a fit counts and names what is not finite.

    The sites are hidden from handlers around the fit, the parameters not.
    """
    with hidden_sites(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered ")
        yield


@dataclass
class PyroObjective(BatchObjective):
    """The ELBO by Pyro's estimators, for any guide; with the path gradient where the guide has one.

    :param model: a Pyro model.
    :param guide: a guide of it.
    :param arguments: the arguments of both.
    :param log_joint: the log joint density of the model.
    :param num_estimates: how many estimates of the ELBO :meth:`elbo_draws` returns, at most.
    """

    model: Callable[..., object]
    guide: Callable[..., object]
    arguments: Batch
    log_joint: LogJoint
    num_estimates: int = 32

    def __post_init__(self) -> None:
        self.model = UnmaskedLatents(self.log_joint.improper)(self.model)
        self._kind = TraceEnum_ELBO if self.log_joint.is_enumerated else Trace_ELBO
        self._num_plates = plate_nesting(*self._traces())
        run = partial(self.guide, *self.arguments.args, **self.arguments.kwargs)
        in_plate = self.log_joint.strategy == "plate"
        with torch.no_grad(), _quietly(), torch.random.fork_rng(devices=[]):
            #: whether many particles are evaluated at once, in a plate
            self.is_vectorized = in_plate and GuideDraws(run, self._num_plates).is_vectorized

    def with_arguments(self, batch: Batch) -> "PyroObjective":
        other = copy.copy(self)
        other.arguments = batch
        return other

    def loss(self, num_particles: int) -> Tensor:
        guide: object = self.guide
        gradient = guide.path_gradient if isinstance(guide, MinibatchGuide) else nullcontext
        args, kwargs = self.arguments
        with _quietly(), gradient():
            elbo = self._elbo(num_particles)
            loss: Tensor = elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
        return loss

    def parameters(self) -> dict[str, Tensor]:
        return traced_parameters(partial(self._value, 1))

    def is_guide_alone(self) -> bool:
        _, of_model = self._traces()
        return not of_model.param_nodes

    def elbo_draws(self, count: int) -> Tensor:
        batch = max(count // self.num_estimates, 1)
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
        args, kwargs = self.arguments
        return float(self._elbo(num_particles).loss(self.model, self.guide, *args, **kwargs))

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
        args, kwargs = self.arguments
        guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(self.model, trace=guide_trace)
        return guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs)
